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

from errata.functional.deltas.inspection import METADATA_KEY
from errata.functional.deltas.safetensors_header import canonical_json
from errata.functional.deltas.serialization import tensor_view

__all__ = [
    "MALICIOUS_NAMES",
    "MALICIOUS_VALUES",
    "MUTATIONS",
    "SplitFile",
    "flip_bits",
    "mutate",
    "split_file",
    "with_valid_digest",
]


class SplitFile(NamedTuple):
    """A safetensors file taken apart, so that its parts can be forged one by one."""

    tensor_table: dict[str, Any]  # name -> {dtype, shape, data_offsets}
    metadata: dict[str, Any]  # what stands under the one metadata key
    data: bytes


def split_file(raw: bytes) -> SplitFile:
    """Split a delta file into its parts.

    Args:
        raw: The file.

    Returns:
        Tensor table, metadata and data.
    """
    size = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + size])
    meta = json.loads(table.pop("__metadata__")[METADATA_KEY])
    return SplitFile(table, meta, raw[8 + size :])


def _serialize(file: SplitFile, *, text: str | None = None, pad: bool = True) -> bytes:
    head = {
        "__metadata__": {METADATA_KEY: canonical_json(file.metadata) if text is None else text},
        **file.tensor_table,
    }
    raw = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    raw += b" " * (-len(raw) % 8 if pad else 0)
    return struct.pack("<Q", len(raw)) + raw + file.data


def with_valid_digest(file: SplitFile) -> bytes:
    """Serialise a forged file with a digest that fits it, as a hostile author would.

    Args:
        file: The parts.

    Returns:
        The file.
    """

    body = {**file.metadata, "digest": ""}
    state = hashlib.sha256(canonical_json(body).encode("utf-8", "replace") + b"\n")
    for name in sorted(file.tensor_table):
        slot = file.tensor_table[name]
        line = canonical_json([name, slot["dtype"], slot["shape"]])
        start, stop = slot["data_offsets"]
        state.update(line.encode("utf-8", "replace") + b"\n" + file.data[start:stop])
    return _serialize(file._replace(metadata={**body, "digest": state.hexdigest()}))


MALICIOUS_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    2**31,
    2**32,
    2**63,
    2**64,
    10**40,
    -(2**63),
    0.5,
    1e308,
    "",
    "F32",
    "F64",
    "I8",
    "BOOL",
    "F4",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "a\x00b",
    "\u202e",
    "\ud800",
    [],
    [[]],
    {},
    {"a": {}},
    [0, 0],
    [0, 2**62],
    [2**40, 2**40],
    [-1, 4],
]

MALICIOUS_NAMES = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../x",
    "a/b",
    "a\\b",
    "a..b",
    "a\nb",
    "a\x00b",
    "~",
    "a b",
    "C:\\w",
    "w" * 4000,
    "é",
    "__class__",
    "__metadata__",
    "file:///x",
    "\u202ea",
]


def flip_bits(raw: bytes, draw: random.Random) -> bytes:
    """Flip a few bits anywhere.

    Args:
        raw: The file.
        draw: Source of randomness.

    Returns:
        The mutated file.
    """
    out = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _flip_header_bits(raw: bytes, draw: random.Random) -> bytes:
    out = bytearray(raw)
    size = struct.unpack("<Q", raw[:8])[0]
    for _ in range(draw.choice([1, 1, 1, 3])):
        out[draw.randrange(8 + size)] ^= 1 << draw.randrange(8)
    return bytes(out)


def _overwrite_bytes(raw: bytes, draw: random.Random) -> bytes:
    at, run = draw.randrange(len(raw)), draw.randint(1, 64)
    return raw[:at] + draw.randbytes(run) + raw[at + run :]


