"""SIGKILL while saving, folding and exporting: `python -m errata.bench.kill_delta --times 50`.

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

from errata.adapters.peft import from_peft, to_peft
from errata.functional import Base, Delta, EditRecord, Header, LowRank, load, save
from errata.functional.errors import ErrataError
from errata.functional.fold import fold
from errata.functional.io import digest

__all__ = ["VERBS", "checkpoint", "edit", "kill"]

NAMES = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(4)]
SHAPE = (256, 768)
VERBS = ("save", "fold", "export")


def edit(seed: int) -> Delta:
    """A low-rank delta large enough that writing it takes a while."""
    generator = torch.Generator().manual_seed(seed)
    entries = tuple(
        LowRank(name=name, checkpoint=name, shape=SHAPE, rank=64, rows=(64,)) for name in NAMES
    )
    header = Header(
        base=Base(id="someone/model"),
        form="weight",
        entries=entries,
        edits=(EditRecord(id=str(seed)),),
    )
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, (_, shape) in header.tensors().items()
    }
    return Delta(header, tensors)


def checkpoint(folder: Path) -> None:
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


def _write(verb: str, place: Path, number: int) -> None:
    delta = edit(number % 2)
    if verb == "save":
        save(place / "edit.safetensors", delta)
    elif verb == "fold":
        fold(delta, place / "base", place / f"out-{number}")
    else:
        to_peft(delta, place / f"out-{number}")


def _child(verb: str, place: Path) -> int:
    """A forked process that writes again and again; forked, so that nothing needs importing."""
    process = os.fork()
    if process:
        return process
    number = 1000
    try:
        while True:
            _write(verb, place, number)
            number += 1
    finally:
        os._exit(1)


def _whole(verb: str, path: Path, wanted: list[object]) -> bool:
    if verb == "save":
        return digest(load(path)) in wanted
    if verb == "export":
        return digest(from_peft(path)) in wanted
    return {file.name: file.read_bytes() for file in path.iterdir()} in wanted


def _finals(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name.startswith(("edit.", "out-"))]


def kill(verb: str, times: int, seed: int = 0) -> Counter[str]:
    """Kill a child `times` times; count what lay there afterwards."""
    draw = random.Random(seed)
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint(place / "base")
        wanted: list[object] = []
        for number in range(2):
            _write(verb, place, number)
            path = _finals(place)[0]
            files = {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {}
            wanted.append(files if verb == "fold" else digest(edit(number)))
            _clear(place)
        if verb == "save":
            save(place / "edit.safetensors", edit(0))  # there is an old file to be kept
        for _ in range(times):
            _kill_one(verb, place, draw.uniform(0, 0.3))
            finals = _finals(place)
            try:
                fine = all(_whole(verb, path, wanted) for path in finals)
            except ErrataError:
                fine = False
            fine = fine and (verb != "save" or len(finals) == 1)
            seen["broken" if not fine else "whole" if finals else "nothing yet"] += 1
            seen["unfinished part beside it"] += any(
                p.name.endswith(".part") for p in place.iterdir()
            )
            _clear(place, keep="edit.")
    return seen


def _kill_one(verb: str, place: Path, pause: float) -> None:
    process = _child(verb, place)
    time.sleep(pause)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status), f"{verb} ended by itself"


def _clear(place: Path, keep: str = "-") -> None:
    for path in place.iterdir():
        if path.name.startswith(("out-", ".")) or (
            path.name.startswith("edit.") and not path.name.startswith(keep)
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    broken = 0
    for verb in VERBS:
        seen = kill(verb, args.times)
        broken += seen["broken"]
        sys.stdout.write(f"{verb}: {args.times} kills, {dict(seen)}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
