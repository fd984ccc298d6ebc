"""`errata convert`: a checkpoint of pickles, as safetensors."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add the command.

    Args:
        subparsers: Of the main parser.
    """
    parser = subparsers.add_parser(
        "convert", help="write a checkpoint of *.bin or *.pt files anew, as safetensors"
    )
    parser.add_argument("folder", help="the checkpoint")
    parser.add_argument("output", help="folder to write; must not exist")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file (default 5GB)")
    parser.set_defaults(command=_convert)


def _convert(options: argparse.Namespace) -> None:
    from errata import adapters

    folder = adapters.convert_checkpoint(
        options.folder, options.output, max_shard_size=options.max_shard_size
    )
    print(f"wrote {folder}")
