"""Valid delta files, and the many ways of making them invalid: what the fuzzing runs feed.

Most mutations forge one thing and sign the result again, with a digest that fits, as a hostile
author would: the reader must find the fault in the content, not only that it changed.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from errata.functional import (
    Base,
    Delta,
    Dense,
    EditRecord,
    Experts,
    Header,
    LowRank,
    Masked,
    Prompt,
    Scope,
)
from errata.functional.entries import Sizes
from errata.functional.io import view
from errata.functional.peek import KEY
from errata.functional.safe import canonical

__all__ = ["MUTATIONS", "NASTY", "File", "apart", "flip", "mutate", "sample", "signed"]


def sample(seed: int) -> Delta:
    """A small valid delta: low-rank and dense entries, several edits, one of three dtypes."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    count = draw.randint(1, 4)
    entries: list[Any] = []
    for layer in range(draw.randint(1, 3)):
        name = f"model.language_model.layers.{layer}.mlp.down_proj.weight"
        rows = tuple(draw.randint(1, 2) for _ in range(count))
        entries.append(
            LowRank(
                name=name,
                checkpoint=name.replace("model.language_model", "language_model.model"),
                shape=(draw.randint(2, 9), draw.randint(2, 9)),
                rank=sum(rows),
                rows=draw.choice([rows, ()]),
                transposed=draw.random() < 0.3,
            )
        )
    entries.append(Dense(name="lm_head.bias", checkpoint="lm_head.bias", shape=(5,)))
    if seed > 9 and seed % 4 == 3:  # not among those that are stacked or exported
        entries.append(_experts(draw, count))
    if seed > 9 and seed % 4 == 1:
        entries.append(_masked(draw, count))
    if seed > 9 and seed % 4 == 2:
        entries.append(_scope(draw, count))
    if draw.random() < 0.3:
        entries.append(_memory(count, draw))
    header = Header(
        editor="sample",
        settings={"rate": 1e-4, "steps": 20, "note": "é", "layers": [1, 2, None]},
        base=Base(
            id="someone/model",
            family="llava",
            config="0" * 64,
            touched={entry.name: f"{k:064x}" for k, entry in enumerate(entries)},
        ),
        form=draw.choice(["act", "act_fp32", "weight"]),
        entries=tuple(entries),
        edits=tuple(
            EditRecord(id=f"edit-{k}", prompt=f"{k:064x}", target="f" * 64, images=("a" * 64,))
            for k in range(count)
        ),
    )
    tensors = {name: _values(want, shape, dtype) for name, (want, shape) in
               header.tensors().items()}  # fmt: skip
    return Delta(header, tensors)


def _values(want: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    whole = {"U8": torch.uint8, "I64": torch.int64}
    if want[0] in whole:
        return torch.ones(shape, dtype=whole[want[0]])
    return torch.randn(shape).to(dtype)


def _memory(count: int, draw: random.Random) -> Prompt:
    """A memory of facts in words, with or without pictures."""
    name = "model.language_model.embed_tokens.weight"
    return Prompt(
        name=name,
        checkpoint=name,
        shape=(7, 4),
        facts=tuple(f"fact {k}: <image> é\n" for k in range(count)),
        num_facts=count,
        owners=tuple(range(count)),
        encoder="hashed:8",
        width=8,
        look=draw.choice([0, 4]),
        num_shown=draw.choice([0, 1]),
        shown_bytes=16,
        k=2,
    )


def _experts(draw: random.Random, count: int) -> Experts:
    name = "model.language_model.layers.9.mlp.down_proj.weight"
    return Experts(
        name=name, checkpoint=name, shape=(4, 6), num_experts=count, owners=tuple(range(count)),
        rank=draw.randint(1, 3), hidden=4, slots=2, width=4, heads=2, sentinel=2, sentinel_text=1,
        blend=draw.choice(["query", "both"]), most=draw.randint(0, 2),
    )  # fmt: skip


def _masked(draw: random.Random, count: int) -> Masked:
    name = "model.language_model.layers.8.mlp.up_proj.weight"
    owners = tuple(draw.randrange(2) for _ in range(count))
    return Masked(name=name, checkpoint=name, shape=(4, 6), counts=(3, 3), owners=owners)


def _scope(draw: random.Random, count: int) -> Scope:
    name = "model.language_model.lm_head.weight"
    sizes = Sizes(
        model=4, width=4, heads=2, classifier=1, counterfactual=draw.randint(1, 2), inner=3, key=2,
        looks=1,
    )  # fmt: skip
    return Scope(
        name=name, checkpoint=name, shape=(7, 4), sizes=sizes, slots=count, replies=2, prompts=3,
        owners=tuple(range(count)), gate=draw.choice(["soft", "hard"]),
    )  # fmt: skip


class File(NamedTuple):
    """A safetensors file taken apart, so that its parts can be forged one by one."""

    table: dict[str, Any]  # name -> {dtype, shape, data_offsets}
    meta: dict[str, Any]  # what stands under the one metadata key
    data: bytes


def apart(raw: bytes) -> File:
    """A file as its parts."""
    size = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + size])
    meta = json.loads(table.pop("__metadata__")[KEY])
    return File(table, meta, raw[8 + size :])


