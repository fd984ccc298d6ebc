from errata.editors.ike.config import PRESETS, IkeConfig
from errata.editors.ike.editor import ike_editor

__all__ = ["PRESETS", "IkeConfig", "ike_editor"]
