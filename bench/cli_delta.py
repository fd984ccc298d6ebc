"""The verbs of `errata` that work on delta files.

`inspect` and `verify` read headers only and import no torch, so that a delta of a gigabyte is looked at
in a blink; everything heavier is imported by the verb that needs it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from errata.functional.errors import BaseMismatchError, InvalidInputError, join_messages
from errata.functional.header import LowRank
from errata.functional.peek import DeltaInfo, inspect_delta

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the verbs to the subparsers of `errata`."""
    show = _add_command(
        subparsers, "inspect", _inspect, "what a delta file changes, and for which edits"
    )
    _add_file_argument(show)
    show.add_argument("--norms", action="store_true", help="read the values, too: |dW| of each")
    show.add_argument("--json", action="store_true", help="for programs")

    check = _add_command(
        subparsers, "verify", _verify, "whether a delta file is sound, and fits a checkpoint"
    )
    _add_file_argument(check)
    check.add_argument("--base", type=Path, help="folder of the checkpoint it is meant for")
    check.add_argument(
        "--values", action="store_true", help="read every value: digest, NaN, the base's hashes"
    )

    merge = _add_command(subparsers, "merge", _merge, "one delta that does what several do")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _add_output_option(merge)

    remove = _add_command(subparsers, "remove", _remove, "take single edits out of a delta")
    _add_file_argument(remove)
    remove.add_argument("edits", nargs="+", metavar="EDIT", help="by id, or #n for the n-th (0, 1)")
    _add_output_option(remove)

    diff = _add_command(
        subparsers, "diff", _diff, "how two deltas differ, and which edits conflict"
    )
    diff.add_argument("left", type=Path, metavar="FILE")
    diff.add_argument("right", type=Path, metavar="FILE")
    diff.add_argument("--json", action="store_true", help="for programs")

    export = _add_command(subparsers, "export", _export, "write a delta as a PEFT LoRA folder")
    _add_file_argument(export)
    export.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    export.add_argument("--profile", choices=["peft", "serving"], default="peft")
    export.add_argument("--base", type=Path, help="checkpoint folder, for the shapes of siblings")
    export.add_argument("--rank", type=int, help="compress to this rank first; says what is lost")

    import_parser = _add_command(
        subparsers, "import", _import, "read a PEFT LoRA folder as a delta"
    )
    import_parser.add_argument("folder", type=Path)
    import_parser.add_argument(
        "--model", help="micro/NAME, a folder or a hub id: checks names and shapes"
    )
    import_parser.add_argument("--arithmetic", choices=["act", "act_fp32", "weight"])
    _add_output_option(import_parser)

    fold = _add_command(
        subparsers, "fuse", _fuse, "write a new checkpoint with the delta in its weights"
    )
    _add_file_argument(fold)
    fold.add_argument("--base", type=Path, required=True, help="folder of the checkpoint")
    fold.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    fold.add_argument("--skip-check", action="store_true", help="do not compare the base's hashes")

    apply = _add_command(
        subparsers, "apply", _apply, "ask a model one question with and without a delta"
    )
    _add_file_argument(apply)
    apply.add_argument("--model", required=True, help="micro/NAME, a folder, or a hub id")
    apply.add_argument("--prompt", required=True)
    apply.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    apply.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")
    apply.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    apply.add_argument("--device", default="cpu")


def _add_command(
    subparsers: Any, name: str, function: Any, summary: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(command=function)
    return parser


def _add_file_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a delta file")


def _add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="the delta file to write")


# Looking.


def _inspect(options: argparse.Namespace) -> None:
    info = inspect_delta(options.file)
    facts = _describe(options.file, info, _norms(options.file) if options.norms else {})
    print(
        json.dumps(facts, indent=2, ensure_ascii=False)
        if options.json
        else _format_description(facts)
    )


