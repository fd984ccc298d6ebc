"""Entry of a low-rank change B A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from errata.functional.card import module_path
from errata.functional.header import FLOAT_DTYPES, Entry, TensorSpec, invalid_names

if TYPE_CHECKING:
    from errata.functional.card import ModelCard
    from errata.functional.header import Header

__all__ = ["LowRank"]


class LowRank(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lowrank"):
    """Low-rank change of a linear map: dW = B A, dW [out in].

    Tensors `<name>.A` [r in] and `<name>.B` [out r]; any scale is folded into B. `edit_ranks[k]` of
    the r rows belong to edit k, in order (sum == r); empty where the rank is shared by all edits.
    `transposed`: the parameter is stored [in out].
    """

    name: str
    checkpoint_name: str
    shape: tuple[int, ...]  # of the parameter as stored
    rank: int
    edit_ranks: tuple[int, ...] = ()
    shared_ranks: tuple[int, ...] = ()  # stacked: the first rows belong to these shared edits
    transposed: bool = False

    def changed_names(self, card: ModelCard, header: Header) -> list[str]:
        """The names of the parameter that the change acts on.

        As in PEFT: added to the outputs of the linear map that it names, a change leaves the other
        uses of a tied weight (an embedding, say) as they are. Added to the weight, it changes all.

        Args:
            card: Card of the model.
            header: Header of the delta.

        Returns:
            Paths of parameters.
        """
        path = module_path(self.name)
        has_one_side = card.before_decoder(path) != card.in_decoder(path)
        if header.arithmetic != "weight" and path in card.linear_shapes and has_one_side:
            return [self.name]
        return card.all_names(self.name)

    def is_weight_change(self) -> bool:
        return True

    def tensor_specs(self) -> dict[str, TensorSpec]:
        out, inner = reversed(self.shape) if self.transposed else self.shape
        return {
            f"{self.name}.A": (FLOAT_DTYPES, (self.rank, inner)),
            f"{self.name}.B": (FLOAT_DTYPES, (out, self.rank)),
        }

    def validate(self, header: Header) -> Iterator[str]:
        yield from invalid_names(self.name, self.checkpoint_name)
        if len(self.shape) != 2 or min(self.shape) < 1:
            yield f"{self.name}: the shape must be two positive sizes, is {list(self.shape)[:4]}"
        if self.rank < 1:
            yield f"{self.name}: the rank must be at least 1, is {self.rank}"
        if self.shared_ranks and len(self.shared_ranks) != len(header.shared_edits):
            yield (
                f"{self.name}: shared_ranks must name a number of rows for each of the "
                f"{len(header.shared_edits)} shared edits, names {len(self.shared_ranks)}"
            )
        elif self.shared_ranks and not (
            min(self.shared_ranks) >= 0 and sum(self.shared_ranks) <= self.rank
        ):
            yield f"{self.name}: shared_ranks must be counts of at most {self.rank} rows"
        if not self.edit_ranks:
            return
        if header.stack:
            yield f"{self.name}: edit_ranks must be empty in a stacked delta"
        elif len(self.edit_ranks) != len(header.edits):
            yield (
                f"{self.name}: edit_ranks must name a number of rows for each of the "
                f"{len(header.edits)} edits, names {len(self.edit_ranks)}"
            )
        elif min(self.edit_ranks) < 0 or sum(self.edit_ranks) != self.rank:
            yield f"{self.name}: edit_ranks must be counts that add up to the rank {self.rank}"

    def layout(self) -> LowRank:
        return msgspec.structs.replace(self, edit_ranks=(), shared_ranks=())

    def unstack(self, header: Header, edit: int) -> LowRank:
        if header.order_dependent and not self.shared_ranks:
            return self
        own_rank = self.rank - sum(self.shared_ranks)
        edit_ranks = (*self.shared_ranks, own_rank)
        return msgspec.structs.replace(self, edit_ranks=edit_ranks, shared_ranks=())
