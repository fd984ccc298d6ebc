from errata.editors.serac.config import PRESETS, SeracConfig
from errata.editors.serac.editor import serac_editor
from errata.editors.serac.training import serac_trainable

__all__ = ["PRESETS", "SeracConfig", "serac_editor", "serac_trainable"]