def _describe(path: Path, info: DeltaInfo, norms: dict[str, float]) -> dict[str, Any]:
    header = info.header
    entries = []
    for entry in header.entries:
        slots = [info.tensors[name] for name in entry.tensor_specs()]
        entries.append(
            {
                "parameter": entry.name,
                "checkpoint_name": getattr(entry, "checkpoint_name", None),
                "kind": type(entry).__name__.lower(),
                "shape": list(getattr(entry, "shape", slots[0].shape)),
                "rank": getattr(entry, "rank", None),
                "dtype": slots[0].dtype,
                "bytes": sum(slot.nbytes for slot in slots),
                "norm": norms.get(entry.name),
                "base_known": entry.name in header.base.parameter_hashes,
            }
        )
    edits = []
    for number, edit in enumerate(header.edits):
        rows = {
            e.name: e.edit_ranks[number]
            for e in header.entries
            if isinstance(e, LowRank) and e.edit_ranks
        }
        edits.append(
            {
                "id": edit.id,
                "prompt": edit.prompt,
                "target": edit.target,
                "images": list(edit.images),
                "ranks": rows,
            }
        )
    return {
        "file": path.name,
        "bytes": info.num_bytes,
        "digest": info.digest,
        "format": header.format,
        "editor": header.editor,
        "settings": header.settings,
        "arithmetic": header.arithmetic,
        "stack": header.stack,
        "order_dependent": header.order_dependent,
        "base": {
            "id": header.base.id,
            "revision": header.base.revision,
            "family": header.base.family,
            "config_hash": header.base.config_hash,
        },
        "entries": entries,
        "edits": edits,
    }


def _format_description(description: dict[str, Any]) -> str:
    base = description["base"]
    arithmetic_notes = {"act": "beside the linear maps", "act_fp32": "beside them, in fp32"}
    lines = [
        f"{description['file']}  {_format_size(description['bytes'])}  sha256 {description['digest'][:16]}",
        f"base    {base['id']}"
        + (f" @ {base['revision'][:12]}" if base["revision"] else "")
        + (f" ({base['family']})" if base["family"] else ""),
        f"editor  {description['editor'] or 'not named'}"
        + (f", {description['stack']} edits side by side" if description["stack"] else ""),
        f"arithmetic  {description['arithmetic']}: {arithmetic_notes.get(description['arithmetic'], 'added to the weights')}",
    ]
    if description["settings"]:
        pairs = ", ".join(f"{k}={_shorten(v)}" for k, v in description["settings"].items())
        lines.append(f"with    {pairs}")
    lines.append(f"\nchanges {len(description['entries'])} parameter(s)")
    for entry in description["entries"][:40]:
        rank = f" of rank {entry['rank']}" if entry["rank"] else ""
        norm = f"  |dW| {entry['norm']:.4g}" if entry["norm"] is not None else ""
        shape = " x ".join(map(str, entry["shape"]))
        lines.append(
            f"  {entry['parameter']}  {shape}  {entry['kind']}{rank}, {entry['dtype']}, "
            f"{_format_size(entry['bytes'])}{norm}{'' if entry['base_known'] else '  (base not hashed)'}"
        )
    lines += (
        [f"  and {len(description['entries']) - 40} more"]
        if len(description["entries"]) > 40
        else []
    )
    is_inseparable = description["order_dependent"] and len(description["edits"]) > 1
    separability_note = ", single ones can not be removed" if is_inseparable else ""
    lines.append(f"\n{len(description['edits'])} edit(s){separability_note}")
    for edit in description["edits"][:20]:
        num_images_note = f", {len(edit['images'])} picture(s)" if edit["images"] else ""
        lines.append(
            f"  {edit['id'] or '(no id)'}  prompt {edit['prompt'][:12] or '-'}{num_images_note}"
        )
    lines += (
        [f"  and {len(description['edits']) - 20} more"] if len(description["edits"]) > 20 else []
    )
    return "\n".join(lines)


def _norms(path: Path) -> dict[str, float]:
    from errata.functional import load_delta
    from errata.functional.kinds import entries_of, inner_product

    delta = load_delta(path)
    if delta.header.stack:
        raise InvalidInputError(
            f"{path}: norms are of one edit, and this delta holds several side by side."
        )
    return {
        part.entry.name: float(inner_product(part, part)) ** 0.5
        for part in entries_of(delta).values()
    }


