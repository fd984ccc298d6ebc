"""Hugging Face models in functional form. The only floor that knows transformers and Pillow.

    from_pretrained(id_or_path) -> Model      a checkpoint folder or hub id
    from_module(module, processor) -> Model   a module that is in memory already
    load_micro(name) -> Model                 a small trained model that ships with the package
    tiny_model(name) -> (module, processor)   a random one, for tests
    attach(module, delta)                     a plain Hugging Face module, edited until detached
    export_peft, import_peft                  deltas as LoRA folders and back
    convert_checkpoint(folder, output_dir)    a checkpoint of pickles, as safetensors
    list_families() -> names                  the families with an adapter of their own

Importing this package loads neither torch nor transformers; its functions do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.adapters.families.table import list_families
    from errata.adapters.hf.functional_model import cache_vision_features
    from errata.adapters.inputs.prompt_format import PromptTemplate
    from errata.adapters.inputs.templates import TEMPLATES, get_template
    from errata.adapters.interop.attachment import attach
    from errata.adapters.interop.peft_export import export_peft
    from errata.adapters.interop.peft_import import import_peft
    from errata.adapters.loading.convert import convert_checkpoint
    from errata.adapters.loading.load import from_module, from_pretrained
    from errata.adapters.zoo.micro import load_micro
    from errata.adapters.zoo.tiny import tiny_model

__all__ = [
    "TEMPLATES",
    "PromptTemplate",
    "attach",
    "cache_vision_features",
    "convert_checkpoint",
    "export_peft",
    "from_module",
    "from_pretrained",
    "get_template",
    "import_peft",
    "list_families",
    "load_micro",
    "tiny_model",
]

_MODULES = {
    "list_families": "families.table",
    "cache_vision_features": "hf.functional_model",
    "PromptTemplate": "inputs.prompt_format",
    "TEMPLATES": "inputs.templates",
    "get_template": "inputs.templates",
    "attach": "interop.attachment",
    "export_peft": "interop.peft_export",
    "import_peft": "interop.peft_import",
    "convert_checkpoint": "loading.convert",
    "from_module": "loading.load",
    "from_pretrained": "loading.load",
    "load_micro": "zoo.micro",
    "tiny_model": "zoo.tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
