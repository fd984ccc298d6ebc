from errata.editors.grace.config import PRESETS, GraceConfig
from errata.editors.grace.editor import grace_editor

__all__ = ["PRESETS", "GraceConfig", "grace_editor"]
