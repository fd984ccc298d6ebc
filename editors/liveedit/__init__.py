from errata.editors.liveedit.config import PRESETS, LiveEditConfig
from errata.editors.liveedit.editor import liveedit_editor

__all__ = ["PRESETS", "LiveEditConfig", "liveedit_editor"]