def _verify(options: argparse.Namespace) -> None:
    from errata.functional import shards

    info = inspect_delta(options.file)
    findings = [f"{options.file.name}: header sound, {len(info.header.entries)} parameter(s)"]
    parameters = {}
    if options.base:
        parameters = shards.checkpoint_parameters(options.base)
        mismatches = shards.checkpoint_mismatches(
            info.header, parameters, shards.checkpoint_model_type(options.base)
        )
        if mismatches:
            raise BaseMismatchError(
                f"{options.file} does not fit {options.base}: {join_messages(mismatches)}."
            )
        findings.append(f"names, shapes and family fit {options.base}")
    if options.values:
        findings += _verify_values(options, parameters)
    else:
        findings.append("values not read (--values does)")
    print("; ".join(findings) + ".")


def _verify_values(options: argparse.Namespace, parameters: Any) -> list[str]:
    from errata.functional import load_delta
    from errata.functional.fold import mismatched_parameters

    delta = load_delta(options.file)
    findings = ["digest right, all values finite"]
    if options.base:
        mismatches = list(mismatched_parameters(delta, parameters))
        if mismatches:
            raise BaseMismatchError(
                f"{options.file} was made for {delta.header.base.id}; in {options.base} other "
                f"values are held by {join_messages(mismatches)}."
            )
        known = sum(e.name in delta.header.base.parameter_hashes for e in delta.header.entries)
        findings.append(
            f"the base's values are those it was made for ({known} parameter(s) hashed)"
        )
    return findings


def _diff(options: argparse.Namespace) -> None:
    from errata.functional import conflicts, diff, load_delta

    left, right = load_delta(options.left), load_delta(options.right)
    differences, conflicts_found = diff(left, right), conflicts(left, right)
    if options.json:
        report = {
            "parameters": [item._asdict() for item in differences],
            "conflicts": [item._asdict() for item in conflicts_found],
        }
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    for item in differences:
        print(
            f"{item.name}  |left| {item.norm_a:.4g}  |right| {item.norm_b:.4g}  "
            f"apart {item.distance:.4g}  cosine {item.cosine:.4f}"
        )
    for item in conflicts_found:
        where = f" at {item.parameter} (cosine {item.score:.3f})" if item.parameter else ""
        print(f"edit {item.ids[1]} {item.kind} edit {item.ids[0]}{where}")
    if all(item.distance == 0 for item in differences):
        print("the same change")


# Making.


def _merge(options: argparse.Namespace) -> None:
    from errata.functional import load_delta, merge, save_delta

    delta = merge(*(load_delta(path) for path in options.files))
    save_delta(options.output, delta)
    print(
        f"{options.output}: {len(delta.header.edits)} edit(s), {_format_size(_file_size(options.output))}"
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
        f"{options.output}: {len(delta.header.edits)} edit(s), {_format_size(_file_size(options.output))}"
    )


def _export(options: argparse.Namespace) -> None:
    from errata.adapters.peft import export_peft
    from errata.functional import compress, load_delta, shards

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
    from errata.adapters.peft import import_peft
    from errata.functional import save_delta

    model = _open_model(options.model) if options.model else None
    delta = import_peft(options.folder, model, arithmetic=options.arithmetic)
    save_delta(options.output, delta)
    print(
        f"{options.output}: {len(delta.header.entries)} parameter(s), {_format_size(_file_size(options.output))}"
    )


def _fuse(options: argparse.Namespace) -> None:
    from errata.functional import load_delta
    from errata.functional.fold import fuse

    folder = fuse(
        load_delta(options.file), options.base, options.output, check=not options.skip_check
    )
    print(f"{folder}: a checkpoint that any loader of {options.base} loads")


def _apply(options: argparse.Namespace) -> None:
    from errata.adapters.images import open_image
    from errata.functional import Query, bind, load_delta
    from errata.functional.generate import generate

    if not options.prompt.strip() or options.max_new_tokens < 1:
        raise InvalidInputError("--prompt must ask something, and --max-new-tokens be at least 1.")
    delta = load_delta(options.file)
    query = Query(options.prompt, "", tuple(map(open_image, options.image)))
    model = _open_model(options.model, options.dtype, options.device)
    for what, one in (("without", model), ("with", bind(model, delta))):
        print(f"{what + ':':9}{generate(one, [query], options.max_new_tokens)[0].strip()}")


def _open_model(name: str, dtype: Any = "auto", device: str = "cpu") -> Any:
    from .settings import ModelSettings
    from .sources import open_model

    return open_model(ModelSettings(id=name, dtype=dtype, device=device))


def _file_size(path: Path) -> int:
    return path.stat().st_size


def _format_size(num_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
