"""Feed mutated adapters and checkpoints to `import_peft` and `fuse`: as `fuzz_delta`, for folders.

`python -m errata.bench.robustness.fuzz_folders --files 20000`. Every folder must be refused with an
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

from errata.adapters.interop.peft_export import export_peft
from errata.adapters.interop.peft_import import import_peft
from errata.bench.robustness.crash_writes import make_checkpoint, make_delta
from errata.bench.robustness.fuzz_delta import FuzzReport
from errata.bench.robustness.mutations import MALICIOUS_VALUES, flip_bits
from errata.bench.robustness.samples import sample
from errata.functional import save_delta
from errata.functional.deltas.fusing import fuse
from errata.functional.errors import ErrataError

__all__ = ["fuzz_folders"]


def _mutate_bytes(raw: bytes, draw: random.Random) -> bytes:
    way = draw.randrange(5)
    if way == 0:
        return flip_bits(raw, draw)
    if way == 1:
        return raw[: draw.randrange(len(raw))]
    if way == 2:
        at = draw.randrange(len(raw))
        return raw[:at] + draw.randbytes(draw.randint(1, 40)) + raw[at:]
    if way == 3:
        return struct.pack("<Q", draw.choice([0, 1, len(raw), 2**40, 2**64 - 1])) + raw[8:]
    return draw.choice([b"", b"[" * 50_000, b"\x80\x04cposix\nsystem\n.", b"null", b"\xff" * 99])


def _mutate_json(raw: bytes, draw: random.Random) -> bytes:
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
        node[key] = draw.choice(MALICIOUS_VALUES)
        return json.dumps(body).encode("utf-8", "replace")


def _mutate_safetensors(raw: bytes, draw: random.Random) -> bytes:
    """A lie in a safetensors header, or NaN among the values."""
    size = struct.unpack("<Q", raw[:8])[0]
    if draw.random() < 0.3:
        data = bytearray(raw)
        at = 8 + size + 4 * draw.randrange((len(raw) - 8 - size) // 4)
        data[at : at + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf")]))
        return bytes(data)
    head = _mutate_json(raw[8 : 8 + size], draw)
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def _mutate_file(path: Path, draw: random.Random) -> bytes:
    raw = path.read_bytes()
    if draw.random() < 0.4:
        return _mutate_bytes(raw, draw)
    return (_mutate_safetensors if path.suffix == ".safetensors" else _mutate_json)(raw, draw)


def _import_case(folder: Path, draw: random.Random) -> None:
    save_delta(folder / "out.safetensors", import_peft(folder / "case"))


def _fuse_case(folder: Path, draw: random.Random) -> None:
    fuse(make_delta(0), folder / "case", folder / "out")
    names = {path.name for path in (folder / "case").iterdir()}
    assert {path.name for path in (folder / "out").iterdir()} == names | {"errata.json"}


def fuzz_folders(num_folders: int, seed: int = 0, folder: Path | None = None) -> FuzzReport:
    """Import and fuse folders in each of which one file is mutated or missing.

    Args:
        num_folders: Folders.
        seed: Seed.
        folder: Where to write them.

    Returns:
        What was refused, loaded and found.
    """
    draw = random.Random(seed)
    report = FuzzReport(Counter(), Counter(), 0.0, [])
    slowest = 0.0
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        delta = sample(2)
        entries = tuple(e for e in delta.header.entries if e.name != "lm_head.bias")
        header = msgspec.structs.replace(delta.header, entries=entries, arithmetic="act")
        export_peft(delta._replace(header=header), place / "adapter")
        make_checkpoint(place / "checkpoint")
        for number in range(num_folders):
            kind, run = draw.choice([("adapter", _import_case), ("checkpoint", _fuse_case)])
            for old in ("case", "out"):
                shutil.rmtree(place / old, ignore_errors=True)
            shutil.copytree(place / kind, place / "case")
            if kind == "adapter" and draw.random() < 0.7:
                (place / "case" / "errata.json").unlink()
            target = draw.choice(sorted(p for p in (place / "case").iterdir() if p.suffix != ".md"))
            if draw.random() < 0.05:
                target.unlink()
            else:
                target.write_bytes(_mutate_file(target, draw))
            began = time.process_time()
            try:
                run(place, draw)
                report.loaded[kind] += 1
            except ErrataError as error:
                report.refused[kind] += 1
                named = str(place / "case") in str(error) or "out" in str(error)
                if not named or not str(error).isprintable():
                    report.findings.append(
                        f"{number} ({kind}, {target.name}): {str(error)[:200]!r}"
                    )
                if (place / "out").exists():
                    report.findings.append(f"{number} ({kind}): refused, but wrote a folder")
            except BaseException as error:  # noqa: BLE001 - anything else is a finding
                said = f"{type(error).__name__}: {str(error)[:200]}"
                report.findings.append(f"{number} ({kind}, {target.name}): {said}")
            slowest = max(slowest, time.process_time() - began)
    return report._replace(slowest=slowest)


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Command-line arguments.

    Returns:
        Exit code: 1 if something was found.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    report = fuzz_folders(args.files, args.seed)
    sys.stdout.write(
        f"{args.files} folders, refused {dict(report.refused)}, taken {dict(report.loaded)}, "
        f"{len(report.findings)} findings, slowest {report.slowest * 1e3:.0f} ms\n"
    )
    for line in report.findings[:20]:
        sys.stdout.write(line + "\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
