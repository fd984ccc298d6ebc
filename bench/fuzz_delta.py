"""Feed mutated delta files to `load`: `python -m errata.bench.fuzz_delta --files 100000`.

Every file must either be refused with an ErrataError that names it, or load as a delta whose
content is what its digest says. Each is held to one second and to an address space of file size +
64 MB above what the process had; an audit hook sees to it that nothing is imported, unpickled,
executed, written or fetched meanwhile. A run is reproducible from its seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from errata.functional import (
    Base,
    Delta,
    Dense,
    EditRecord,
    Header,
    LowRank,
    load,
    save,
)
from errata.functional.errors import BaseMismatch, ErrataError
from errata.functional.io import digest, view
from errata.functional.merge import same_base
from errata.functional.peek import KEY, peek
from errata.functional.safe import canonical

__all__ = ["MUTATIONS", "NASTY", "Outcome", "apart", "flip", "fuzz", "mutate", "sample", "signed"]

FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "pickle.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "ctypes.",
    "os.remove",
    "os.rename",
    "shutil.",
)


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
    tensors = {name: torch.randn(shape).to(dtype) for name, (_, shape) in header.tensors().items()}
    return Delta(header, tensors)


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
    name = draw.choice(sorted(file.table))
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


class Outcome(NamedTuple):
    """What a run saw; `bad` is empty if the law held."""

    refused: Counter[str]
    loaded: Counter[str]
    slowest: float  # seconds of processor time
    bad: list[str]


def _watch(seen: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if _WATCHING[0] and event.startswith(FORBIDDEN):
            seen.append(f"{event} {str(args)[:80]}")
        if _WATCHING[0] and event == "open" and isinstance(args[1], str) and args[1][:1] in "wax+":
            seen.append(f"open for writing {args[0]!r}")

    return hook


_WATCHING = [False]


def fuzz(files: int, seed: int = 0, folder: Path | None = None, bound: bool = True) -> Outcome:
    """Load `files` mutated files; `bound` also holds each to its share of address space."""
    draw = random.Random(seed)
    originals = []
    outcome = Outcome(Counter(), Counter(), 0.0, [])
    seen: list[str] = []
    sys.addaudithook(_watch(seen))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "hostile.safetensors"
        for number in range(16):
            good = sample(seed * 1000 + number)
            save(path, good)
            originals.append((good, path.read_bytes()))
            load(path)
        slowest = 0.0
        for number in range(files):
            good, raw = draw.choice(originals)
            kind, forged = mutate(raw, draw)
            path.write_bytes(forged)
            limits = resource.getrlimit(resource.RLIMIT_AS)
            if bound:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + len(forged) + (64 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
            _WATCHING[0] = True
            began, spent = time.perf_counter(), time.process_time()
            try:
                fault = _judge(path, kind, good, outcome)
            finally:
                _WATCHING[0] = False
                seconds, wall = time.process_time() - spent, time.perf_counter() - began
                resource.setrlimit(resource.RLIMIT_AS, limits)
            slowest = max(slowest, seconds)
            if seconds > 1 or wall > 20:  # a busy machine may stop us for a while
                fault = f"took {seconds:.2f} s of processor time, {wall:.1f} s in all"
            if fault or seen:
                outcome.bad.append(f"file {number} of seed {seed} ({kind}): {fault or seen[:3]}")
                seen.clear()
    return outcome._replace(slowest=slowest)


def _judge(path: Path, kind: str, good: Delta, outcome: Outcome) -> str:
    """Load a file; "" if it was refused properly or loaded as what it says it is."""
    try:
        delta = load(path)
    except ErrataError as error:
        outcome.refused[kind] += 1
        text = str(error)
        if str(path) not in text:
            return f"the error does not name the file: {text[:200]}"
        return "" if len(text) < 4000 and text.isprintable() else f"unreadable error {text[:80]!r}"
    except BaseException as error:  # noqa: BLE001 - anything but an ErrataError is a finding
        return f"{type(error).__name__}: {str(error)[:200]}"
    if kind == "another base":
        try:
            same_base([good, delta])
        except BaseMismatch:
            outcome.refused[kind] += 1
            return ""
        return "a delta for another base was taken for one of this base"
    outcome.loaded[kind] += 1
    if digest(delta) != peek(path).digest:
        return "the content is not what the digest says"
    if not all(bool(torch.isfinite(x).all()) for x in delta.tensors.values()):
        return "holds values that are not finite"
    return ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    outcome = fuzz(args.files, args.seed)
    seconds = time.perf_counter() - began
    write = sys.stdout.write
    for kind in MUTATIONS:
        write(f"{kind:26} refused {outcome.refused[kind]:7} loaded {outcome.loaded[kind]:6}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    write(
        f"{args.files} files, {sum(outcome.refused.values())} refused, "
        f"{sum(outcome.loaded.values())} loaded, {len(outcome.bad)} findings; slowest "
        f"{outcome.slowest * 1e3:.0f} ms, {seconds:.0f} s in all, peak {peak} MB\n"
    )
    for line in outcome.bad[:20]:
        write(line + "\n")
    return 1 if outcome.bad else 0


if __name__ == "__main__":
    sys.exit(main())
