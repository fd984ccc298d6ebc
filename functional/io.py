"""Save and load a delta as one safetensors file (`FORMAT.md`): checked, reproducible, atomic."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .atomic import whole_file
from .errors import DeltaFault, listed
from .header import Header, faults
from .peek import KEY, misfits, peek, text_of
from .safe import MAX_HEADER, canonical, layout, open_regular, parse
from .types import Delta

__all__ = ["DTYPES", "NAMES", "as_bytes", "digest", "load", "save", "view"]

DTYPES = {
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

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(path: str | os.PathLike[str], delta: Delta) -> str:
    """Write a delta to one file, whole or not at all, and return its digest.

    The same delta gives the same bytes, wherever its tensors live and however they are strided.
    Everything `load` would refuse is refused here, before a file is touched: DeltaFault lists all
    violations; BadInput where the file can not be written (the old one stays).

    >>> from errata.functional import Base, Dense, Header
    >>> entry = Dense(name="w", checkpoint="w", shape=(2,))
    >>> header = Header(base=Base(id="me/tiny"), entries=(entry,))
    >>> folder = getfixture("tmp_path")
    >>> digest = save(folder / "edit.safetensors", Delta(header, {"w": torch.ones(2)}))
    >>> load(folder / "edit.safetensors").tensors["w"]
    tensor([1., 1.])
    """
    header, tensors = delta.header, delta.tensors
    wrong = faults(header) or _unfit(header, tensors)
    if wrong:
        raise DeltaFault(f"the delta for {path} can not be saved: {listed(wrong)}.")
    try:
        content = digest(delta)
        text = text_of(header, content)
    except (TypeError, ValueError) as error:
        raise DeltaFault(f"the delta for {path} can not be saved: settings: {error}.") from None
    table = {name: (NAMES[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
    head, order = layout({KEY: text}, table)
    if len(head) - 8 > MAX_HEADER:
        raise DeltaFault(
            f"the delta for {path} can not be saved: its list of edits and settings takes "
            f"{len(head)} bytes, and at most {MAX_HEADER} are read: save it in several files."
        )
    try:
        parse(head[8:], len(head) + sum(x.numel() * x.element_size() for x in tensors.values()))
    except ValueError as error:
        raise DeltaFault(f"the delta for {path} can not be saved: {error}.") from None
    with whole_file(path) as file:
        file.write(head)
        for name in order:
            file.write(as_bytes(tensors[name]))
    return content


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Delta:
    """Read a delta; its tensors are memory-mapped, and writing to them never reaches the file.

    `verify` also reads every value once: all must be finite and match the file's digest. Raises
    BadInput where the file can not be opened, DeltaFault naming the file and every fault.
    """
    found = peek(path)
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != found.size:
            raise DeltaFault(f"{path}: the file changed while it was read.")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {
        name: view(memory, slot.dtype, slot.shape, found.data + slot.start)
        for name, slot in found.slots.items()
    }
    delta = Delta(found.header, {name: tensors[name] for name in found.header.tensors()})
    if verify:
        if digest(delta) != found.digest:
            raise DeltaFault(
                f"{path}: the content does not match its digest: the file was damaged or changed "
                "after it was saved; fetch it again."
            )
        wrong = list(_nonfinite(delta.tensors))
        if wrong:
            raise DeltaFault(f"{path}: {listed(wrong)}.")
    return delta


def digest(delta: Delta) -> str:
    """sha256 of a delta's content: canonical header, then each tensor by name.

    H(header ‖ "\\n" ‖ Σ_name canonical([name, dtype, shape]) ‖ "\\n" ‖ bytes), names in code-point
    order; independent of how a file lays its tensors out.
    """
    state = hashlib.sha256()
    state.update(text_of(delta.header, "").encode() + b"\n")
    for name in sorted(delta.tensors):
        x = delta.tensors[name]
        state.update(canonical([name, NAMES[x.dtype], list(x.shape)]).encode() + b"\n")
        state.update(as_bytes(x))
    return state.hexdigest()


def as_bytes(x: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, in row-major order."""
    flat = x.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def view(memory: mmap.mmap | bytearray, dtype: str, shape: tuple[int, ...], at: int) -> Tensor:
    """A tensor over bytes that stay where they are."""
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(memory, dtype=DTYPES[dtype], count=count, offset=at).reshape(shape)


def _unfit(header: Header, tensors: Mapping[str, Tensor]) -> list[str]:
    odd = [f"tensor {name!r} has dtype {x.dtype}" for name, x in tensors.items()
           if x.dtype not in NAMES]  # fmt: skip
    table = {name: (NAMES.get(x.dtype, "?"), tuple(x.shape)) for name, x in tensors.items()}
    return odd or misfits(header, table) or list(_nonfinite(tensors))


def _nonfinite(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for name, x in tensors.items():
        if x.dtype.is_floating_point and x.numel():
            ends = torch.stack(torch.aminmax(x.detach()))  # NaN if there is one: far the fastest
            if not bool(torch.isfinite(ends).all()):
                yield f"tensor {name!r} must be finite, and holds NaN or infinite values"