def _joined(file: File, *, text: str | None = None, pad: bool = True) -> bytes:
    head = {"__metadata__": {KEY: canonical(file.meta) if text is None else text}, **file.table}
    raw = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    raw += b" " * (-len(raw) % 8 if pad else 0)
    return struct.pack("<Q", len(raw)) + raw + file.data


def signed(file: File) -> bytes:
    """The file with a digest that fits its (forged) content, as a hostile author would make it."""

    body = {**file.meta, "digest": ""}
    state = hashlib.sha256(canonical(body).encode("utf-8", "replace") + b"\n")
    for name in sorted(file.table):
        slot = file.table[name]
        line = canonical([name, slot["dtype"], slot["shape"]])
        start, stop = slot["data_offsets"]
        state.update(line.encode("utf-8", "replace") + b"\n" + file.data[start:stop])
    return _joined(file._replace(meta={**body, "digest": state.hexdigest()}))


NASTY: list[Any] = [
    None, True, -1, 0, 1, 2, 2**31, 2**32, 2**63, 2**64, 10**40, -(2**63), 0.5, 1e308, "", "F32",
    "F64", "I8", "BOOL", "F4", "x" * 5000, "../../etc/passwd", "/etc/passwd", "C:\\x", "a\x00b",
    "\u202e", "\ud800", [], [[]], {}, {"a": {}}, [0, 0], [0, 2**62], [2**40, 2**40], [-1, 4],
]  # fmt: skip

NAMES = ["", ".", "..", "/etc/passwd", "../x", "a/b", "a\\b", "a..b", "a\nb", "a\x00b", "~", "a b",
         "C:\\w", "w" * 4000, "é", "__class__", "__metadata__", "file:///x", "\u202ea"]  # fmt: skip


def flip(raw: bytes, draw: random.Random) -> bytes:
    """A few bits turned over, anywhere."""
    out = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _flip_head(raw: bytes, draw: random.Random) -> bytes:
    out = bytearray(raw)
    size = struct.unpack("<Q", raw[:8])[0]
    for _ in range(draw.choice([1, 1, 1, 3])):
        out[draw.randrange(8 + size)] ^= 1 << draw.randrange(8)
    return bytes(out)


def _smash(raw: bytes, draw: random.Random) -> bytes:
    at, run = draw.randrange(len(raw)), draw.randint(1, 64)
    return raw[:at] + draw.randbytes(run) + raw[at + run :]


def _cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def _append(raw: bytes, draw: random.Random) -> bytes:
    return raw + draw.randbytes(draw.randint(1, 64))


def _splice(raw: bytes, draw: random.Random) -> bytes:
    a, b, c = (draw.randrange(len(raw)) for _ in range(3))
    return raw[:a] + raw[min(b, c) : max(b, c)] + raw[a:]


def _length(raw: bytes, draw: random.Random) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    lies = [0, 1, 7, size - 1, size + 1, len(raw), len(raw) - 8, 2**31, 2**63, 2**64 - 1, 10**8]
    return struct.pack("<Q", draw.choice(lies) % 2**64) + raw[8:]


def _slot(raw: bytes, draw: random.Random) -> bytes:
    """A lie about one tensor's dtype, shape or place, with a digest that fits where one can."""
    file = apart(raw)
    slot = file.table[draw.choice(sorted(file.table))]
    field = draw.choice(["dtype", "shape", "data_offsets", "extra"])
    start, stop = slot["data_offsets"]
    lies: dict[str, list[Any]] = {
        "dtype": ["F32", "BF16", "F16", "I16", "U16", "F64", "BOOL", "F8_E4M3", *NASTY],
        "shape": [slot["shape"][::-1], [*slot["shape"], 1], [1] * 40, [0], [], *NASTY],
        "data_offsets": [
            [stop, start], [start + 1, stop + 1], [start, stop - 1], [0, stop], [start, 2**63],
            [-8, stop], [start], [start, stop, stop], *NASTY,
        ],
        "extra": NASTY,
    }  # fmt: skip
    slot[field] = draw.choice(lies[field])
    try:
        return signed(file)
    except (TypeError, ValueError, KeyError):
        return _joined(file)


def _value(raw: bytes, draw: random.Random) -> bytes:
    """A forged value somewhere in the delta's description, signed."""
    file = apart(raw)
    node: Any = file.meta
    while True:
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        if draw.random() < 0.15 and isinstance(node, dict):
            del node[key]
        elif draw.random() < 0.1 and isinstance(node, dict):
            node[draw.choice(NAMES)] = draw.choice(NASTY)
        else:
            node[key] = draw.choice(NASTY)
        return signed(file)


