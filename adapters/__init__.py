"""Hugging Face models in functional form; the only floor that knows transformers and Pillow.

    load(id_or_path) -> Model          a checkpoint folder or hub id
    adapt(module, processor) -> Model  what is in memory already
    micro(name) -> Model               a small trained model that comes with the package
    tiny(name) -> (module, processor)  a random one, for tests
    attach(module, delta)              a plain Hugging Face module, edited until detached
    to_peft, from_peft                 deltas as LoRA folders and back
    families() -> names                what has an adapter of its own

Importing this package loads neither torch nor transformers; its functions do.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import attach
    from .core import seeing_once
    from .load import adapt, load
    from .micro import families, micro
    from .peft import from_peft, to_peft
    from .templates import PRESETS, preset
    from .text import Template
    from .tiny import tiny

__all__ = [
    "PRESETS",
    "Template",
    "adapt",
    "attach",
    "families",
    "from_peft",
    "load",
    "micro",
    "preset",
    "seeing_once",
    "tiny",
    "to_peft",
]

_HOMES = {
    "PRESETS": "templates",
    "Template": "text",
    "adapt": "load",
    "attach": "attach",
    "families": "micro",
    "from_peft": "peft",
    "load": "load",
    "micro": "micro",
    "preset": "templates",
    "seeing_once": "core",
    "tiny": "tiny",
    "to_peft": "peft",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """`adapters.load` is the function, also after its module of the same name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
