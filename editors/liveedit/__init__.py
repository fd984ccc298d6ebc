from errata.editors.liveedit.config import PRESETS, LiveEditConfig
from errata.editors.liveedit.editor import liveedit_editor, liveedit_trainable

__all__ = ["PRESETS", "LiveEditConfig", "liveedit_editor", "liveedit_trainable"]
