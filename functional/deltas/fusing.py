"""Fuse a delta into a new checkpoint in Hugging Face layout, shard by shard."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from errata.functional.deltas.inspection import encode_header
from errata.functional.deltas.safetensors_header import TensorSlot, open_regular_file, read_header
from errata.functional.deltas.serialization import DTYPE_BY_NAME, digest, tensor_bytes, tensor_view
from errata.functional.deltas.shards import (
    ParameterLocation,
    checkpoint_mismatches,
    checkpoint_model_type,
    checkpoint_parameters,
    shard_files,
    tied_parameters,
)
from errata.functional.errors import (
    BaseMismatchError,
    InvalidInputError,
    UnknownSiteError,
    UnsupportedKindError,
    join_messages,
)
from errata.functional.files import atomic_folder
from errata.functional.kinds.dense.entry import Dense
from errata.functional.types import Delta

__all__ = ["apply_entry", "fuse", "fuse_parameter", "mismatched_parameters"]

_CHUNK = 1 << 24
_WEIGHT_FILES = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.safetensors.index.json",
    "*.bin.index.json",
    ".git",
    ".cache",
)


def fuse(
    delta: Delta,
    base: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    check: bool = True,
    untie: bool = False,
) -> Path:
    """Write a checkpoint with a delta added, as a new folder.

    Dense changes and low-rank changes of arithmetic "weight" give the W' of `bind`. Low-rank
    changes of another arithmetic are added the same way, which moves logits by rounding. Shards
    keep their names, order and headers. One parameter is in memory at a time.

    Args:
        delta: A delta of kinds `dense` and `lowrank`.
        base: Folder of the checkpoint the delta was made for.
        output_dir: Folder to write; must not exist and must be outside `base`.
        check: Whether to compare the checkpoint's parameters with the delta's hashes first.
        untie: Whether a head that shares its weight with the embedding gets one of its own, if the
            delta changes the head alone.

    Returns:
        `output_dir` as a path.

    Raises:
        UnsupportedKindError: If the delta is stacked, a kind decides per input what to change, or a
            tied head must be untied.
        UnknownSiteError: If a name, shape, dtype or the family does not fit the checkpoint.
        BaseMismatchError: If a parameter has other values than the delta's base.
        InvalidInputError: If `base` cannot be read, or `output_dir` exists or cannot be written.
            Then
            `output_dir` is unchanged.
        DeltaFileError: If a safetensors header or the index is invalid.
    """
    _require_weight_changes(delta)
    locations = checkpoint_parameters(base)
    tied = tied_parameters(delta.header, base, locations)
    if tied and not untie:
        raise UnsupportedKindError(
            f"{', '.join(tied)} shares its weight with {', '.join(sorted(set(tied.values())))} in "
            f"{base}, and the delta changes the outputs of the first alone: fusing must write it a "
            "weight of its own. Pass untie=True (`errata fuse --untie`) to do so."
        )
    stored = locations | {name: locations[shared] for name, shared in tied.items()}
    problems = checkpoint_mismatches(delta.header, stored, checkpoint_model_type(base))
    if problems:
        raise UnknownSiteError(f"the delta does not fit {base}: {join_messages(problems)}.")
    mismatched = list(mismatched_parameters(delta, stored)) if check else []
    if mismatched:
        raise BaseMismatchError(
            f"the delta was made for {delta.header.base.id}; in {base} other values are held by "
            f"{join_messages(mismatched)}."
        )
    by_name: dict[str, list[Any]] = {}
    for entry in delta.header.entries:
        by_name.setdefault(entry.checkpoint_name, []).append(entry)
    _require_outside(Path(base), Path(output_dir))
    with atomic_folder(output_dir) as temporary:
        shutil.copytree(
            base, temporary, ignore=shutil.ignore_patterns(*_WEIGHT_FILES), dirs_exist_ok=True
        )
        for index in Path(base).glob("*.safetensors.index.json"):
            shutil.copyfile(index, temporary / index.name)
        for name in shard_files(base):
            _fuse_shard(Path(base) / name, temporary / name, delta, by_name)
        if tied:
            _write_untied(Path(base), temporary, delta, by_name, {n: stored[n] for n in tied})
        (temporary / "errata.json").write_text(encode_header(delta.header, digest(delta)))
    return Path(output_dir)


def apply_entry(base: Tensor, entry: Any, delta: Delta) -> Tensor:
    """Add one entry of a delta to a parameter, in the parameter's dtype.

    W + d for a dense change. W + (B A).to(W.dtype) with B A in fp32 for a low-rank one.

    Args:
        base: The parameter.
        entry: A dense or low-rank entry of `delta`.
        delta: The delta with the tensors.

    Returns:
        The changed parameter.
    """
    if isinstance(entry, Dense):
        return (base + delta.tensors[entry.name]).to(base.dtype)
    change = delta.tensors[f"{entry.name}.B"].float() @ delta.tensors[f"{entry.name}.A"].float()
    change = change.to(base.dtype)
    return base + (change.mT if entry.transposed else change)


def mismatched_parameters(delta: Delta, locations: dict[str, ParameterLocation]) -> Iterable[str]:
    """Find the parameters whose values in a checkpoint are not those of the delta's base.

    A hash matches if it is of the stored bytes, or of the same values in another floating dtype.

    Args:
        delta: The delta.
        locations: The parameters of the checkpoint by name.

    Yields:
        Checkpoint names of the parameters that differ.
    """
    for entry in delta.header.entries:
        expected_hash = delta.header.base.parameter_hashes.get(entry.name)
        if expected_hash and expected_hash not in _possible_hashes(
            locations[entry.checkpoint_name]
        ):
            yield entry.checkpoint_name


def fuse_parameter(
    memory: mmap.mmap, slot: TensorSlot, offset: int, entries: Iterable[Any], delta: Delta
) -> Tensor:
    """Read a parameter from a mapped shard and add its entries.

    Args:
        memory: The mapped shard.
        slot: Dtype and shape of the parameter.
        offset: Offset of its bytes in the shard.
        entries: Its dense or low-rank entries.
        delta: The delta with the tensors.

    Returns:
        The changed parameter.
    """
    value = tensor_view(memory, slot.dtype, slot.shape, offset)
    for entry in entries:
        value = apply_entry(value, entry, delta)
    return value


def _possible_hashes(location: ParameterLocation) -> Iterable[str]:
    with open_regular_file(location.file) as file:
        file.seek(location.offset)
        state = hashlib.sha256()
        left = location.slot.nbytes
        while left:
            piece = file.read(min(left, _CHUNK))
            if not piece:
                return
            state.update(piece)
            left -= len(piece)
        yield state.hexdigest()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    value = tensor_view(memory, location.slot.dtype, location.slot.shape, location.offset)
    for name in ("F32", "BF16", "F16", "F64"):
        if name != location.slot.dtype:
            yield hashlib.sha256(tensor_bytes(value.to(DTYPE_BY_NAME[name]))).hexdigest()


def _fuse_shard(source: Path, target: Path, delta: Delta, by_name: dict[str, list[Any]]) -> None:
    header = read_header(source)
    changed = sorted((slot.start, name) for name, slot in header.tensors.items() if name in by_name)
    with open_regular_file(source) as old, target.open("wb") as new:
        done = 0
        if changed:
            memory = mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_COPY)
        for start, name in changed:
            slot, offset = header.tensors[name], header.data_start + start
            _copy(old, new, offset - done)
            new.write(tensor_bytes(fuse_parameter(memory, slot, offset, by_name[name], delta)))
            done = offset + slot.nbytes
            old.seek(done)
        _copy(old, new, header.num_bytes - done)


UNTIED_FILE = "untied.safetensors"


def _write_untied(
    base: Path,
    target: Path,
    delta: Delta,
    by_name: dict[str, list[Any]],
    tied: dict[str, ParameterLocation],
) -> None:
    """Write tied parameters under names of their own, and say in the config that they are."""
    table: dict[str, Any] = {}
    values = []
    start = 0
    for name, location in tied.items():
        slot = location.slot
        with open_regular_file(location.file) as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            value = fuse_parameter(memory, slot, location.offset, by_name[name], delta)
            values.append(bytes(tensor_bytes(value)))
        offsets = [start, start + slot.nbytes]
        table[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": offsets}
        start += slot.nbytes
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + b"".join(values)
    (target / UNTIED_FILE).write_bytes(data)
    path = target / "model.safetensors.index.json"
    if path.is_file():
        index = json.loads(path.read_text("utf-8"))
    else:
        names = {
            name: file for file in shard_files(base) for name in read_header(base / file).tensors
        }
        index = {"metadata": {}, "weight_map": names}
        # a loader takes `model.safetensors` before an index: it gets a shard's name
        shard = "model-00001-of-00002.safetensors"
        if (target / "model.safetensors").is_file():
            (target / "model.safetensors").rename(target / shard)
            index["weight_map"] = dict.fromkeys(names, shard)
    index["weight_map"] |= dict.fromkeys(tied, UNTIED_FILE)
    path.write_text(json.dumps(index, indent=2))
    config = json.loads((base / "config.json").read_text("utf-8"))
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, _CHUNK))
        if not piece:
            raise InvalidInputError(f"{old.name}: the file became shorter while it was read.")
        new.write(piece)
        count -= len(piece)


def _require_outside(base: Path, output_dir: Path) -> None:
    target = output_dir.resolve()
    if base.resolve() in (target, *target.parents):
        raise InvalidInputError(
            f"{output_dir} must lie outside the checkpoint it is made from, {base}."
        )


def _require_weight_changes(delta: Delta) -> None:
    if delta.header.stack:
        raise UnsupportedKindError(
            "a stacked delta holds edits side by side, and a checkpoint holds one model: fold one "
            "of `stacks.unstack(delta)`."
        )
    other_kinds = sorted(
        {type(e).__name__.lower() for e in delta.header.entries if not e.is_weight_change()}
    )
    if other_kinds:
        raise UnsupportedKindError(
            f"a delta of kind {', '.join(other_kinds)} decides per input what to change, which no "
            "plain "
            "checkpoint can: keep it as a file and `bind` it."
        )
