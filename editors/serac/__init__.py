from errata.editors.serac.config import PRESETS, SeracConfig
from errata.editors.serac.editor import serac_editor

__all__ = ["PRESETS", "SeracConfig", "serac_editor"]
