"""Fold a delta into a new checkpoint in Hugging Face layout, shard by shard."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .atomic import whole_folder
from .errors import BadInput, BaseMismatch, KindUnsupported, UnknownSite, listed
from .header import Dense, LowRank
from .io import DTYPES, as_bytes, digest, view
from .peek import text_of
from .safe import Slot, open_regular, read_table
from .shards import Place, family_in, misfits, parameters, shards
from .types import Delta

__all__ = ["changed", "fold", "folded", "strangers"]

_CHUNK = 1 << 24
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf",
            "*.onnx", "*.safetensors.index.json", "*.bin.index.json", ".git", ".cache")  # fmt: skip


def fold(
    delta: Delta,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    check: bool = True,
) -> Path:
    """Write the checkpoint in `base` with the delta added, as a new folder `out`.

    W' as `bind` has it for dense changes and for form "weight"; the other forms are added that
    way, too, which moves logits by rounding. Shards keep their names, order and headers; one
    parameter is in memory at a time. `check` first compares the base's parameters with the delta's
    hashes.

    Raises, before anything is written, KindUnsupported, UnknownSite or BaseMismatch for a delta
    that does not fit `base`; BadInput where `out` exists or can not be written: then it is not
    there, or is as it was.
    """
    _can(delta)
    have = parameters(base)
    wrong = misfits(delta.header, have, family_in(base))
    if wrong:
        raise UnknownSite(f"the delta does not fit {base}: {listed(wrong)}.")
    other = list(strangers(delta, have)) if check else []
    if other:
        raise BaseMismatch(
            f"the delta was made for {delta.header.base.id}; in {base} other values are held by "
            f"{listed(other)}."
        )
    by_name: dict[str, list[Any]] = {}
    for entry in delta.header.entries:
        by_name.setdefault(entry.checkpoint, []).append(entry)
    _outside(Path(base), Path(out))
    with whole_folder(out) as part:
        shutil.copytree(base, part, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
        for index in Path(base).glob("*.safetensors.index.json"):
            shutil.copyfile(index, part / index.name)
        for name in shards(base):
            _shard(Path(base) / name, part / name, delta, by_name)
        (part / "errata.json").write_text(text_of(delta.header, digest(delta)))
    return Path(out)


def changed(base: Tensor, entry: Any, delta: Delta) -> Tensor:
    """One parameter with one entry of a delta added, in the parameter's dtype.

    W + d for a dense change, W + (B A).to(W.dtype), B A in fp32, for a low-rank one.
    """
    if isinstance(entry, Dense):
        return (base + delta.tensors[entry.name]).to(base.dtype)
    full = delta.tensors[f"{entry.name}.B"].float() @ delta.tensors[f"{entry.name}.A"].float()
    full = full.to(base.dtype)
    return base + (full.mT if entry.transposed else full)


def strangers(delta: Delta, have: dict[str, Place]) -> Iterable[str]:
    """Names of touched parameters whose values in a checkpoint are not those the delta knows.

    A hash fits if it is of the stored bytes, or of the same values in another floating dtype.
    """
    for entry in delta.header.entries:
        want = delta.header.base.touched.get(entry.name)
        if want and want not in _hashes(have[entry.checkpoint]):
            yield entry.checkpoint


def folded(memory: mmap.mmap, slot: Slot, at: int, entries: Iterable[Any], delta: Delta) -> Tensor:
    """A parameter of a mapped shard with all its entries added."""
    value = view(memory, slot.dtype, slot.shape, at)
    for entry in entries:
        value = changed(value, entry, delta)
    return value


def _hashes(place: Place) -> Iterable[str]:
    with open_regular(place.file) as file:
        file.seek(place.at)
        state = hashlib.sha256()
        left = place.slot.nbytes
        while left:
            piece = file.read(min(left, _CHUNK))
            if not piece:
                return
            state.update(piece)
            left -= len(piece)
        yield state.hexdigest()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    value = view(memory, place.slot.dtype, place.slot.shape, place.at)
    for name in ("F32", "BF16", "F16", "F64"):
        if name != place.slot.dtype:
            yield hashlib.sha256(as_bytes(value.to(DTYPES[name]))).hexdigest()


def _shard(source: Path, target: Path, delta: Delta, by_name: dict[str, list[Any]]) -> None:
    table = read_table(source)
    touched = sorted((slot.start, name) for name, slot in table.slots.items() if name in by_name)
    with open_regular(source) as old, target.open("wb") as new:
        done = 0
        if touched:
            memory = mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_COPY)
        for start, name in touched:
            slot, at = table.slots[name], table.data + start
            _copy(old, new, at - done)
            new.write(as_bytes(folded(memory, slot, at, by_name[name], delta)))
            done = at + slot.nbytes
            old.seek(done)
        _copy(old, new, table.size - done)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, _CHUNK))
        if not piece:
            raise BadInput(f"{old.name}: the file became shorter while it was read.")
        new.write(piece)
        count -= len(piece)


def _outside(base: Path, out: Path) -> None:
    inside = out.resolve()
    if base.resolve() in (inside, *inside.parents):
        raise BadInput(f"{out} must lie outside the checkpoint it is made from, {base}.")


def _can(delta: Delta) -> None:
    if delta.header.stack:
        raise KindUnsupported(
            "a stacked delta holds edits side by side, and a checkpoint holds one model: fold one "
            "of `stacks.unstack(delta)`."
        )
    odd = sorted(
        {
            type(e).__name__.lower()
            for e in delta.header.entries
            if not isinstance(e, Dense | LowRank)
        }
    )
    if odd:
        raise KindUnsupported(
            f"a delta of kind {', '.join(odd)} decides per input what to change, which no plain "
            "checkpoint can: keep it as a file and `bind` it."
        )
