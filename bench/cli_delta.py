"""The verbs of `errata` that work on delta files.

`show` and `check` read headers only and import no torch, so that a delta of a gigabyte is looked at
in a blink; everything heavier is imported by the verb that needs it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from errata.functional.errors import BadInput, BaseMismatch, listed
from errata.functional.header import LowRank
from errata.functional.peek import Peek, peek

__all__ = ["register"]


def register(verbs: Any) -> None:
    """Add the verbs to the subparsers of `errata`."""
    show = _verb(verbs, "show", _show, "what a delta file changes, and for which edits")
    _file(show)
    show.add_argument("--norms", action="store_true", help="read the values, too: |dW| of each")
    show.add_argument("--json", action="store_true", help="for programs")

    check = _verb(verbs, "check", _check, "whether a delta file is sound, and fits a checkpoint")
    _file(check)
    check.add_argument("--base", type=Path, help="folder of the checkpoint it is meant for")
    check.add_argument(
        "--values", action="store_true", help="read every value: digest, NaN, the base's hashes"
    )

    merge = _verb(verbs, "merge", _merge, "one delta that does what several do")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _out(merge)

    remove = _verb(verbs, "remove", _remove, "take single edits out of a delta")
    _file(remove)
    remove.add_argument("edits", nargs="+", metavar="EDIT", help="by id, or #n for the n-th (0, 1)")
    _out(remove)

    diff = _verb(verbs, "diff", _diff, "how two deltas differ, and which edits conflict")
    diff.add_argument("left", type=Path, metavar="FILE")
    diff.add_argument("right", type=Path, metavar="FILE")
    diff.add_argument("--json", action="store_true", help="for programs")

    export = _verb(verbs, "export", _export, "write a delta as a PEFT LoRA folder")
    _file(export)
    export.add_argument("-o", "--out", type=Path, required=True, help="the folder to make")
    export.add_argument("--profile", choices=["peft", "serving"], default="peft")
    export.add_argument("--base", type=Path, help="checkpoint folder, for the shapes of siblings")
    export.add_argument("--rank", type=int, help="compress to this rank first; says what is lost")

    take = _verb(verbs, "import", _import, "read a PEFT LoRA folder as a delta")
    take.add_argument("folder", type=Path)
    take.add_argument("--model", help="micro/NAME, a folder or a hub id: checks names and shapes")
    take.add_argument("--form", choices=["act", "act_fp32", "weight"])
    _out(take)

    fold = _verb(verbs, "fold", _fold, "write a new checkpoint with the delta in its weights")
    _file(fold)
    fold.add_argument("--base", type=Path, required=True, help="folder of the checkpoint")
    fold.add_argument("-o", "--out", type=Path, required=True, help="the folder to make")
    fold.add_argument("--no-check", action="store_true", help="do not compare the base's hashes")

    apply = _verb(verbs, "apply", _apply, "ask a model one question with and without a delta")
    _file(apply)
    apply.add_argument("--model", required=True, help="micro/NAME, a folder, or a hub id")
    apply.add_argument("--prompt", required=True)
    apply.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    apply.add_argument("--tokens", type=int, default=32, help="longest answer")
    apply.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    apply.add_argument("--device", default="cpu")


def _verb(verbs: Any, name: str, function: Any, words: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.set_defaults(verb=function)
    return parser


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a delta file")


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, help="the delta file to write")


# Looking.


def _show(options: argparse.Namespace) -> None:
    found = peek(options.file)
    facts = _facts(options.file, found, _norms(options.file) if options.norms else {})
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else _page(facts))


def _facts(path: Path, found: Peek, norms: dict[str, float]) -> dict[str, Any]:
    header = found.header
    entries = []
    for entry in header.entries:
        slots = [found.slots[name] for name in entry.tensors()]
        entries.append(
            {
                "parameter": entry.name,
                "checkpoint": getattr(entry, "checkpoint", None),
                "kind": type(entry).__name__.lower(),
                "shape": list(getattr(entry, "shape", slots[0].shape)),
                "rank": getattr(entry, "rank", None),
                "dtype": slots[0].dtype,
                "bytes": sum(slot.nbytes for slot in slots),
                "norm": norms.get(entry.name),
                "base_known": entry.name in header.base.touched,
            }
        )
    edits = []
    for number, edit in enumerate(header.edits):
        rows = {e.name: e.rows[number] for e in header.entries if isinstance(e, LowRank) and e.rows}
        edits.append(
            {
                "id": edit.id,
                "prompt": edit.prompt,
                "target": edit.target,
                "images": list(edit.images),
                "rows": rows,
            }
        )
    return {
        "file": path.name,
        "bytes": found.size,
        "digest": found.digest,
        "format": header.format,
        "editor": header.editor,
        "settings": header.settings,
        "form": header.form,
        "stack": header.stack,
        "recursive": header.recursive,
        "base": {
            "id": header.base.id,
            "revision": header.base.revision,
            "family": header.base.family,
            "config": header.base.config,
        },
        "entries": entries,
        "edits": edits,
    }


def _page(facts: dict[str, Any]) -> str:
    base = facts["base"]
    how = {"act": "beside the linear maps", "act_fp32": "beside them, in fp32"}
    lines = [
        f"{facts['file']}  {_size(facts['bytes'])}  sha256 {facts['digest'][:16]}",
        f"base    {base['id']}" + (f" @ {base['revision'][:12]}" if base["revision"] else "")
        + (f" ({base['family']})" if base["family"] else ""),
        f"editor  {facts['editor'] or 'not named'}"
        + (f", {facts['stack']} edits side by side" if facts["stack"] else ""),
        f"form    {facts['form']}: {how.get(facts['form'], 'added to the weights')}",
    ]  # fmt: skip
    if facts["settings"]:
        pairs = ", ".join(f"{k}={_brief(v)}" for k, v in facts["settings"].items())
        lines.append(f"with    {pairs}")
    lines.append(f"\nchanges {len(facts['entries'])} parameter(s)")
    for entry in facts["entries"][:40]:
        rank = f" of rank {entry['rank']}" if entry["rank"] else ""
        norm = f"  |dW| {entry['norm']:.4g}" if entry["norm"] is not None else ""
        shape = " x ".join(map(str, entry["shape"]))
        lines.append(
            f"  {entry['parameter']}  {shape}  {entry['kind']}{rank}, {entry['dtype']}, "
            f"{_size(entry['bytes'])}{norm}{'' if entry['base_known'] else '  (base not hashed)'}"
        )
    lines += [f"  and {len(facts['entries']) - 40} more"] if len(facts["entries"]) > 40 else []
    together = facts["recursive"] and len(facts["edits"]) > 1
    alone = ", single ones can not be removed" if together else ""
    lines.append(f"\n{len(facts['edits'])} edit(s){alone}")
    for edit in facts["edits"][:20]:
        pictures = f", {len(edit['images'])} picture(s)" if edit["images"] else ""
        lines.append(f"  {edit['id'] or '(no id)'}  prompt {edit['prompt'][:12] or '-'}{pictures}")
    lines += [f"  and {len(facts['edits']) - 20} more"] if len(facts["edits"]) > 20 else []
    return "\n".join(lines)


def _norms(path: Path) -> dict[str, float]:
    from errata.functional import load
    from errata.functional.kinds import inner, parts

    delta = load(path)
    if delta.header.stack:
        raise BadInput(f"{path}: norms are of one edit, and this delta holds several side by side.")
    return {part.entry.name: float(inner(part, part)) ** 0.5 for part in parts(delta).values()}


def _check(options: argparse.Namespace) -> None:
    from errata.functional import shards

    found = peek(options.file)
    said = [f"{options.file.name}: header sound, {len(found.header.entries)} parameter(s)"]
    have = {}
    if options.base:
        have = shards.parameters(options.base)
        wrong = shards.misfits(found.header, have, shards.family_in(options.base))
        if wrong:
            raise BaseMismatch(f"{options.file} does not fit {options.base}: {listed(wrong)}.")
        said.append(f"names, shapes and family fit {options.base}")
    if options.values:
        said += _deep(options, have)
    else:
        said.append("values not read (--values does)")
    print("; ".join(said) + ".")


def _deep(options: argparse.Namespace, have: Any) -> list[str]:
    from errata.functional import load
    from errata.functional.fold import strangers

    delta = load(options.file)
    said = ["digest right, all values finite"]
    if options.base:
        wrong = list(strangers(delta, have))
        if wrong:
            raise BaseMismatch(
                f"{options.file} was made for {delta.header.base.id}; in {options.base} other "
                f"values are held by {listed(wrong)}."
            )
        known = sum(e.name in delta.header.base.touched for e in delta.header.entries)
        said.append(f"the base's values are those it was made for ({known} parameter(s) hashed)")
    return said


def _diff(options: argparse.Namespace) -> None:
    from errata.functional import conflicts, diff, load

    left, right = load(options.left), load(options.right)
    apart, clashes = diff(left, right), conflicts(left, right)
    if options.json:
        facts = {
            "parameters": [item._asdict() for item in apart],
            "conflicts": [item._asdict() for item in clashes],
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for item in apart:
        print(
            f"{item.name}  |left| {item.left:.4g}  |right| {item.right:.4g}  "
            f"apart {item.apart:.4g}  cosine {item.cosine:.4f}"
        )
    for item in clashes:
        where = f" at {item.where} (cosine {item.score:.3f})" if item.where else ""
        print(f"edit {item.ids[1]} {item.what} edit {item.ids[0]}{where}")
    if all(item.apart == 0 for item in apart):
        print("the same change")


# Making.


def _merge(options: argparse.Namespace) -> None:
    from errata.functional import load, merge, save

    merged = merge(*(load(path) for path in options.files))
    save(options.out, merged)
    print(f"{options.out}: {len(merged.header.edits)} edit(s), {_size(_bytes(options.out))}")


def _remove(options: argparse.Namespace) -> None:
    from errata.functional import load, remove, save

    wrong = [e for e in options.edits if e.startswith("#") and not e[1:].isdecimal()]
    if wrong:
        raise BadInput(f"an edit is named by its id, or by # and its number, got {listed(wrong)}.")
    left = remove(
        load(options.file), [int(e[1:]) if e.startswith("#") else e for e in options.edits]
    )
    save(options.out, left)
    print(f"{options.out}: {len(left.header.edits)} edit(s), {_size(_bytes(options.out))}")


def _export(options: argparse.Namespace) -> None:
    from errata.adapters.peft import to_peft
    from errata.functional import compress, load, shards

    delta = load(options.file)
    if options.rank is not None:
        delta, lost = compress(delta, rank=options.rank)
        for name, share in lost.items():
            print(f"{name}: {share:.2%} of its energy lost")
    shapes = None
    if options.base:
        shapes = {name: place.slot.shape for name, place in shards.parameters(options.base).items()}
    export = to_peft(delta, options.out, options.profile, shapes=shapes)
    for note in export.notes:
        print(f"note: {note}")
    print(f"{export.folder}: load with autocast_adapter_dtype={export.autocast_adapter_dtype}")


def _import(options: argparse.Namespace) -> None:
    from errata.adapters.peft import from_peft
    from errata.functional import save

    model = _model(options.model) if options.model else None
    delta = from_peft(options.folder, model, form=options.form)
    save(options.out, delta)
    print(f"{options.out}: {len(delta.header.entries)} parameter(s), {_size(_bytes(options.out))}")


def _fold(options: argparse.Namespace) -> None:
    from errata.functional import load
    from errata.functional.fold import fold

    out = fold(load(options.file), options.base, options.out, check=not options.no_check)
    print(f"{out}: a checkpoint that any loader of {options.base} loads")


def _apply(options: argparse.Namespace) -> None:
    from errata.adapters.images import picture
    from errata.functional import Query, bind, load
    from errata.functional.generate import generate

    if not options.prompt.strip() or options.tokens < 1:
        raise BadInput("--prompt must ask something, and --tokens be at least 1.")
    delta = load(options.file)
    query = Query(options.prompt, "", tuple(map(picture, options.image)))
    model = _model(options.model, options.dtype, options.device)
    for what, one in (("without", model), ("with", bind(model, delta))):
        print(f"{what + ':':9}{generate(one, [query], options.tokens)[0].strip()}")


def _model(name: str, dtype: Any = "auto", device: str = "cpu") -> Any:
    from .settings import ModelChoice
    from .sources import open_model

    return open_model(ModelChoice(id=name, dtype=dtype, device=device))


def _bytes(path: Path) -> int:
    return path.stat().st_size


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