def _truncate(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def _append_bytes(raw: bytes, draw: random.Random) -> bytes:
    return raw + draw.randbytes(draw.randint(1, 64))


def _splice_bytes(raw: bytes, draw: random.Random) -> bytes:
    a, b, c = (draw.randrange(len(raw)) for _ in range(3))
    return raw[:a] + raw[min(b, c) : max(b, c)] + raw[a:]


def _forge_header_length(raw: bytes, draw: random.Random) -> bytes:
    size = struct.unpack("<Q", raw[:8])[0]
    lies = [0, 1, 7, size - 1, size + 1, len(raw), len(raw) - 8, 2**31, 2**63, 2**64 - 1, 10**8]
    return struct.pack("<Q", draw.choice(lies) % 2**64) + raw[8:]


def _forge_tensor(raw: bytes, draw: random.Random) -> bytes:
    """A lie about one tensor's dtype, shape or place, with a digest that fits where one can."""
    file = split_file(raw)
    slot = file.tensor_table[draw.choice(sorted(file.tensor_table))]
    field = draw.choice(["dtype", "shape", "data_offsets", "extra"])
    start, stop = slot["data_offsets"]
    lies: dict[str, list[Any]] = {
        "dtype": ["F32", "BF16", "F16", "I16", "U16", "F64", "BOOL", "F8_E4M3", *MALICIOUS_VALUES],
        "shape": [slot["shape"][::-1], [*slot["shape"], 1], [1] * 40, [0], [], *MALICIOUS_VALUES],
        "data_offsets": [
            [stop, start],
            [start + 1, stop + 1],
            [start, stop - 1],
            [0, stop],
            [start, 2**63],
            [-8, stop],
            [start],
            [start, stop, stop],
            *MALICIOUS_VALUES,
        ],
        "extra": MALICIOUS_VALUES,
    }
    slot[field] = draw.choice(lies[field])
    try:
        return with_valid_digest(file)
    except (TypeError, ValueError, KeyError):
        return _serialize(file)


def _forge_value(raw: bytes, draw: random.Random) -> bytes:
    """A forged value somewhere in the delta's description, signed."""
    file = split_file(raw)
    node: Any = file.metadata
    while True:
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        if draw.random() < 0.15 and isinstance(node, dict):
            del node[key]
        elif draw.random() < 0.1 and isinstance(node, dict):
            node[draw.choice(MALICIOUS_NAMES)] = draw.choice(MALICIOUS_VALUES)
        else:
            node[key] = draw.choice(MALICIOUS_VALUES)
        return with_valid_digest(file)


def _odd_key(raw: bytes, draw: random.Random) -> bytes:
    """A key of one's own among the settings or anywhere, with a value like a path, signed."""
    file = split_file(raw)
    places = [file.metadata["settings"], file.metadata, file.metadata["base"]]
    places += file.metadata["entries"]
    node = draw.choice(places[:1] * 3 + places)
    value = draw.choice([*MALICIOUS_NAMES, *MALICIOUS_VALUES])
    for _ in range(draw.choice([0, 0, 1, 3])):
        value = draw.choice([{draw.choice(MALICIOUS_NAMES): value}, [value]])
    node[draw.choice([*MALICIOUS_NAMES, "k", "shared_slots", "shared_edits"])] = value
    return with_valid_digest(file)


def _forge_name(raw: bytes, draw: random.Random) -> bytes:
    """A path-like or otherwise wrong parameter name, the same everywhere, signed."""
    file = split_file(raw)
    entry = draw.choice(file.metadata["entries"])
    old, new = entry["name"], draw.choice(MALICIOUS_NAMES)
    entry[draw.choice(["name", "checkpoint_name"])] = new
    for suffix in ("", ".A", ".B"):
        if old + suffix in file.tensor_table and entry["name"] == new:
            file.tensor_table[new + suffix] = file.tensor_table.pop(old + suffix)
    return with_valid_digest(file) if "__metadata__" not in file.tensor_table else _serialize(file)


def _duplicate_name(raw: bytes, draw: random.Random) -> bytes:
    """A name given twice, in the table or in the description."""
    file = split_file(raw)
    if draw.random() < 0.5:
        text = canonical_json(file.metadata)
        return _serialize(file, text=text[:-1] + ',"format":2}')
    name = draw.choice(sorted(file.tensor_table))
    head = json.dumps(
        {"__metadata__": {METADATA_KEY: canonical_json(file.metadata)}, **file.tensor_table}
    )
    head = head[:-1] + "," + json.dumps({name: file.tensor_table[name]})[1:]
    return struct.pack("<Q", len(head.encode())) + head.encode() + file.data


def _non_canonical_json(raw: bytes, draw: random.Random) -> bytes:
    """The same description in JSON that is not canonical."""
    file = split_file(raw)
    text = canonical_json(file.metadata)
    ways = [
        json.dumps(file.metadata),
        text + " ",
        text.replace("é", "\\u00e9"),
        text.replace("20", "20.0"),
        text.replace("0.0001", "1e-4"),
        text.replace("null", "NaN"),
        text.replace("20", "0020"),
        text.replace("null", "Infinity"),
        text.replace('"stack":0', '"stack":-0'),
        text.replace("20", "9" * 5000),
        "\ufeff" + text,
    ]
    return _serialize(file, text=draw.choice(ways))


def _deep_json(raw: bytes, draw: random.Random) -> bytes:
    """JSON that is nested deep or very long, in the table or in the description."""
    file = split_file(raw)
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
    text = canonical_json(file.metadata)
    if draw.random() < 0.5:
        return _serialize(file, text=text.replace('"note":"é"', '"note":' + bomb))
    head = f'{{"x":{bomb},"__metadata__":{json.dumps({METADATA_KEY: text})}}}'.encode()
    return struct.pack("<Q", len(head)) + head + file.data


def _non_finite_value(raw: bytes, draw: random.Random) -> bytes:
    """NaN or infinity among the values, signed."""
    file = split_file(raw)
    name = draw.choice(sorted(n for n, slot in file.tensor_table.items() if "F" in slot["dtype"]))
    slot = file.tensor_table[name]
    data = bytearray(file.data)
    x = tensor_view(data, slot["dtype"], tuple(slot["shape"]), slot["data_offsets"][0]).view(-1)
    x[draw.randrange(x.numel())] = draw.choice([float("nan"), float("inf"), float("-inf")])
    return with_valid_digest(file._replace(data=bytes(data)))


def _forge_metadata_keys(raw: bytes, draw: random.Random) -> bytes:
    """Other metadata keys than the one."""
    size = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + size])
    table["__metadata__"] = draw.choice(
        [
            {},
            {"format": "pt"},
            {**table["__metadata__"], "format": "pt"},
            [],
            "x",
            {METADATA_KEY: 1},
            None,
        ]
    )
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def _other_file(raw: bytes, draw: random.Random) -> bytes:
    """Another kind of file altogether: pickles that would run code, zips, nothing at all."""
    return draw.choice(
        [
            b"",
            b"\x80\x04cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
            b"PK\x03\x04" + raw,
            b"\x00" * 64,
            b"\xff" * 64,
            b"GGUF" + raw,
            struct.pack("<Q", 2) + b"{}",
            raw[8:],
            struct.pack("<Q", 16) + b'{"__metadata__":' + raw,
        ]
    )


