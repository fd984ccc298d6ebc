"""Feed mutated adapters and checkpoints to `from_peft` and `fold`: as `fuzz_delta`, for folders.

`python -m errata.bench.fuzz_folders --files 20000`. Every folder must be refused with an
ErrataError that names a file of it, or give a delta that can be saved, or a whole checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import torch

from errata.adapters.peft import from_peft, to_peft
from errata.functional import save
from errata.functional.errors import ErrataError
from errata.functional.fold import fold

from .fuzz_delta import Outcome
from .hostile import NASTY, flip, sample
from .kill_delta import checkpoint, edit

__all__ = ["fuzz_folders"]


def _bytes(raw: bytes, draw: random.Random) -> bytes:
    way = draw.randrange(5)
    if way == 0:
        return flip(raw, draw)
    if way == 1:
        return raw[: draw.randrange(len(raw))]
    if way == 2:
        at = draw.randrange(len(raw))
        return raw[:at] + draw.randbytes(draw.randint(1, 40)) + raw[at:]
    if way == 3:
        return struct.pack("<Q", draw.choice([0, 1, len(raw), 2**40, 2**64 - 1])) + raw[8:]
    return draw.choice([b"", b"[" * 50_000, b"\x80\x04cposix\nsystem\n.", b"null", b"\xff" * 99])


def _value(raw: bytes, draw: random.Random) -> bytes:
    """A nasty value somewhere in a JSON file."""
    body = json.loads(raw)
    node: Any = body
    while True:
        if not node:
            return raw
        key = draw.choice(sorted(node)) if isinstance(node, dict) else draw.randrange(len(node))
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.7:
            node = node[key]
            continue
        node[key] = draw.choice(NASTY)
        return json.dumps(body).encode("utf-8", "replace")


def _table(raw: bytes, draw: random.Random) -> bytes:
    """A lie in a safetensors header, or NaN among the values."""
    size = struct.unpack("<Q", raw[:8])[0]
    if draw.random() < 0.3:
        data = bytearray(raw)
        at = 8 + size + 4 * draw.randrange((len(raw) - 8 - size) // 4)
        data[at : at + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf")]))
        return bytes(data)
    head = _value(raw[8 : 8 + size], draw)
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def _mutated(path: Path, draw: random.Random) -> bytes:
    raw = path.read_bytes()
    if draw.random() < 0.4:
        return _bytes(raw, draw)
    return (_table if path.suffix == ".safetensors" else _value)(raw, draw)


def _import(place: Path, draw: random.Random) -> None:
    save(place / "out.safetensors", from_peft(place / "case"))


def _fold(place: Path, draw: random.Random) -> None:
    fold(edit(0), place / "case", place / "out")
    names = {path.name for path in (place / "case").iterdir()}
    assert {path.name for path in (place / "out").iterdir()} == names | {"errata.json"}


def fuzz_folders(files: int, seed: int = 0, folder: Path | None = None) -> Outcome:
    """Import and fold `files` folders in each of which one file is mutated or missing."""
    draw = random.Random(seed)
    outcome = Outcome(Counter(), Counter(), 0.0, [])
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        delta = sample(2)
        entries = tuple(e for e in delta.header.entries if e.name != "lm_head.bias")
        header = msgspec.structs.replace(delta.header, entries=entries, form="act")
        to_peft(delta._replace(header=header), place / "adapter")
        checkpoint(place / "checkpoint")
        for number in range(files):
            kind, run = draw.choice([("adapter", _import), ("checkpoint", _fold)])
            for old in ("case", "out"):
                shutil.rmtree(place / old, ignore_errors=True)
            shutil.copytree(place / kind, place / "case")
            if kind == "adapter" and draw.random() < 0.7:
                (place / "case" / "errata.json").unlink()
            target = draw.choice(sorted(p for p in (place / "case").iterdir() if p.suffix != ".md"))
            if draw.random() < 0.05:
                target.unlink()
            else:
                target.write_bytes(_mutated(target, draw))
            began = time.process_time()
            try:
                run(place, draw)
                outcome.loaded[kind] += 1
            except ErrataError as error:
                outcome.refused[kind] += 1
                named = str(place / "case") in str(error) or "out" in str(error)
                if not named or not str(error).isprintable():
                    outcome.bad.append(f"{number} ({kind}, {target.name}): {str(error)[:200]!r}")
                if (place / "out").exists():
                    outcome.bad.append(f"{number} ({kind}): refused, but wrote a folder")
            except BaseException as error:  # noqa: BLE001 - anything else is a finding
                said = f"{type(error).__name__}: {str(error)[:200]}"
                outcome.bad.append(f"{number} ({kind}, {target.name}): {said}")
            slowest = max(slowest, time.process_time() - began)
    return outcome._replace(slowest=slowest)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    outcome = fuzz_folders(args.files, args.seed)
    sys.stdout.write(
        f"{args.files} folders, refused {dict(outcome.refused)}, taken {dict(outcome.loaded)}, "
        f"{len(outcome.bad)} findings, slowest {outcome.slowest * 1e3:.0f} ms\n"
    )
    for line in outcome.bad[:20]:
        sys.stdout.write(line + "\n")
    return 1 if outcome.bad else 0


if __name__ == "__main__":
    sys.exit(main())
