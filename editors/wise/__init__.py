from errata.editors.wise.config import PRESETS, WiseConfig
from errata.editors.wise.editor import wise_editor

__all__ = ["PRESETS", "WiseConfig", "wise_editor"]
