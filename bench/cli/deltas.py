"""The commands that work on delta files.

`inspect` and `verify` read headers only and import no torch, so they are instant for a delta of a
gigabyte. The other commands import what they need when they run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from errata.bench.cli.inspect import _inspect, _verify
from errata.bench.cli.options import _add_command, _format_file_size
from errata.functional.errors import InvalidInputError, join_messages, join_names

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the commands to the subparsers of `errata`.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    inspect = _add_command(
        subparsers, "inspect", _inspect, "print what a delta file changes, and for which edits"
    )
    _add_file_argument(inspect)
    inspect.add_argument(
        "--norms", action="store_true", help="read the values too: norm |dW| of each entry"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = _add_command(
        subparsers, "verify", _verify, "check that a delta file is intact and fits a checkpoint"
    )
    _add_file_argument(verify)
    verify.add_argument("--base", type=Path, help="folder of the checkpoint it was made for")
    verify.add_argument(
        "--values", action="store_true", help="read every value: digest, NaN, the base's hashes"
    )

    merge = _add_command(subparsers, "merge", _merge, "merge several deltas into one")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument(
        "--allow-conflicts",
        action="store_true",
        help="merge deltas that teach one question different answers",
    )
    _add_output_option(merge)

    remove = _add_command(subparsers, "remove", _remove, "remove single edits from a delta")
    _add_file_argument(remove)
    remove.add_argument(
        "edits", nargs="+", metavar="EDIT", help="an id, or #n for the n-th edit (from 0)"
    )
    _add_output_option(remove)

    diff = _add_command(subparsers, "diff", _diff, "compare two deltas and list conflicting edits")
    diff.add_argument("left", type=Path, metavar="FILE")
    diff.add_argument("right", type=Path, metavar="FILE")
    diff.add_argument("--json", action="store_true", help="print JSON")

    export = _add_command(subparsers, "export", _export, "write a delta as a PEFT LoRA folder")
    _add_file_argument(export)
    export.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    export.add_argument("--profile", choices=["peft", "serving"], default="peft")
    export.add_argument("--base", type=Path, help="checkpoint folder, for the shapes of siblings")
    export.add_argument(
        "--rank", type=int, help="compress to this rank first; prints the energy lost"
    )

    import_parser = _add_command(
        subparsers, "import", _import, "read a PEFT LoRA folder as a delta"
    )
    import_parser.add_argument("folder", type=Path)
    import_parser.add_argument(
        "--model", help="micro/NAME, a folder or a hub id: checks names and shapes"
    )
    import_parser.add_argument("--arithmetic", choices=["act", "act_fp32", "weight"])
    _add_output_option(import_parser)

    fuse = _add_command(
        subparsers, "fuse", _fuse, "write a new checkpoint with the delta fused into its weights"
    )
    _add_file_argument(fuse)
    fuse.add_argument("--base", type=Path, required=True, help="folder of the checkpoint")
    fuse.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    fuse.add_argument(
        "--skip-check", action="store_true", help="skip the comparison of the base's hashes"
    )
    fuse.add_argument(
        "--untie",
        action="store_true",
        help="give a head that shares the embedding's weight one of its own",
    )


def _add_file_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a delta file")


def _add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="the delta file to write")


def _diff(options: argparse.Namespace) -> None:
    from errata.functional import conflicts, diff, load_delta
    from errata.functional.deltas.comparison import compare_edits, compare_slots

    left, right = load_delta(options.left), load_delta(options.right)
    differences, conflicts_found = diff(left, right), conflicts(left, right)
    memories, edits = compare_slots(left, right), compare_edits(left, right)
    if options.json:
        report = {
            "edits": {"left": edits.only_a, "right": edits.only_b, "both": edits.both},
            "parameters": [item._asdict() for item in differences],
            "memories": [item._asdict() for item in memories],
            "conflicts": [item._asdict() for item in conflicts_found],
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for where, ids in (("left", edits.only_a), ("right", edits.only_b)):
        if ids:
            print(f"only in the {where}: edit {join_names(ids)}")
    for memory in memories:
        one = _SLOT_NAMES[memory.kind]
        print(
            f"{memory.name}  {memory.kind}: {memory.num_a} {one} left, {memory.num_b} right, "
            f"{memory.num_equal} of them equal"
            + ("" if memory.same_settings else "; their settings or networks differ")
        )
    for item in differences:
        print(
            f"{item.name}  |left| {item.norm_a:.4g}  |right| {item.norm_b:.4g}  "
            f"apart {item.distance:.4g}  cosine {item.cosine:.4f}"
        )
    for item in conflicts_found:
        where = f" at {item.parameter} (cosine {item.score:.3f})" if item.parameter else ""
        print(f"edit {item.ids[1]} {item.kind} edit {item.ids[0]}{where}")
    same_memories = all(m.num_a == m.num_b == m.num_equal and m.same_settings for m in memories)
    if same_memories and all(item.distance == 0 for item in differences):
        print("the same change")


_SLOT_NAMES = {
    "codebook": "key(s)",
    "masked": "side memory(s)",
    "experts": "expert(s)",
    "prompt": "fact(s)",
    "scope": "remembered edit(s)",
}


# Making.


def _merge(options: argparse.Namespace) -> None:
    from errata.functional import load_delta, merge, save_delta

    deltas = (load_delta(path) for path in options.files)
    delta = merge(*deltas, allow_conflicts=options.allow_conflicts)
    save_delta(options.output, delta)
    print(
        f"{options.output}: {len(delta.header.edits)} edit(s), {_format_file_size(options.output)}"
    )


def _remove(options: argparse.Namespace) -> None:
    from errata.functional import load_delta, remove, save_delta

    invalid = [e for e in options.edits if e.startswith("#") and not e[1:].isdecimal()]
    if invalid:
        raise InvalidInputError(
            f"an edit is named by its id, or by # and its number, got {join_messages(invalid)}."
        )
    delta = remove(
        load_delta(options.file), [int(e[1:]) if e.startswith("#") else e for e in options.edits]
    )
    save_delta(options.output, delta)
    print(
        f"{options.output}: {len(delta.header.edits)} edit(s), {_format_file_size(options.output)}"
    )


def _export(options: argparse.Namespace) -> None:
    from errata.adapters.interop.peft_export import export_peft
    from errata.functional import compress, load_delta
    from errata.functional.deltas import shards

    delta = load_delta(options.file)
    if options.rank is not None:
        delta, lost_energy = compress(delta, rank=options.rank)
        for name, share in lost_energy.items():
            print(f"{name}: {share:.2%} of its energy lost")
    shapes = None
    if options.base:
        shapes = {
            name: place.slot.shape
            for name, place in shards.checkpoint_parameters(options.base).items()
        }
    export = export_peft(delta, options.output, options.profile, shapes=shapes)
    for note in export.inexact:
        print(f"note: {note}")
    print(f"{export.folder}: load with autocast_adapter_dtype={export.autocast_adapter_dtype}")


def _import(options: argparse.Namespace) -> None:
    from errata.adapters.interop.peft_import import import_peft
    from errata.functional import save_delta

    model = _open_model(options.model) if options.model else None
    delta = import_peft(options.folder, model, arithmetic=options.arithmetic)
    save_delta(options.output, delta)
    print(
        f"{options.output}: {len(delta.header.entries)} parameter(s), "
        f"{_format_file_size(options.output)}"
    )


def _fuse(options: argparse.Namespace) -> None:
    from errata.functional import load_delta
    from errata.functional.deltas.fusing import fuse

    folder = fuse(
        load_delta(options.file),
        options.base,
        options.output,
        check=not options.skip_check,
        untie=options.untie,
    )
    print(f"{folder}: a checkpoint that any loader of {options.base} loads")


def _open_model(name: str, dtype: Any = "auto", device: str = "cpu") -> Any:
    from errata.bench.runs.settings import ModelSettings
    from errata.bench.runs.sources import open_model

    return open_model(ModelSettings(id=name, dtype=dtype, device=device))
