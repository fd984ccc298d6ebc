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
    from errata.adapters.families.table import list_families
    from errata.adapters.hf.functional_model import cache_vision_features
    from errata.adapters.inputs.prompt_format import PromptTemplate
    from errata.adapters.inputs.templates import TEMPLATES, get_template
    from errata.adapters.interop.attachment import attach
    from errata.adapters.interop.peft_export import export_peft
    from errata.adapters.interop.peft_import import import_peft
    from errata.adapters.loading.load import from_module, from_pretrained
    from errata.adapters.zoo.micro import load_micro
    from errata.adapters.zoo.tiny import tiny_model

__all__ = [
    "TEMPLATES",
    "PromptTemplate",
    "from_module",
    "attach",
    "list_families",
    "import_peft",
    "from_pretrained",
    "load_micro",
    "get_template",
    "cache_vision_features",
    "tiny_model",
    "export_peft",
]

_HOMES = {
    "TEMPLATES": "templates",
    "PromptTemplate": "text",
    "from_module": "load",
    "attach": "attach",
    "list_families": "micro",
    "import_peft": "peft",
    "from_pretrained": "load",
    "load_micro": "micro",
    "get_template": "templates",
    "cache_vision_features": "core",
    "tiny_model": "tiny",
    "export_peft": "peft",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """`adapters.from_pretrained` is the function, also after its module of the same name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
