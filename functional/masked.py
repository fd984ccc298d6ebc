"""Side memories of a linear map, as a rewrite: which memory each row runs with, and its product.

    d_mt = |phi(y_t + D_m x_t) - phi(y_t)|_2       at each token t of a row's own prompt
    a_m  = the `statistic` of d_mt over them
    m*   = argmax a_m over {m : a_m >= threshold_m};   y'_t = y_t + D_m* x_t at every token

and y' = y where no memory reaches its threshold. Images, padding and what stands in the row beside
the prompt (its answer, told or generated) decide nothing: the choice is made once, where the prompt
runs, and kept in the batch's notes for the tokens behind it.

After WISE (Wang et al. 2024, arXiv 2405.14768), EasyEdit `models/wise/WISE.py`, whose distance is a
mean over the whole row, answer and padding included, when it edits, and the largest of all tokens
when it answers rows of more than 100. Legend: B rows · L tokens · M memories · E edits · O out ·
I in · N = O I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from .change import Change
from .errors import BadInput, KindUnsupported, ShapeMismatch, UnknownSite
from .grouped import grouped_linear
from .header import Header, Masked
from .kinds import Algebra, Part, kept, owned, register
from .places import canonical, module_of, runs_below
from .types import Batch, Model

__all__ = [
    "ACTIVATIONS",
    "activation_of",
    "change",
    "distances",
    "masked",
    "pack",
    "prompt_tokens",
    "spread",
    "unpacked",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda y: F.gelu(y, approximate="tanh"),
    "gelu_pytorch_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}
"""By transformers' names, as far as the header knows them."""

_KEPT = 1 << 26  # elements of maps that a bound model keeps multiplied out; others are made anew
_LONG = 100  # tokens from which EasyEdit takes the largest distance
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A mask [... N] of bool as bytes [... ceil(N/8)], the lowest bit first.

    >>> pack(torch.tensor([True, False, True] + [False] * 5 + [True]))
    tensor([5, 1], dtype=torch.uint8)
    """
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits * _BITS.to(mask.device)).sum(-1, dtype=torch.uint8)


def unpacked(mask: Tensor, size: int) -> Tensor:
    """[... ceil(N/8)] bytes as [... N] of bool."""
    bits = mask[..., None].bitwise_and(_BITS.to(mask.device)) > 0
    return bits.flatten(-2)[..., :size]


def spread(mask: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Values [K] at the K bits set in a mask of bytes: the map [O I].

    >>> spread(torch.tensor([5], dtype=torch.uint8), torch.tensor([2.0, 3.0]), (2, 2))
    tensor([[2., 0.],
            [3., 0.]])
    """
    out, inner = size
    full = values.new_zeros(out * inner)
    full[unpacked(mask, out * inner)] = values
    return full.view(out, inner)


def prompt_tokens(batch: Batch, statistic: str) -> Tensor:
    """[B L] the tokens whose distances count: of the prompt, up to its last token."""
    if statistic == "last":
        return batch.prompt
    upto = (batch.prompt.int().flip(1).cumsum(1).flip(1) > 0) & batch.mask
    return upto & ~batch.image if statistic == "text" else upto


def distances(y: Tensor, more: Tensor, activation: str) -> Tensor:
    """|phi(y + more) - phi(y)|_2 over the last axis, in fp32: [... O] -> [...]."""
    phi = ACTIVATIONS[activation]
    y = y.float()
    return torch.linalg.vector_norm(phi(y + more.float()) - phi(y), dim=-1)


def activation_of(distance: Tensor, tokens: Tensor, statistic: str) -> Tensor:
    """The statistic of distances [... L] over the tokens [... L]: [...]."""
    count = tokens.sum(-1)
    mean = torch.where(tokens, distance, 0).sum(-1) / count.clamp_min(1)
    if statistic != "easyedit":
        return mean
    return torch.where(count > _LONG, torch.where(tokens, distance, 0).amax(-1), mean)


class _Memories:
    """The maps of all memories: of edit e and memory m number e * M + m."""

    def __init__(self, entry: Masked, tensors: Mapping[str, Tensor]) -> None:
        masks, values, thresholds = (
            tensors[f"{entry.name}.{part}"] for part in ("mask", "values", "thresholds")
        )
        self.size, self.counts = entry.size, entry.counts
        self.masks = masks.flatten(0, -2)  # [E*M ceil(N/8)]
        self.values = [
            v for row in values.view(-1, sum(self.counts)) for v in row.split(self.counts)
        ]
        self.thresholds = thresholds.float().view(-1, len(self.counts))  # [E M]
        self._check(entry)
        few = len(self.masks) * self.size[0] * self.size[1] <= _KEPT
        self.kept = [self.make(number) for number in range(len(self.masks))] if few else None

    def _check(self, entry: Masked) -> None:
        found = torch.stack(
            [unpacked(mask, self.size[0] * self.size[1]).sum() for mask in self.masks]
        )
        wanted = found.new_tensor(self.counts).repeat(len(self.thresholds))
        if not torch.equal(found, wanted):
            raise ShapeMismatch(
                f"{entry.name}: each mask must have as many bits set as its memory has values "
                f"({wanted.tolist()[:8]}), and they have {found.tolist()[:8]}."
            )

    def make(self, number: int) -> Tensor:
        return spread(self.masks[number], self.values[number].float(), self.size)

    def of(self, numbers: Sequence[int]) -> Tensor:
        """[n O I]"""
        kept = self.kept
        return torch.stack([self.make(n) if kept is None else kept[n] for n in numbers])


