"""Save and load a delta as one safetensors file: checked, reproducible, atomic.

`functional/deltas/FORMAT.md` describes the file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from errata.functional.deltas.format1 import StoredNames
from errata.functional.deltas.inspection import (
    METADATA_KEY,
    encode_header,
    inspect_delta,
    tensor_mismatches,
)
from errata.functional.deltas.safetensors_header import (
    MAX_HEADER,
    build_header,
    canonical_json,
    open_regular_file,
    parse_header,
)
from errata.functional.errors import DeltaFileError, join_messages
from errata.functional.files import atomic_write
from errata.functional.header import Header, validate_header
from errata.functional.types import Delta

__all__ = [
    "DTYPE_BY_NAME",
    "NAME_BY_DTYPE",
    "digest",
    "load_delta",
    "save_delta",
    "stored_digest",
    "tensor_bytes",
    "tensor_view",
]

DTYPE_BY_NAME = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Safetensors' names of the dtypes a delta may hold."""

NAME_BY_DTYPE = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}


def save_delta(path: str | os.PathLike[str], delta: Delta) -> str:
    """Write a delta to one file, completely or not at all.

    The same delta gives the same bytes, whatever the device and strides of its tensors. A delta
    that `load_delta` would reject is rejected before the file is opened.

    Args:
        path: The file to write.
        delta: The delta.

    Returns:
        The digest: sha256 of the delta's content in hex.

    Raises:
        DeltaFileError: If the delta is invalid. Names every violation.
        InvalidInputError: If the file cannot be written. The old file stays.

    Example:
        >>> from errata.functional import BaseModel, Header
        >>> from errata.functional.kinds.schema import Dense
        >>> entry = Dense(name="w", checkpoint_name="w", shape=(2,))
        >>> header = Header(base=BaseModel(id="me/tiny"), entries=(entry,))
        >>> digest = save_delta("edit.safetensors", Delta(header, {"w": torch.ones(2)}))
        >>> load_delta("edit.safetensors").tensors["w"]
        tensor([1., 1.])
    """
    header, tensors = delta.header, delta.tensors
    problems = validate_header(header) or _tensor_problems(header, tensors)
    if problems:
        raise DeltaFileError(f"the delta for {path} cannot be saved: {join_messages(problems)}.")
    try:
        content = digest(delta)
        text = encode_header(header, content)
    except (TypeError, ValueError) as error:
        raise DeltaFileError(f"the delta for {path} cannot be saved: settings: {error}.") from None
    specs = {name: (NAME_BY_DTYPE[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
    head, order = build_header({METADATA_KEY: text}, specs)
    if len(head) - 8 > MAX_HEADER:
        raise DeltaFileError(
            f"the delta for {path} cannot be saved: its list of edits and settings takes "
            f"{len(head)} bytes, and at most {MAX_HEADER} are read: save it in several files."
        )
    try:
        parse_header(
            head[8:], len(head) + sum(x.numel() * x.element_size() for x in tensors.values())
        )
    except ValueError as error:
        raise DeltaFileError(f"the delta for {path} cannot be saved: {error}.") from None
    with atomic_write(path) as file:
        file.write(head)
        for name in order:
            file.write(tensor_bytes(tensors[name]))
    return content


MAX_READ_BYTES = 64 << 20
"""Verified files up to this size are read, not mapped."""


def load_delta(path: str | os.PathLike[str], *, verify: bool = True) -> Delta:
    """Read a delta from a file of format 2 or 1.

    A verified file of at most 64 MiB is read into memory. Larger files, and those that are not
    verified, are memory-mapped copy-on-write: writing to the tensors does not change the file, but
    a program that overwrites the file in place changes what was not read yet, and one that cuts it
    short kills this process. errata itself only ever replaces files.

    Args:
        path: The file.
        verify: Whether to read every value: all must be finite and match the file's digest.

    Returns:
        The delta.

    Raises:
        InvalidInputError: If the file cannot be opened.
        DeltaFileError: If the file breaks the format. Names the file and every violation.
    """
    info = inspect_delta(path)
    with open_regular_file(path) as file:
        if os.fstat(file.fileno()).st_size != info.num_bytes:
            raise DeltaFileError(f"{path}: the file changed while it was read.")
        memory: mmap.mmap | bytearray
        if verify and info.num_bytes <= MAX_READ_BYTES:
            memory = bytearray(file.read())
            if len(memory) != info.num_bytes:
                raise DeltaFileError(f"{path}: the file changed while it was read.")
        else:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {
        name: tensor_view(memory, slot.dtype, slot.shape, info.data_start + slot.start)
        for name, slot in info.tensors.items()
    }
    delta = Delta(info.header, {name: tensors[name] for name in info.header.tensor_specs()})
    if verify:
        if stored_digest(delta, info.stored) != info.digest:
            raise DeltaFileError(
                f"{path}: the content does not match its digest: the file was damaged or changed "
                "after it was saved; fetch it again."
            )
        problems = list(_nonfinite_tensors(delta.tensors))
        if problems:
            raise DeltaFileError(f"{path}: {join_messages(problems)}.")
    return delta


def digest(delta: Delta) -> str:
    r"""Compute the sha256 of a delta's content: canonical header, then each tensor by name.

    H(header ‖ "\n" ‖ Σ_name canonical([name, dtype, shape]) ‖ "\n" ‖ bytes), names in code-point
    order. It does not depend on how a file lays its tensors out.

    Args:
        delta: The delta.

    Returns:
        The digest in hex.

    Raises:
        ValueError: If the settings hold NaN or infinity.
    """
    return _content_digest(encode_header(delta.header, ""), delta.tensors)


def stored_digest(delta: Delta, stored: StoredNames | None) -> str:
    """Compute the digest of a delta as the file it was read from claims it.

    Args:
        delta: The delta.
        stored: The names in a file of format 1. None for a file of the current format.

    Returns:
        sha256 in hex, over the text and the tensor names of the file.
    """
    if stored is None:
        return digest(delta)
    return _content_digest(
        stored.text, {stored.tensors.get(name, name): x for name, x in delta.tensors.items()}
    )


def _content_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    state.update(text.encode() + b"\n")
    for name in sorted(tensors):
        x = tensors[name]
        state.update(canonical_json([name, NAME_BY_DTYPE[x.dtype], list(x.shape)]).encode() + b"\n")
        state.update(tensor_bytes(x))
    return state.hexdigest()


def tensor_bytes(x: Tensor) -> memoryview:
    """Return the raw bytes of a tensor, in row-major order and the machine's byte order.

    Args:
        x: A tensor of any device and strides.

    Returns:
        The bytes.
    """
    flat = x.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_view(
    memory: mmap.mmap | bytearray, dtype: str, shape: tuple[int, ...], offset: int
) -> Tensor:
    """Make a tensor over bytes in memory, without a copy.

    Args:
        memory: The bytes.
        dtype: Name of the dtype in safetensors.
        shape: Shape of the tensor.
        offset: Offset of its first byte.

    Returns:
        The tensor. An empty one does not refer to `memory`.
    """
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=DTYPE_BY_NAME[dtype], device="cpu")
    return torch.frombuffer(memory, dtype=DTYPE_BY_NAME[dtype], count=count, offset=offset).reshape(
        shape
    )


def _tensor_problems(header: Header, tensors: Mapping[str, Tensor]) -> list[str]:
    unsupported = [
        f"tensor {name!r} has dtype {x.dtype}"
        for name, x in tensors.items()
        if x.dtype not in NAME_BY_DTYPE
    ]
    specs = {name: (NAME_BY_DTYPE.get(x.dtype, "?"), tuple(x.shape)) for name, x in tensors.items()}
    return unsupported or tensor_mismatches(header, specs) or list(_nonfinite_tensors(tensors))


def _nonfinite_tensors(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, x in tensors.items():
        if x.dtype.is_floating_point and x.numel():
            ends = torch.stack(torch.aminmax(x.detach()))  # NaN if there is one; fast
            if not bool(torch.isfinite(ends).all()):
                yield f"tensor {name!r} must be finite, and holds NaN or infinite values"
