"""Cut, pad and join batches: by rows, and in time.

The key of an extra says how it is laid out: `name@bqk_` is a tensor with rows first, then query
tokens, key tokens, and something else. That is all that is needed to cut one without knowing what
it means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ShapeMismatch
from .types import IGNORE, Batch, Inputs

__all__ = ["concat", "earlier", "ends", "keyed", "later", "pad", "pick", "take", "trim"]


def ends(inputs: Inputs) -> Tensor:
    """[B L] True on the last token of each prompt: the one whose logits predict the answer's first.

    Where nothing is scored the whole row is the prompt.
    """
    end = inputs.mask.sum(-1) - 1  # [B]
    if inputs.labels.shape[1]:
        scored = inputs.labels != IGNORE
        first = inputs.at.gather(1, scored.int().argmax(-1, keepdim=True))[:, 0]
        end = torch.where(scored.any(-1), first, end)
    return torch.arange(inputs.ids.shape[1], device=end.device) == end[:, None]


def take(batch: Batch, rows: Tensor | slice) -> Batch:
    """The rows of a batch that an index, a mask or a slice names, in that order."""
    return batch._replace(
        **{name: getattr(batch, name)[rows] for name in _PLAIN},
        extras={key: value[rows] for key, value in batch.extras.items()},
        notes={key: value[rows] for key, value in batch.notes.items()},
    )


def earlier(batch: Batch, t: int) -> Batch:
    """Tokens before `t` of every row; what was scored after them is left out."""
    keep = (batch.at < t) & (batch.labels != IGNORE)
    return _tokens(batch, slice(0, t), slice(0, t))._replace(
        labels=torch.where(keep, batch.labels, IGNORE), at=torch.where(keep, batch.at, 0)
    )


def later(batch: Batch, t: int) -> Batch:
    """Tokens from `t` on of every row, to be decoded with `past` = keys and values of `earlier`.

    decode(later(b, t), past=p) where _, p = decode(earlier(b, t), keep=True) gives the logits of
    decode(b) at the positions that lie from `t` on, exactly where attention is causal; labels of
    earlier positions become IGNORE.
    """
    keep = (batch.at >= t) & (batch.labels != IGNORE)
    return _tokens(batch, slice(t, None), slice(None))._replace(
        labels=torch.where(keep, batch.labels, IGNORE), at=torch.where(keep, batch.at - t, 0)
    )


def pick(batch: Batch, at: Tensor) -> Batch:
    """Only the tokens `at` [B T] of each row, as queries: L becomes T, keys stay as they are."""
    extras = {key: _gather(value, _axis(key, "q"), at) for key, value in batch.extras.items()}
    return batch._replace(
        hidden=_gather(batch.hidden, 1, at),
        mask=batch.mask.gather(1, at),
        positions=_gather(batch.positions, 2, at),
        image=batch.image.gather(1, at),
        prompt=batch.prompt.gather(1, at),
        extras=extras,
    )


def pad(batch: Batch, length: int, scored: int | None = None) -> Batch:
    """The same rows made `length` tokens long (and `scored` labels wide); padding is masked out.

    Padded tokens repeat the last one, so that every query still has a key to attend to.
    """
    more = length - batch.hidden.shape[1]
    wide = (batch.labels.shape[1] if scored is None else scored) - batch.labels.shape[1]
    if more < 0 or wide < 0:
        raise ShapeMismatch(
            f"a batch can only be padded to be longer: asked for {length} tokens, has "
            f"{batch.hidden.shape[1]} tokens and {batch.labels.shape[1]} labels."
        )
    extras = {}
    for key, value in batch.extras.items():
        query, keys = _axis(key, "q"), _axis(key, "k")
        if query is not None:
            value = _repeat_last(value, query, more)
        if keys is not None:
            value = _fill(value, keys, more)
        extras[key] = value
    return batch._replace(
        hidden=_repeat_last(batch.hidden, 1, more),
        mask=F.pad(batch.mask, (0, more)),
        positions=_repeat_last(batch.positions, 2, more),
        image=F.pad(batch.image, (0, more)),
        prompt=F.pad(batch.prompt, (0, more)),
        labels=F.pad(batch.labels, (0, wide), value=IGNORE),
        at=F.pad(batch.at, (0, wide)),
        extras=extras,
    )


def trim(batch: Batch, length: int) -> Batch:
    """The first `length` tokens of every row, for rows that were padded further than they need."""
    return _tokens(batch, slice(0, length), slice(0, length))


def keyed(batch: Batch, length: int) -> Batch:
    """The same rows with `length` key tokens: later ones cut, missing ones closed to every query.

    For rows of which only some tokens are left (`pick`), whose keys are not their tokens.
    """
    extras = {}
    for key, value in batch.extras.items():
        axis = _axis(key, "k")
        if axis is not None:
            value = value.narrow(axis, 0, min(length, value.shape[axis]))
            value = _fill(value, axis, length - value.shape[axis])
        extras[key] = value
    return batch._replace(extras=extras)


def concat(batches: Sequence[Batch]) -> Batch:
    """One batch of all the rows, padded to the longest; all must be at the same depth.

    An extra that some batches lack (features a family adds only where there are pictures) is zero
    for their rows. Raises ShapeMismatch for batches of different depths.
    """
    depths = sorted({batch.depth for batch in batches})
    if len(depths) != 1:
        raise ShapeMismatch(f"batches must be at one depth to be joined, got depths {depths}.")
    length = max(batch.hidden.shape[1] for batch in batches)
    scored = max(batch.labels.shape[1] for batch in batches)
    padded = [pad(batch, length, scored) for batch in batches]
    known: dict[str, Tensor] = {}
    for batch in padded:
        known = {**batch.extras, **known}
    extras = {
        key: torch.cat(
            _widened(key, [_extra(batch.extras, key, like, batch.rows) for batch in padded])
        )
        for key, like in known.items()
    }
    noted = set.intersection(*(set(batch.notes) for batch in batches))
    notes = {key: torch.cat([batch.notes[key] for batch in batches]) for key in sorted(noted)}
    joined = {name: torch.cat([getattr(batch, name) for batch in padded]) for name in _PLAIN}
    return Batch(**joined, extras=extras, depth=depths[0], notes=notes)


_PLAIN = ("hidden", "mask", "positions", "image", "prompt", "labels", "at", "edit")


def _extra(extras: Mapping[str, Tensor], key: str, like: Tensor, rows: int) -> Tensor:
    return extras[key] if key in extras else like.new_zeros(rows, *like.shape[1:])


def _widened(key: str, values: list[Tensor]) -> list[Tensor]:
    """Values with as many keys each: thinned batches keep those of all their tokens."""
    keys = _axis(key, "k")
    if keys is None:
        return values
    longest = max(value.shape[keys] for value in values)
    return [_fill(value, keys, longest - value.shape[keys]) for value in values]


def _axis(key: str, letter: str) -> int | None:
    axis = key.rpartition("@")[2].find(letter)
    return None if axis < 0 else axis


def _tokens(batch: Batch, queries: slice, keys: slice) -> Batch:
    extras = {}
    for key, value in batch.extras.items():
        for letter, cut in (("q", queries), ("k", keys)):
            axis = _axis(key, letter)
            if axis is not None:
                value = value[(slice(None),) * axis + (cut,)]
        extras[key] = value
    return batch._replace(
        hidden=batch.hidden[:, queries],
        mask=batch.mask[:, queries],
        positions=batch.positions[:, :, queries],
        image=batch.image[:, queries],
        prompt=batch.prompt[:, queries],
        extras=extras,
    )


def _gather(value: Tensor, axis: int | None, at: Tensor) -> Tensor:
    if axis is None:
        return value
    index = at.reshape(at.shape[0], *(1,) * (axis - 1), -1, *(1,) * (value.ndim - axis - 1))
    shape = list(value.shape)
    shape[axis] = at.shape[1]
    return value.gather(axis, index.expand(shape))


def _repeat_last(value: Tensor, axis: int, more: int) -> Tensor:
    if more == 0:
        return value
    last = value.narrow(axis, value.shape[axis] - 1, 1)
    shape = list(value.shape)
    shape[axis] = more
    return torch.cat([value, last.expand(shape)], axis)


def _fill(value: Tensor, axis: int, more: int) -> Tensor:
    """Key tokens that no query may attend to: False, or the lowest number of an additive mask."""
    if more == 0:
        return value
    shape = list(value.shape)
    shape[axis] = more
    low = torch.finfo(value.dtype).min if value.is_floating_point() else 0
    return torch.cat([value, value.new_full(shape, low)], axis)
