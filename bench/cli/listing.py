"""`errata models`, `editors`."""

from __future__ import annotations

import argparse

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
    from errata.functional.errors import suggest_name

    if options.name and options.name not in editors.METHODS:
        raise InvalidSettingsError(f"editor: {suggest_name(options.name, editors.METHODS)}.")
    for name, method in editors.METHODS.items():
        if options.name not in (None, name):
            continue
        print(f"{name}: {method.summary}")
        plain = msgspec.to_builtins(method.config())
        for key in method.config.__struct_fields__:
            print(f"  {key} = {msgspec.json.encode(plain[key]).decode()}")
        print(f"  presets: {', '.join(method.presets) or 'none'}\n")