def _forge_base(raw: bytes, draw: random.Random) -> bytes:
    """The delta as if made for another base, signed."""
    file = split_file(raw)
    base = file.metadata["base"]
    if draw.random() < 0.5:
        base["config_hash"] = draw.randbytes(32).hex()
    else:
        base["parameter_hashes"][draw.choice(sorted(base["parameter_hashes"]))] = draw.randbytes(
            32
        ).hex()
    return with_valid_digest(file)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flips": flip_bits,
    "bit flips in the header": _flip_header_bits,
    "bytes overwritten": _overwrite_bytes,
    "cut short": _truncate,
    "appended": _append_bytes,
    "spliced": _splice_bytes,
    "header length": _forge_header_length,
    "dtype, shape, offsets": _forge_tensor,
    "description": _forge_value,
    "odd keys": _odd_key,
    "names": _forge_name,
    "duplicate names": _duplicate_name,
    "not canonical": _non_canonical_json,
    "deep or long JSON": _deep_json,
    "NaN and inf": _non_finite_value,
    "metadata keys": _forge_metadata_keys,
    "other files": _other_file,
    "another base": _forge_base,
}


def mutate(raw: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Apply one random mutation.

    Args:
        raw: The file.
        draw: Source of randomness.

    Returns:
        The mutation's name, and the mutated file.
    """
    kind = draw.choice(list(MUTATIONS))
    out = MUTATIONS[kind](raw, draw)
    if draw.random() < 0.1:
        out = flip_bits(out, draw) if out else out
    return kind, out
