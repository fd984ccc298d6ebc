"""Low-rank experts at a decoder layer's output, and the gate that chooses among them: LiveEdit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from errata.functional.header import FLOAT_DTYPES, SlotEntry, TensorSpec, invalid_names

if TYPE_CHECKING:
    from errata.functional.header import Header  # noqa: TID252

__all__ = ["Experts", "RoutingInput"]

RoutingInput = Literal["query", "query_and_vision"]
"""By which features chosen experts are weighed: the query's, or the query's and the vision's."""


class Experts(SlotEntry, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="experts"):
    """Low-rank experts added to a decoder layer's output, routed by a row's prompt and image.

    Each of the N experts has keys `vision_keys` [N SK+2] and `query_keys` [N SK] ([N 2SK] with
    `routing_input` "query_and_vision"), and factors `down`, `up` [N R D]. All other tensors compute
    the features of a row (S query tokens of width K each) and are shared by all edits.
    `edit_slots[k]` is the expert of edit k, -1 where a later edit replaced it. The formulas are in
    `apply.py`.
    """

    name: str  # a weight of the layer
    checkpoint_name: str
    shape: tuple[int, ...]  # of that weight as stored
    num_experts: int
    rank: int
    hidden_size: int  # D
    num_query_tokens: int  # S
    feature_dim: int  # K
    num_heads: int  # H, of the cross-attentions that read features
    num_sentinel_tokens: int  # tokens of the sentinel image
    num_text_sentinel_tokens: int  # tokens of the sentinel of rows without an image
    routing_input: RoutingInput = "query"
    top_k: int = 0  # experts of one row, the heaviest; 0: all that are chosen

    def tensor_specs(self) -> dict[str, TensorSpec]:
        count, hidden_size, feature_dim = self.num_experts, self.hidden_size, self.feature_dim
        key_size, num_queries = (
            self.num_query_tokens * feature_dim,
            self.num_query_tokens * self.num_heads,
        )
        shapes = {
            "vision_keys": (count, key_size + 2),
            "query_keys": (
                count,
                key_size * (2 if self.routing_input == "query_and_vision" else 1),
            ),
            "down": (count, self.rank, hidden_size),
            "up": (count, self.rank, hidden_size),
            "input_norm": (2, hidden_size),
            "prompt.norm": (2, hidden_size),
            "prompt.queries": (num_queries, hidden_size),
            "prompt.value": (feature_dim, hidden_size),
            "prompt.value_bias": (feature_dim,),
            "vision.query": (feature_dim, feature_dim),
            "vision.query_bias": (feature_dim,),
            "vision.key": (feature_dim, hidden_size),
            "vision.value": (feature_dim, hidden_size),
            "vision.value_bias": (feature_dim,),
            "query.norm": (2, hidden_size),
            "query.queries": (num_queries, hidden_size),
            "query.value": (feature_dim, hidden_size),
            "query.value_bias": (feature_dim,),
            "sentinel": (self.num_sentinel_tokens, hidden_size),
            "sentinel_text": (self.num_text_sentinel_tokens, hidden_size),
        }
        return {f"{self.name}.{part}": (FLOAT_DTYPES, shape) for part, shape in shapes.items()}

    def validate(self, header: Header) -> Iterator[str]:
        yield from invalid_names(self.name, self.checkpoint_name)
        if not self.shape or min(self.shape) < 1:
            yield f"{self.name}: the shape must be of positive sizes, is {list(self.shape)[:4]}"
        sizes = (
            "num_experts",
            "rank",
            "hidden_size",
            "num_query_tokens",
            "feature_dim",
            "num_heads",
            "num_sentinel_tokens",
            "num_text_sentinel_tokens",
        )
        too_small = [what for what in sizes if getattr(self, what) < 1]
        if too_small:
            yield f"{self.name}: {', '.join(too_small)} must be at least 1"
        elif self.feature_dim % self.num_heads:
            yield f"{self.name}: {self.num_heads} num_heads must divide the feature_dim {self.feature_dim}"  # noqa: E501
        if self.top_k < 0:
            yield f"{self.name}: top_k must be 0 or more, is {self.top_k}"
        yield from self.slot_violations(header, self.num_experts, "expert")

    def shared_tensors(self) -> frozenset[str]:
        per_edit = {f"{self.name}.{part}" for part in ("vision_keys", "query_keys", "down", "up")}
        return frozenset(self.tensor_specs()) - per_edit