def masked(
    entry: Masked, tensors: Mapping[str, Tensor], note: str, *, stacked: bool
) -> Callable[[Batch, Tensor, Tensor], Tensor]:
    """What side memories do to the output y of their map, given its input x; see the module.

    `note`: under which name the choice [B] is kept, -1 for none. A batch that neither has it nor
    holds a row's last prompt token leaves the row as it is: the prompt has to run whole. With
    `stacked` tensors lead with E, each row looks into the memories of its own edit, none into those
    of edit -1. Raises ShapeMismatch where a mask and its values differ in number.
    """
    memories = _Memories(entry, tensors)
    per_edit = len(entry.counts)

    def chosen(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """[B] the memory of each row, from the tokens that count alone; -1: none."""
        tokens = prompt_tokens(batch, entry.statistic)
        order = (~tokens).int().argsort(dim=1, stable=True)
        order = order[:, : max(1, int(tokens.sum(1).max()))]
        tokens = tokens.gather(1, order)
        x, y = (
            part.gather(1, order[..., None].expand(*order.shape, part.shape[-1])) for part in (x, y)
        )
        edit = batch.edit if stacked else torch.zeros_like(batch.edit)
        home, inside = edit.clamp_min(0), batch.prompt.any(1) & (edit >= 0)
        best = torch.full((len(edit),), -torch.inf, device=edit.device)
        route = torch.full_like(edit, -1)
        for memory in range(per_edit):
            maps = memories.of(range(memory, len(memories.masks), per_edit))
            more = grouped_linear(x, maps, edit) if stacked else F.linear(x, maps[0])
            found = activation_of(distances(y, more, entry.activation), tokens, entry.statistic)
            wins = inside & (found >= memories.thresholds[home, memory]) & (found > best)
            best, route = torch.where(wins, found, best), torch.where(wins, memory, route)
        return route

    def added(batch: Batch, x: Tensor) -> Tensor:
        """[B L O] what the memory that each row has taken adds."""
        route = batch.notes[note]
        edit = batch.edit.clamp_min(0) if stacked else 0
        number = torch.where(route < 0, -1, edit * per_edit + route)
        present, index = number.unique(return_inverse=True)
        maps = memories.of([max(0, n) for n in present.tolist()])
        return grouped_linear(x, maps, torch.where(number < 0, -1, index))

    def rewrite(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        rows = batch.mask.shape
        given, out = x.reshape(*rows, -1).float(), y.reshape(*rows, -1)
        if note not in batch.notes:  # a dict of this run's own: see `Change`
            batch.notes[note] = chosen(batch, given, out)  # type: ignore[index]
        more = added(batch, given)
        return (out + more).to(y.dtype).view(y.shape)

    return rewrite


def change(model: Model, header: Header, entry: Masked, tensors: Mapping[str, Tensor]) -> Change:
    """The kind's line in `bind.KINDS`. Raises UnknownSite unless its site is a map of a layer."""
    path = module_of(canonical(model.card, entry.name))
    if path not in model.card.linears or runs_below(model.card, path):
        raise UnknownSite(
            f"side memories must be of a linear map in the decoder of {model.card.id}, and "
            f"{path!r} is none."
        )
    note = f"{entry.name}.memory{len(model.deltas)}"  # one delta may lie on another
    rewrite = masked(entry, tensors, note, stacked=bool(header.stack))
    last = model.card.layer_of(path) in (None, model.card.num_layers - 1)

    def wrap(bound: Model) -> Model:
        # Routing reads the whole prompt at the site, which a thinned batch no longer has.
        return bound._replace(thin=lambda params, batch, rewrites=None, **options: batch)

    return Change(
        rewrites=lambda batch: {path: lambda x, y: rewrite(batch, x, y)},
        wrap=wrap if last else None,
    )


# The algebra: memories are kept or left whole.


def _join(given: Sequence[Part | int]) -> Part:
    """All memories side by side: of those that reach their threshold the one furthest off wins."""
    found = [part for part in given if isinstance(part, Part)]
    first = found[0].entry
    for what in ("activation", "statistic"):
        if any(getattr(part.entry, what) != getattr(first, what) for part in found):
            raise BadInput(f"{first.name}: the memories measure by another {what}.")
    owners, _ = owned(given, lambda entry: len(entry.counts))
    counts = tuple(count for part in found for count in part.entry.counts)
    entry = msgspec.structs.replace(first, counts=counts, owners=owners)
    tensors = {s: torch.cat([part.tensors[s] for part in found]) for s in found[0].tensors}
    return Part(entry, tensors, len(owners))


def _keep(part: Part, keep: Sequence[int]) -> Part | None:
    """Memories whose edits are all kept; those that no kept edit owns go."""
    entry = part.entry
    memories, owners = kept(entry.owners, keep)
    lost = {entry.owners[k] for k in set(range(part.edits)) - set(keep)}
    shared = lost & set(memories)
    if shared:
        raise KindUnsupported(
            f"{entry.name}: edits of one side memory are trained into the same values, and "
            f"{len(shared)} memory(s) would have to lose some and keep others: edit with "
            "save_every=1, take all edits of a memory out together, or edit again without them."
        )
    if not memories:
        return None
    ends = torch.tensor(entry.counts).cumsum(0).tolist()
    values = [part.tensors[".values"][ends[m] - entry.counts[m] : ends[m]] for m in memories]
    counts = tuple(entry.counts[m] for m in memories)
    fewer = msgspec.structs.replace(entry, counts=counts, owners=owners)
    tensors = {
        ".mask": part.tensors[".mask"][memories],
        ".values": torch.cat(values),
        ".thresholds": part.tensors[".thresholds"][memories],
    }
    return Part(fewer, tensors, len(keep))


def _scale(part: Part, factor: float) -> Part:
    raise KindUnsupported(
        f"{part.entry.name}: half of a side memory would reach its threshold for other questions "
        "than the whole: edit again, or remove edits by id."
    )


register(Masked, Algebra(_join, _keep, _scale))
