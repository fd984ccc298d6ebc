"""A memory of edits, a classifier of what lies in their scope, a model of what they say: SERAC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from .common import FLOATS, Begins, Kind, Want, misnamed

if TYPE_CHECKING:
    from ..header import Header  # noqa: TID252

__all__ = ["Gate", "Scope", "Sizes"]

Gate = Literal["soft", "hard"]
"""How two answers become one: mixed by the similarity, or one of them by a threshold."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the small network, which all edits share."""

    model: int  # D, width of the base's rows
    width: int  # d, its own
    heads: int
    classifier: int  # layers
    counterfactual: int  # layers
    inner: int  # width of a feed-forward part
    key: int  # K, width of either half of what is compared
    looks: int  # m, into how many rows the pictures of a question are summed up

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Every weight by name, and its shape."""
        wide, d, f = self.model, self.width, self.inner

        def stack(name: str, layers: int) -> dict[str, tuple[int, ...]]:
            shapes = {"norms": (2, d), "attend": (3 * d, d), "join": (d, d), "up": (f, d),
                      "down": (d, f)}  # fmt: skip
            return {f"{name}.{part}": (layers, *shape) for part, shape in shapes.items()}

        return {
            "shrink": (2, d, wide), "bias": (2, d), "roles": (5, d), "looks": (self.looks, d),
            "look": (2 * d, d), "see": (self.key, d), "read": (self.key, 2 * d),
            "norms": (2, d), "ask": (d, d), "match": (d, d), "near": (), "out": (wide, d),
            **stack("classify", self.classifier), **stack("say", self.counterfactual),
        }  # fmt: skip

    def faults(self) -> Iterator[str]:
        """What is wrong with the sizes."""
        wrong = [f for f in self.__struct_fields__ if not 1 <= getattr(self, f) <= 1 << 20]
        if wrong:
            yield f"sizes must be from 1 to 2^20, and {', '.join(wrong)} is not"
        elif self.width % self.heads:
            yield f"the width {self.width} must be a multiple of the {self.heads} heads"


class Scope(Kind, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="scope"):
    """Another answer where a question lies in the scope of a remembered edit.

    Tensors `<name>.keys` [N 2K] and, padded behind with rows of zeros, `<name>.replies` [N A d],
    `<name>.scenes` [N m d], `<name>.prompts` [N P d], `<name>.answers` [N A D]: one memory per
    slot. The weights of `sizes` under `<name>.<weight>` are common to all edits. `owners[k]` is the
    slot of edit k, -1 where a later edit of the same question took it over. `name` is the token
    embedding, whose rows the network reads.
    """

    name: str
    checkpoint: str
    shape: tuple[int, ...]
    sizes: Sizes
    slots: int
    replies: int
    prompts: int
    owners: tuple[int, ...] = ()
    gate: Gate = "hard"
    threshold: float = 0.5  # of a hard gate

    def begins(self) -> Begins:
        return "rows"

    def memory(self) -> dict[str, Want]:
        """The tensors that each edit has of its own."""
        sizes = self.sizes
        shapes = {
            "keys": (2 * sizes.key,),
            "replies": (self.replies, sizes.width),
            "scenes": (sizes.looks, sizes.width),
            "prompts": (self.prompts, sizes.width),
            "answers": (self.replies, sizes.model),
        }
        return {f"{self.name}.{p}": (FLOATS, (self.slots, *s)) for p, s in shapes.items()}

    def tensors(self) -> dict[str, Want]:
        weights = self.sizes.weights()
        return self.memory() | {f"{self.name}.{n}": (FLOATS, s) for n, s in weights.items()}

    def common(self) -> frozenset[str]:
        return frozenset(f"{self.name}.{name}" for name in self.sizes.weights())

    def faults(self, header: Header) -> Iterator[str]:
        yield from misnamed(self.name, self.checkpoint)
        yield from (f"{self.name}: {fault}" for fault in self.sizes.faults())
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)[:4]}"
        if min(self.slots, self.replies, self.prompts) < 1:
            yield (
                f"{self.name}: slots, replies and prompts must be at least 1, are {self.slots}, "
                f"{self.replies}, {self.prompts}"
            )
        if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
            yield f"{self.name}: the threshold must lie from 0 to 1, is {self.threshold}"
        if len(self.owners) != len(header.edits):
            yield (
                f"{self.name}: owners must name a slot for each of the {len(header.edits)} edits, "
                f"names {len(self.owners)}"
            )
        elif any(not -1 <= slot < self.slots for slot in self.owners):
            yield f"{self.name}: owners must be slots from 0 to {self.slots - 1}, or -1"

    def shared(self) -> Scope:
        return msgspec.structs.replace(self, owners=())

    @classmethod
    def stacked(cls, given: Sequence[Kind]) -> Scope:
        scopes = [cast(Scope, entry) for entry in given]
        owners = tuple((scope.owners or (-1,))[-1] for scope in scopes)
        return msgspec.structs.replace(scopes[0], owners=owners)

    def picked(self, edits: Sequence[int]) -> Scope:
        return msgspec.structs.replace(self, owners=tuple(self.owners[k] for k in edits))
