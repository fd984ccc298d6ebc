"""SIGKILL while saving, folding and exporting: `python -m errata.bench.robustness.crash_writes
--times 50`.

A child writes without pause; it is killed at a random moment; then every file or folder that bears
a final name must be whole, and equal to one of the two things the child writes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

from errata.adapters.interop.peft_export import export_peft
from errata.adapters.interop.peft_import import import_peft
from errata.functional import (
    BaseModel,
    Delta,
    EditRecord,
    Header,
    load_delta,
    merge,
    save_delta,
)
from errata.functional.deltas.fusing import fuse
from errata.functional.deltas.serialization import digest
from errata.functional.errors import ErrataError
from errata.functional.kinds.schema import LowRank

__all__ = ["OPERATIONS", "crash", "make_checkpoint", "make_delta"]

NAMES = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(4)]
SHAPE = (256, 768)
OPERATIONS = ("save", "merge", "fuse", "export")


def make_delta(seed: int) -> Delta:
    """A low-rank delta large enough that writing it takes a while.

    Args:
        seed: Seed.

    Returns:
        The delta.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = tuple(
        LowRank(name=name, checkpoint_name=name, shape=SHAPE, rank=64, edit_ranks=(64,))
        for name in NAMES
    )
    header = Header(
        base=BaseModel(id="someone/model"),
        arithmetic="weight",
        entries=entries,
        edits=(EditRecord(id=str(seed)),),
    )
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, (_, shape) in header.tensor_specs().items()
    }
    return Delta(header, tensors)


def make_checkpoint(folder: Path) -> None:
    """A checkpoint of two shards in Hugging Face layout."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(9)
    where = {}
    for number in range(2):
        shard = f"model-{number + 1:05}-of-00002.safetensors"
        names = NAMES[2 * number : 2 * number + 2] + [f"extra.{number}"]
        tensors = {name: torch.randn(SHAPE, generator=generator) for name in names}
        safetensors.torch.save_file(tensors, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _write(operation: str, folder: Path, number: int) -> None:
    delta = make_delta(number % 2)
    if operation == "save":
        save_delta(folder / "edit.safetensors", delta)
    elif operation == "merge":
        save_delta(folder / "edit.safetensors", merge(delta, delta))
    elif operation == "fuse":
        fuse(delta, folder / "base", folder / f"out-{number}")
    else:
        export_peft(delta, folder / f"out-{number}")


def _start_child(operation: str, folder: Path) -> int:
    """A forked process that writes again and again; forked, so that nothing needs importing."""
    process = os.fork()
    if process:
        return process
    number = 1000
    try:
        while True:
            _write(operation, folder, number)
            number += 1
    finally:
        os._exit(1)


def _is_whole(operation: str, path: Path, expected: list[object]) -> bool:
    if operation in ("save", "merge"):
        return digest(load_delta(path)) in expected
    if operation == "export":
        return digest(import_peft(path)) in expected
    return {file.name: file.read_bytes() for file in path.iterdir()} in expected


def _final_paths(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(("edit.", "out-"))]


def crash(operation: str, times: int, seed: int = 0) -> Counter[str]:
    """Kill a writing child process many times, and count what is left.

    Args:
        operation: `save`, `fuse` or another of `OPERATIONS`.
        times: Kills.
        seed: Seed of the moments.

    Returns:
        Counts by outcome.
    """
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_checkpoint(place / "base")
        expected: list[object] = []
        for number in range(2):
            _write(operation, place, number)
            path = _final_paths(place)[0]
            files = {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {}
            made = make_delta(number)
            whole = merge(made, made) if operation == "merge" else made
            expected.append(files if operation == "fuse" else digest(whole))
            _clear(place)
        if operation in ("save", "merge"):  # there is an old file to be kept
            _write(operation, place, 0)
        for _ in range(times):
            _crash_once(operation, place, draw.uniform(0, 0.3))
            finals = _final_paths(place)
            try:
                fine = all(_is_whole(operation, path, expected) for path in finals)
            except ErrataError:
                fine = False
            fine = fine and (operation not in ("save", "merge") or len(finals) == 1)
            outcomes["broken" if not fine else "whole" if finals else "nothing yet"] += 1
            for path in finals if operation not in ("save", "merge") else ():
                shutil.rmtree(path)
            _write(operation, place, 0)  # the next write cleans what the kill left
            left = [p for p in place.iterdir() if p.name.endswith(".part")]
            if operation in ("save", "merge"):
                outcomes["parts left after the next write"] += len(left)
            _clear(place, keep_prefix="edit.")
    return outcomes


def _crash_once(operation: str, folder: Path, pause: float) -> None:
    process = _start_child(operation, folder)
    time.sleep(pause)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), f"{operation} ended by itself"


def _clear(folder: Path, keep_prefix: str = "-") -> None:
    for path in folder.iterdir():
        if path.name.startswith(("out-", ".")) or (
            path.name.startswith("edit.") and not path.name.startswith(keep_prefix)
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Command-line arguments.

    Returns:
        Exit code: 1 if a file was broken.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    broken = 0
    for operation in OPERATIONS:
        outcomes = crash(operation, args.times)
        broken += outcomes["broken"]
        sys.stdout.write(f"{operation}: {args.times} kills, {dict(outcomes)}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
