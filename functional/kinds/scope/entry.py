"""A memory of edits, a classifier of what lies in their scope, a model of what they say: SERAC."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from errata.functional.header import FLOAT_DTYPES, ActsOn, SlotEntry, TensorSpec, invalid_names

if TYPE_CHECKING:
    from errata.functional.header import Header  # noqa: TID252

__all__ = ["Gate", "NetworkSizes", "Scope"]

Gate = Literal["soft", "hard"]
"""How two answers become one: mixed by the similarity, or one of them by a threshold."""


class NetworkSizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the small network, which all edits share."""

    hidden_size: int  # D, width of the base's rows
    dim: int  # d, its own
    num_heads: int
    num_classifier_layers: int  # layers
    num_counterfactual_layers: int  # layers
    ffn_dim: int  # width of a feed-forward part
    key_dim: int  # K, width of either half of what is compared
    num_image_queries: int  # m, into how many rows the images of a question are summed up

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight by name, and its shape."""
        hidden_size, d, f = self.hidden_size, self.dim, self.ffn_dim

        def stack(name: str, layers: int) -> dict[str, tuple[int, ...]]:
            shapes = {
                "norms": (2, d),
                "qkv": (3 * d, d),
                "attention_output": (d, d),
                "up": (f, d),
                "down": (d, f),
            }
            return {f"{name}.{part}": (layers, *shape) for part, shape in shapes.items()}

        return {
            "down_projection": (2, d, hidden_size),
            "down_projection_bias": (2, d),
            "segment_embeddings": (5, d),
            "image_queries": (self.num_image_queries, d),
            "image_key_value": (2 * d, d),
            "image_to_key": (self.key_dim, d),
            "text_to_key": (self.key_dim, 2 * d),
            "final_norms": (2, d),
            "pointer_query": (d, d),
            "pointer_key": (d, d),
            "pointer_position_bias": (),
            "up_projection": (hidden_size, d),
            **stack("classifier", self.num_classifier_layers),
            **stack("counterfactual", self.num_counterfactual_layers),
        }

    def validate(self) -> Iterator[str]:
        """What is wrong with the sizes."""
        wrong = [f for f in self.__struct_fields__ if not 1 <= getattr(self, f) <= 1 << 20]
        if wrong:
            yield f"sizes must be from 1 to 2^20, and {', '.join(wrong)} is not"
        elif self.dim % self.num_heads:
            yield f"the dim {self.dim} must be a multiple of the {self.num_heads} heads"


class Scope(SlotEntry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="scope"):
    """Another answer where a question is in the scope of a remembered edit.

    Tensors `<name>.keys` [N 2K] and, padded at the end with rows of zeros,
    `<name>.answer_states` [N A d], `<name>.image_states` [N m d], `<name>.prompt_states` [N P d],
    `<name>.answer_outputs` [N A D]: one memory per slot. The weights of `sizes`, under
    `<name>.<weight>`, are shared by all edits. `edit_slots[k]` is the slot of edit k, -1 where
    a later edit of the same question replaced it. `name` is the token embedding, whose rows the
    network reads.
    """

    name: str
    checkpoint_name: str
    shape: tuple[int, ...]
    sizes: NetworkSizes
    num_slots: int
    max_answer_tokens: int
    max_prompt_tokens: int
    gate: Gate = "hard"
    threshold: float = 0.5  # of a hard gate

    def acts_on(self) -> ActsOn:
        return "embeddings"

    def per_edit_tensors(self) -> dict[str, TensorSpec]:
        """The tensors that each edit has of its own."""
        sizes = self.sizes
        shapes = {
            "keys": (2 * sizes.key_dim,),
            "answer_states": (self.max_answer_tokens, sizes.dim),
            "image_states": (sizes.num_image_queries, sizes.dim),
            "prompt_states": (self.max_prompt_tokens, sizes.dim),
            "answer_outputs": (self.max_answer_tokens, sizes.hidden_size),
        }
        return {f"{self.name}.{p}": (FLOAT_DTYPES, (self.num_slots, *s)) for p, s in shapes.items()}

    def tensor_specs(self) -> dict[str, TensorSpec]:
        weights = self.sizes.weight_shapes()
        return self.per_edit_tensors() | {
            f"{self.name}.{n}": (FLOAT_DTYPES, s) for n, s in weights.items()
        }

    def shared_tensors(self) -> frozenset[str]:
        return frozenset(f"{self.name}.{name}" for name in self.sizes.weight_shapes())

    def validate(self, header: Header) -> Iterator[str]:
        yield from invalid_names(self.name, self.checkpoint_name)
        yield from (f"{self.name}: {violation}" for violation in self.sizes.validate())
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)[:4]}"
        if min(self.num_slots, self.max_answer_tokens, self.max_prompt_tokens) < 1:
            yield (
                f"{self.name}: num_slots, max_answer_tokens and max_prompt_tokens must be at "
                f"least 1, are {self.num_slots}, "
                f"{self.max_answer_tokens}, {self.max_prompt_tokens}"
            )
        if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
            yield f"{self.name}: the threshold must lie from 0 to 1, is {self.threshold}"
        yield from self.slot_violations(header, self.num_slots, "slot")
