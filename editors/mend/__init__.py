from errata.editors.mend.config import PRESETS, MendConfig
from errata.editors.mend.editor import mend_editor, mend_trainable

__all__ = ["PRESETS", "MendConfig", "mend_editor", "mend_trainable"]