def _named(raw: bytes, draw: random.Random) -> bytes:
    """A path-like or otherwise wrong parameter name, the same everywhere, signed."""
    file = apart(raw)
    entry = draw.choice(file.meta["entries"])
    old, new = entry["name"], draw.choice(NAMES)
    entry[draw.choice(["name", "checkpoint"])] = new
    for suffix in ("", ".A", ".B"):
        if old + suffix in file.table and entry["name"] == new:
            file.table[new + suffix] = file.table.pop(old + suffix)
    return signed(file) if "__metadata__" not in file.table else _joined(file)


def _twice(raw: bytes, draw: random.Random) -> bytes:
    """A name given twice, in the table or in the description."""
    file = apart(raw)
    if draw.random() < 0.5:
        text = canonical(file.meta)
        return _joined(file, text=text[:-1] + ',"format":1}')
    name = draw.choice(sorted(file.table))
    head = json.dumps({"__metadata__": {KEY: canonical(file.meta)}, **file.table})
    head = head[:-1] + "," + json.dumps({name: file.table[name]})[1:]
    return struct.pack("<Q", len(head.encode())) + head.encode() + file.data


def _loose(raw: bytes, draw: random.Random) -> bytes:
    """The same description in JSON that is not canonical."""
    file = apart(raw)
    text = canonical(file.meta)
    ways = [
        json.dumps(file.meta), text + " ", text.replace("é", "\\u00e9"), text.replace("20", "20.0"),
        text.replace("0.0001", "1e-4"), text.replace("null", "NaN"), text.replace("20", "0020"),
        text.replace("null", "Infinity"), text.replace('"stack":0', '"stack":-0'),
        text.replace("20", "9" * 5000), "\ufeff" + text,
    ]  # fmt: skip
    return _joined(file, text=draw.choice(ways))


def _deep(raw: bytes, draw: random.Random) -> bytes:
    """JSON that is nested deep or very long, in the table or in the description."""
    file = apart(raw)
    many = draw.choice([200, 2000, 100_000])
    bomb = draw.choice(
        [
            "[" * many + "]" * many,
            '{"a":' * many + "1" + "}" * many,
            "[" + "[]," * many + "[]]",
            '"' + "\\u0041" * many + '"',
            "[" + ",".join(f'{{"k{k}":[]}}' for k in range(min(many, 20000))) + "]",
        ]
    )
    text = canonical(file.meta)
    if draw.random() < 0.5:
        return _joined(file, text=text.replace('"note":"é"', '"note":' + bomb))
    head = f'{{"x":{bomb},"__metadata__":{json.dumps({KEY: text})}}}'.encode()
    return struct.pack("<Q", len(head)) + head + file.data


def _nonfinite(raw: bytes, draw: random.Random) -> bytes:
    """NaN or infinity among the values, signed."""
    file = apart(raw)
    name = draw.choice(sorted(n for n, slot in file.table.items() if "F" in slot["dtype"]))
    slot = file.table[name]
    data = bytearray(file.data)
    x = view(data, slot["dtype"], tuple(slot["shape"]), slot["data_offsets"][0]).view(-1)
    x[draw.randrange(x.numel())] = draw.choice([float("nan"), float("inf"), float("-inf")])
    return signed(file._replace(data=bytes(data)))


def _keys(raw: bytes, draw: random.Random) -> bytes:
    """Other metadata keys than the one."""
    size = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + size])
    table["__metadata__"] = draw.choice(
        [{}, {"format": "pt"}, {**table["__metadata__"], "format": "pt"}, [], "x", {KEY: 1}, None]
    )
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def _foreign(raw: bytes, draw: random.Random) -> bytes:
    """Another kind of file altogether: pickles that would run code, zips, nothing at all."""
    return draw.choice(
        [b"", b"\x80\x04cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", b"PK\x03\x04" + raw,
         b"\x00" * 64, b"\xff" * 64, b"GGUF" + raw, struct.pack("<Q", 2) + b"{}", raw[8:],
         struct.pack("<Q", 16) + b'{"__metadata__":' + raw]
    )  # fmt: skip


def _based(raw: bytes, draw: random.Random) -> bytes:
    """The delta as if made for another base, signed."""
    file = apart(raw)
    base = file.meta["base"]
    if draw.random() < 0.5:
        base["config"] = draw.randbytes(32).hex()
    else:
        base["touched"][draw.choice(sorted(base["touched"]))] = draw.randbytes(32).hex()
    return signed(file)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flips": flip,
    "bit flips in the header": _flip_head,
    "bytes overwritten": _smash,
    "cut short": _cut,
    "appended": _append,
    "spliced": _splice,
    "header length": _length,
    "dtype, shape, offsets": _slot,
    "description": _value,
    "names": _named,
    "duplicate names": _twice,
    "not canonical": _loose,
    "deep or long JSON": _deep,
    "NaN and inf": _nonfinite,
    "metadata keys": _keys,
    "other files": _foreign,
    "another base": _based,
}


def mutate(raw: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One mutation, by name, and the mutated file."""
    kind = draw.choice(list(MUTATIONS))
    out = MUTATIONS[kind](raw, draw)
    if draw.random() < 0.1:
        out = flip(out, draw) if out else out
    return kind, out
