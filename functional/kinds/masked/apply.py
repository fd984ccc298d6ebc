"""Side memories of a linear map, as a routed hook: which memory each row uses, and its product.

    d_mt = |phi(y_t + D_m x_t) - phi(y_t)|_2       at each token t of a row's own prompt
    a_m  = the `statistic` of d_mt over them
    m*   = argmax a_m over {m : a_m >= threshold_m};   y'_t = y_t + D_m* x_t at every token

and y' = y where no memory reaches its threshold. Images, padding and the answer, given or
generated, have no influence: a row is routed once, where its prompt runs, and later tokens reuse
`Batch.routing`.

After WISE (Wang et al. 2024, arXiv 2405.14768), EasyEdit `models/wise/WISE.py`, whose distance is a
mean over the whole row, answer and padding included, when it edits, and the largest of all tokens
when it answers rows of more than 100. Legend: B rows · L tokens · M memories · E edits · O out ·
I in · N = O I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.card import module_path
from errata.functional.errors import ShapeError, UnknownSiteError
from errata.functional.forward.grouped_linear import grouped_linear
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Decision, Patch, RoutedHook
from errata.functional.kinds.masked.bitmask import scatter_values, unpack_bits
from errata.functional.kinds.masked.entry import Masked
from errata.functional.types import Batch, Model

__all__ = [
    "ACTIVATIONS",
    "activation_distance",
    "apply_masked",
    "gate_statistic",
    "gated_tokens",
    "side_memory_hook",
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

_MAX_CACHED_ELEMENTS = (
    1 << 26
)  # elements of maps that a bound model keeps multiplied out; others are made anew
_LONG_PROMPT = 100  # tokens from which EasyEdit takes the largest distance


def gated_tokens(batch: Batch, statistic: str) -> Tensor:
    """The tokens whose distances count for the gate: those of the prompt, up to its last.

    Args:
        batch: The rows that are run.
        statistic: `last` takes the prompt's last token, `text` leaves out image tokens.

    Returns:
        Mask [B L].
    """
    if statistic == "last":
        return batch.prompt_end
    in_prompt = (batch.prompt_end.int().flip(1).cumsum(1).flip(1) > 0) & batch.attention_mask
    return in_prompt & ~batch.image_mask if statistic == "text" else in_prompt


def activation_distance(y: Tensor, change: Tensor, activation: str) -> Tensor:
    """How far a change moves the activation: |phi(y + change) - phi(y)|_2 over the last axis, in
    fp32.

    Args:
        y: Outputs of the map, [..., O].
        change: What would be added to them, [..., O].
        activation: Name of phi.

    Returns:
        Distances [...].
    """
    phi = ACTIVATIONS[activation]
    y = y.float()
    return torch.linalg.vector_norm(phi(y + change.float()) - phi(y), dim=-1)


def gate_statistic(distances: Tensor, tokens: Tensor, statistic: str) -> Tensor:
    """Reduce the distances of a row's tokens to one number.

    Args:
        distances: One per token, [..., L].
        tokens: Which tokens count, [..., L].
        statistic: `easyedit` takes the maximum of long prompts; all others the mean.

    Returns:
        [...].
    """
    count = tokens.sum(-1)
    mean = torch.where(tokens, distances, 0).sum(-1) / count.clamp_min(1)
    if statistic != "easyedit":
        return mean
    return torch.where(count > _LONG_PROMPT, torch.where(tokens, distances, 0).amax(-1), mean)


class _SideMemories:
    """The maps of all memories: of edit e and memory m number e * M + m."""

    def __init__(self, entry: Masked, tensors: Mapping[str, Tensor]) -> None:
        masks, values, thresholds = (
            tensors[f"{entry.name}.{part}"] for part in ("mask", "values", "thresholds")
        )
        self.size, self.num_values = entry.size, entry.num_values
        self.masks = masks.flatten(0, -2)  # [E*M ceil(N/8)]
        self.values = [
            v for row in values.view(-1, sum(self.num_values)) for v in row.split(self.num_values)
        ]
        self.thresholds = thresholds.float().view(-1, len(self.num_values))  # [E M]
        self._check(entry)
        fits_in_cache = len(self.masks) * self.size[0] * self.size[1] <= _MAX_CACHED_ELEMENTS
        self.dense_maps = (
            [self.build_map(number) for number in range(len(self.masks))] if fits_in_cache else None
        )

    def _check(self, entry: Masked) -> None:
        bits_set = torch.stack(
            [unpack_bits(mask, self.size[0] * self.size[1]).sum() for mask in self.masks]
        )
        expected = bits_set.new_tensor(self.num_values).repeat(len(self.thresholds))
        if not torch.equal(bits_set, expected):
            raise ShapeError(
                f"{entry.name}: each mask must have as many bits set as its memory has values "
                f"({expected.tolist()[:8]}), and they have {bits_set.tolist()[:8]}."
            )

    def build_map(self, number: int) -> Tensor:
        return scatter_values(self.masks[number], self.values[number].float(), self.size)

    def stack_maps(self, numbers: Sequence[int]) -> Tensor:
        """[n O I]"""
        dense_maps = self.dense_maps
        return torch.stack(
            [self.build_map(n) if dense_maps is None else dense_maps[n] for n in numbers]
        )


def side_memory_hook(entry: Masked, tensors: Mapping[str, Tensor], *, stacked: bool) -> RoutedHook:
    """Make the hook of side memories at the output y of their map, given its input x.

    The decision is "memory" [B]: the memory of each row, -1 for none. A batch without a row's last
    prompt token leaves the row as it is, so the prompt has to run whole.

    Args:
        entry: The entry.
        tensors: Its tensors, with a leading edit axis if `stacked`.
        stacked: Whether each row uses the memories of its own edit (none for edit -1).

    Returns:
        The hook.

    Raises:
        ShapeError: If a mask and its values differ in number.
    """
    memories = _SideMemories(entry, tensors)
    memories_per_edit = len(entry.num_values)

    def choose_memory(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """[B] the memory of each row, from the tokens that count alone; -1: none."""
        tokens = gated_tokens(batch, entry.gate_statistic)
        order = (~tokens).int().argsort(dim=1, stable=True)
        order = order[:, : max(1, int(tokens.sum(1).max()))]
        tokens = tokens.gather(1, order)
        x, y = (
            part.gather(1, order[..., None].expand(*order.shape, part.shape[-1])) for part in (x, y)
        )
        edit_index = batch.edit_index if stacked else torch.zeros_like(batch.edit_index)
        edit_row, is_routed = edit_index.clamp_min(0), batch.prompt_end.any(1) & (edit_index >= 0)
        best = torch.full(
            (len(edit_index),), -torch.inf, device=edit_index.device, dtype=torch.float32
        )
        memory_index = torch.full_like(edit_index, -1)
        for memory in range(memories_per_edit):
            maps = memories.stack_maps(range(memory, len(memories.masks), memories_per_edit))
            change = grouped_linear(x, maps, edit_index) if stacked else F.linear(x, maps[0])
            score = gate_statistic(
                activation_distance(y, change, entry.activation), tokens, entry.gate_statistic
            )
            is_better = (
                is_routed & (score >= memories.thresholds[edit_row, memory]) & (score > best)
            )
            best, memory_index = (
                torch.where(is_better, score, best),
                torch.where(is_better, memory, memory_index),
            )
        return memory_index

    def memory_output(batch: Batch, x: Tensor, memory_index: Tensor) -> Tensor:
        """Return the output of each row's side memory [B L O]."""
        edit_index = batch.edit_index.clamp_min(0) if stacked else 0
        map_index = torch.where(memory_index < 0, -1, edit_index * memories_per_edit + memory_index)
        used_maps, index = map_index.unique(return_inverse=True)
        maps = memories.stack_maps([max(0, n) for n in used_maps.tolist()])
        return grouped_linear(x, maps, torch.where(map_index < 0, -1, index))

    def decide(batch: Batch, x: Tensor, y: Tensor) -> Decision:
        rows = batch.attention_mask.shape
        inputs = x.reshape(*rows, -1).float()
        return {"memory": choose_memory(batch, inputs, y.reshape(*rows, -1))}

    def apply(batch: Batch, x: Tensor, y: Tensor, decision: Decision) -> Tensor:
        rows = batch.attention_mask.shape
        change = memory_output(batch, x.reshape(*rows, -1).float(), decision["memory"])
        return (y.reshape(*rows, -1) + change).to(y.dtype).view(y.shape)

    return RoutedHook(decide, apply)


def apply_masked(
    model: Model, header: Header, entry: Masked, tensors: Mapping[str, Tensor]
) -> Patch:
    """Build the patch of side memories: routed changes of one linear map.

    Args:
        model: Model to bind to.
        header: Header of the delta.
        entry: Entry of the delta.
        tensors: Tensors of the delta.

    Returns:
        A patch with one routed hook.

    Raises:
        UnknownSiteError: If the site is not a linear map of a decoder layer.
    """
    path = module_path(model.card.canonical_name(entry.name))
    if path not in model.card.linear_shapes or model.card.before_decoder(path):
        raise UnknownSiteError(
            f"side memories must be of a linear map in the decoder of {model.card.id}, and "
            f"{path!r} is none."
        )
    hook = side_memory_hook(entry, tensors, stacked=bool(header.stack))
    last = model.card.layer_of(path) in (None, model.card.num_layers - 1)

    def wrap(bound: Model) -> Model:
        # Routing reads the whole prompt at the site, which a batch of scored positions lacks.
        return bound._replace(select_scored=lambda params, batch, hooks=None, **options: batch)

    return Patch(
        routed_hooks={path: hook},
        wrap=wrap if last else None,
    )
