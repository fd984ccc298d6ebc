"""`errata inspect`, `verify`: read headers without torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from errata.bench.cli.options import _format_size
from errata.functional.deltas.inspection import DeltaInfo, inspect_delta
from errata.functional.errors import BaseMismatchError, InvalidInputError, join_messages
from errata.functional.kinds.lowrank.entry import LowRank


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
    arithmetic_notes = {
        "act": "added to the outputs of the linear maps",
        "act_fp32": "added to the outputs of the linear maps, in fp32",
    }
    lines = [
        f"{description['file']}  {_format_size(description['bytes'])}  sha256 "
        f"{description['digest'][:16]}",
        f"base    {base['id']}"
        + (f" @ {base['revision'][:12]}" if base["revision"] else "")
        + (f" ({base['family']})" if base["family"] else ""),
        f"editor  {description['editor'] or 'not named'}"
        + (f", {description['stack']} independent edits" if description["stack"] else ""),
        f"arithmetic  {description['arithmetic']}: "
        f"{arithmetic_notes.get(description['arithmetic'], 'added to the weights')}",
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
            f"{_format_size(entry['bytes'])}{norm}{'' if entry['base_known'] else '  (base not hashed)'}"  # noqa: E501
        )
    lines += (
        [f"  and {len(description['entries']) - 40} more"]
        if len(description["entries"]) > 40
        else []
    )
    is_inseparable = description["order_dependent"] and len(description["edits"]) > 1
    separability_note = ", single ones cannot be removed" if is_inseparable else ""
    lines.append(f"\n{len(description['edits'])} edit(s){separability_note}")
    for edit in description["edits"][:20]:
        num_images_note = f", {len(edit['images'])} image(s)" if edit["images"] else ""
        lines.append(
            f"  {edit['id'] or '(no id)'}  prompt {edit['prompt'][:12] or '-'}{num_images_note}"
        )
    lines += (
        [f"  and {len(description['edits']) - 20} more"] if len(description["edits"]) > 20 else []
    )
    return "\n".join(lines)


def _norms(path: Path) -> dict[str, float]:
    from errata.functional import load_delta
    from errata.functional.deltas.weight_change import inner_product
    from errata.functional.kinds.common.algebra import entries_of

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
    from errata.functional.deltas import shards

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
    from errata.functional.deltas.fusing import mismatched_parameters

    delta = load_delta(options.file)
    findings = ["digest correct, all values finite"]
    if options.base:
        mismatches = list(mismatched_parameters(delta, parameters))
        if mismatches:
            raise BaseMismatchError(
                f"{options.file} was made for {delta.header.base.id}; {options.base} has other "
                f"values in {join_messages(mismatches)}."
            )
        known = sum(e.name in delta.header.base.parameter_hashes for e in delta.header.entries)
        findings.append(f"the base has the values it was made for ({known} parameter(s) hashed)")
    return findings


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
