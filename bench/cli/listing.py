"""`errata models`, `editors`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from errata.bench.cli.options import _format_file_size
from errata.functional.errors import InvalidSettingsError


def _models(options: argparse.Namespace) -> None:
    from errata import adapters
    from errata.adapters.zoo.assets import WEIGHTS
    from errata.adapters.zoo.micro import micro_names

    print("Shipped, trained (use as micro/NAME):")
    for name in micro_names():
        print(f"  micro/{name:16} {_format_file_size(WEIGHTS / name / 'model.safetensors')}")
    print("\nFamilies served from a folder or hub id:")
    for name, description in adapters.list_families().items():
        print(f"  {name:16} {description}")
    print("  others           found by structure, where a cut forward proves to be the whole one")


def _editors(options: argparse.Namespace) -> None:
    import msgspec

    from errata import editors
    from errata.functional.errors import unknown_name

    if options.name and options.name not in editors.METHODS:
        raise InvalidSettingsError(f"{unknown_name('editor', options.name, editors.METHODS)}.")
    for name, method in editors.METHODS.items():
        if options.name not in (None, name):
            continue
        print(f"{name}: {method.summary}")
        defaults = msgspec.to_builtins(method.config())
        for field in msgspec.structs.fields(method.config):
            print(f"  {field.name} = {msgspec.json.encode(defaults[field.name]).decode()}")
            if options.name:  # the long form
                info = msgspec.inspect.type_info(field.type)
                print(f"      {_describe_type(info)}. {_description(field.type)}")
        print(f"  presets: {', '.join(method.presets) or 'none'}\n")


def _description(annotation: Any) -> str:
    """Return the description that a setting's `Meta` holds."""
    metadata = getattr(annotation, "__metadata__", ())
    return next((meta.description for meta in metadata if meta.description), "")


def _describe_type(info: Any) -> str:
    """Describe a setting's type and bounds in words, e.g. `float > 0`."""
    from msgspec import inspect

    match info:
        case inspect.Metadata():
            return _describe_type(info.type)
        case inspect.UnionType():
            return " or ".join(_describe_type(part) for part in info.types)
        case inspect.LiteralType():
            return "one of " + ", ".join(json.dumps(value) for value in info.values)
        case inspect.NoneType():
            return "null"
        case inspect.CollectionType() | inspect.VarTupleType():
            return f"list of {_describe_type(info.item_type)}"
        case inspect.TupleType():
            return f"list of {len(info.item_types)} {_describe_type(info.item_types[0])}"
        case inspect.DictType():
            return f"table of {_describe_type(info.value_type)}"
    name = type(info).__name__.removesuffix("Type").lower()
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(info, key)}"
        for key, sign in signs.items()
        if getattr(info, key, None) is not None
    ]
    return " ".join(
        [{"str": "text", "bool": "true or false"}.get(name, name), ", ".join(bounds)]
    ).strip()
