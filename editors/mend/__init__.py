from errata.editors.mend.config import PRESETS, MendConfig
from errata.editors.mend.editor import mend_editor

__all__ = ["PRESETS", "MendConfig", "mend_editor"]
