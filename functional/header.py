"""What a delta says of itself: base, editor, entries by kind, and the list of edits.

The kinds are a closed union: `bind` interprets kinds, never methods, so a delta file works without
the editor that wrote it. Everything here is plain data and serialises to canonical JSON.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .card import Base

__all__ = ["FORMAT", "Dense", "EditRecord", "Entry", "Form", "Header", "LowRank"]

FORMAT = 1

Form = Literal["act", "act_fp32", "weight"]
"""How a low-rank change is added.

act       y = x Wᵀ + (x Aᵀ) Bᵀ, in the model's dtype
act_fp32  the same, the low-rank product in fp32, cast once at the end
weight    W' = (W.float() + B A).to(W.dtype), then y = x W'ᵀ
"""


class Dense(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dense"):
    """Change of a whole parameter: W' = W + d. Tensor `<name>`: the shape of the parameter."""

    name: str  # in-memory parameter name
    checkpoint: str  # the same parameter in the checkpoint's naming
    shape: tuple[int, ...]


class LowRank(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lowrank"):
    """Low-rank change of a linear map: dW = B A, dW [out in].

    Tensors `<name>.A` [r in] and `<name>.B` [out r]; any scale is folded into B. `rows[k]` of the r
    rows belong to edit k, in order (sum == r); empty where the rank is shared by all edits.
    `transposed`: the parameter is stored [in out].
    """

    name: str
    checkpoint: str
    shape: tuple[int, ...]  # of the parameter as stored
    rank: int
    rows: tuple[int, ...] = ()
    transposed: bool = False


Entry = Dense | LowRank


class EditRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One edit: hashes, not contents, so that a delta can be shipped without the data behind it."""

    id: str
    prompt: str = ""  # sha256 of the prompt
    target: str = ""
    images: tuple[str, ...] = ()


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a delta but its tensors."""

    format: int = FORMAT
    editor: str = ""
    settings: dict[str, Any] = {}
    base: Base
    form: Form = "act"
    entries: tuple[Entry, ...] = ()
    edits: tuple[EditRecord, ...] = ()
    stack: int = 0  # E > 0: tensors have a leading edit axis, edits[e] is edit e
    recursive: bool = False  # later edits depend on earlier ones: single edits can not be removed
