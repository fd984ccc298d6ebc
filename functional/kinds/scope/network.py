"""The small network of a `scope` entry: a scope classifier and a counterfactual model.

The base's rows at depth 0 (token embeddings, frozen visual features) are projected from width D to
d, by one map for words and one for images; nothing else of the base is used. They are read by

    classifier       a transformer over the prompt's words, and linear maps of its images: a key e
    counterfactual   a causal transformer over [an edit's memory ; the question's row], whose output
                     is mapped back to D, with a pointer that copies from the edit's answer

Both have pre-norm layers of h + attention and h + W_down gelu(W_up norm(h)).

Legend: B rows · L tokens · D, d width of base and network · K width of a key · m image queries ·
A, P longest answer, longest prompt · N layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional.kinds.scope.entry import NetworkSizes
from errata.functional.types import Batch

__all__ = [
    "EditMemory",
    "NetworkInputs",
    "ScopeNetwork",
    "TransformerStack",
    "classify_scope",
    "counterfactual_states",
    "encode_edit",
    "init_network",
    "load_network",
    "network_inputs",
    "network_state_dict",
    "project_down",
    "read_answer",
]

_MASKED_SCORE = -1e9  # a score that no softmax sees


class TransformerStack(NamedTuple):
    """Layers of a transformer."""

    norms: Tensor  # [N 2 d]
    qkv: Tensor  # [N 3d d]
    attention_output: Tensor  # [N d d]
    up: Tensor  # [N f d]
    down: Tensor  # [N d f]


class ScopeNetwork(NamedTuple):
    """All weights; everything that is trained."""

    down_projection: Tensor  # [2 d D]: words, images
    down_projection_bias: Tensor  # [2 d]
    segment_embeddings: (
        Tensor  # [5 d]: the edit's reply, scene, prompt; the question's scene, words
    )
    image_queries: Tensor  # [m d]
    image_key_value: Tensor  # [2d d]
    image_to_key: Tensor  # [K d]
    text_to_key: Tensor  # [K 2d]
    final_norms: Tensor  # [2 d]: after each transformer
    pointer_query: Tensor  # [d d]
    pointer_key: Tensor  # [d d]
    pointer_position_bias: Tensor  # []
    up_projection: Tensor  # [D d]
    classifier: TransformerStack
    counterfactual: TransformerStack


class NetworkInputs(NamedTuple):
    """Questions as the network sees them."""

    states: Tensor  # [B L d]
    attention_mask: Tensor  # [B L] bool
    image_mask: Tensor  # [B L] bool
    prompt_end: Tensor  # [B L] bool, True on the last prompt token


class EditMemory(NamedTuple):
    """What is kept of an edit, in the small width: rows of zeros are padding."""

    answer_states: Tensor  # [B A d]
    image_states: Tensor  # [B m d]
    prompt_states: Tensor  # [B P d]


def init_network(sizes: NetworkSizes, generator: torch.Generator) -> ScopeNetwork:
    """An untrained network, whose pointer repeats the edit's answer word by word.

    Args:
        sizes: Widths and depths.
        generator: Source of the random weights.

    Returns:
        Fresh weights.
    """

    def sample(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in ("down_projection_bias", "pointer_query", "up_projection"):
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        if name.endswith("norms"):
            return torch.ones(shape, dtype=torch.float32, device="cpu")
        if name == "pointer_position_bias":
            return torch.tensor(8.0, dtype=torch.float32, device="cpu")
        scale = 0.5 if name in ("segment_embeddings", "image_queries") else shape[-1] ** -0.5
        if name.endswith(("attention_output", "down", "text_to_key")):
            scale *= 0.5
        if name == "image_to_key":  # images begin about as far apart as a gate's threshold
            scale *= 0.2
        return scale * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    return load_network(
        {name: sample(name, shape) for name, shape in sizes.weight_shapes().items()}
    )


def load_network(weights: Mapping[str, Tensor]) -> ScopeNetwork:
    """Build a network from its weights by name.

    Args:
        weights: Weights, named as in `NetworkSizes.weight_shapes`.

    Returns:
        The network.
    """

    def stack(name: str) -> TransformerStack:
        return TransformerStack(*(weights[f"{name}.{part}"] for part in TransformerStack._fields))

    tensors = {
        name: weights[name]
        for name in ScopeNetwork._fields
        if name not in ("classifier", "counterfactual")
    }
    return ScopeNetwork(
        **tensors, classifier=stack("classifier"), counterfactual=stack("counterfactual")
    )


def network_state_dict(network: ScopeNetwork) -> dict[str, Tensor]:
    """The weights of a network by name, as `load_network` takes them.

    Args:
        network: The network.

    Returns:
        Weights by name.
    """
    weights: dict[str, Tensor] = {}
    for name, value in network._asdict().items():
        if isinstance(value, TransformerStack):
            weights |= {f"{name}.{part}": tensor for part, tensor in value._asdict().items()}
        else:
            weights[name] = value
    return weights


def project_down(network: ScopeNetwork, hidden_states: Tensor, image_mask: Tensor) -> Tensor:
    """Project the base model's hidden states to the width of the network, in fp32.

    Normalised first: the hidden states of images are thousands of times as long as those of words.

    Args:
        network: The network.
        hidden_states: [B L D].
        image_mask: Image tokens, [B L].

    Returns:
        [B L d].
    """
    x = F.layer_norm(hidden_states.float(), hidden_states.shape[-1:])
    projections = [
        F.linear(x, network.down_projection[n], network.down_projection_bias[n]) for n in (0, 1)
    ]
    return torch.where(image_mask[..., None], projections[1], projections[0])


def network_inputs(network: ScopeNetwork, batch: Batch) -> NetworkInputs:
    """The network's inputs: a batch's embeddings projected down, and its masks.

    Args:
        network: The network.
        batch: Rows before the first layer.

    Returns:
        Inputs of the classifier and the counterfactual model.
    """
    return NetworkInputs(
        project_down(network, batch.hidden_states, batch.image_mask),
        batch.attention_mask,
        batch.image_mask,
        batch.prompt_end,
    )


def classify_scope(
    network: ScopeNetwork, num_heads: int, inputs: NetworkInputs, max_words: int | None = None
) -> Tensor:
    """Embed questions for the scope classifier, from words and images of the prompt alone.

        e = [W_see mean of images ; W_read [mean of words ; max of words]]

    Images pass through linear maps alone: a transformer over them memorises its training images.
    Words pass through the transformer.

    Args:
        network: The network.
        num_heads: Attention heads.
        inputs: Rows to embed.
        max_words: An upper bound of a prompt's words; fewer positions are then run.

    Returns:
        [B 2K].
    """
    in_prompt = inputs.attention_mask & _in_prompt(inputs)
    words, x = in_prompt & ~inputs.image_mask, inputs.states
    image_mean = _masked_mean(x, in_prompt & inputs.image_mask)
    if max_words is not None:
        order = (~words).int().argsort(dim=1, stable=True)[:, :max_words]  # [B P]
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        words = words.gather(1, order)
    x = x + _position_encoding(words.cumsum(1), x.shape[-1])
    x = _norm(
        _run_layers(network.classifier, num_heads, x, words[:, None, None]), network.final_norms[0]
    )
    highest = torch.where(words[..., None], x, _MASKED_SCORE).amax(1) * words.any(1)[:, None]
    return torch.cat(
        [
            image_mean @ network.image_to_key.mT,
            torch.cat([_masked_mean(x, words), highest], -1) @ network.text_to_key.mT,
        ],
        -1,
    )


def encode_edit(
    network: ScopeNetwork, inputs: NetworkInputs, logit_positions: Tensor, scored_mask: Tensor
) -> EditMemory:
    """Encode edits for the memory: answers, pooled images, words of the prompts.

    Args:
        network: The network.
        inputs: Rows of the edits.
        logit_positions: Positions that predict the answer's tokens, [B A].
        scored_mask: Which of them count, [B A].

    Returns:
        What the counterfactual model attends to.
    """
    d = inputs.states.shape[-1]
    answer_positions = (
        (logit_positions + 1).clamp_max(inputs.states.shape[1] - 1)[..., None].expand(-1, -1, d)
    )
    steps = torch.arange(logit_positions.shape[1], device=logit_positions.device, dtype=torch.int64)
    answer_states = (
        inputs.states.gather(1, answer_positions)
        + _position_encoding(steps, d)
        + network.segment_embeddings[0]
    )
    words = inputs.attention_mask & _in_prompt(inputs) & ~inputs.image_mask
    max_words = max(1, int(words.sum(1).max()))
    order = (~words).int().argsort(dim=1, stable=True)[:, :max_words]  # [B P]
    prompt_states = inputs.states.gather(1, order[..., None].expand(-1, -1, d))
    prompt_states = (
        prompt_states
        + _position_encoding(
            torch.arange(max_words, device=logit_positions.device, dtype=torch.int64), d
        )
        + network.segment_embeddings[2]
    )
    image_states, has_image = _pool_images(network, inputs)
    return EditMemory(
        answer_states * scored_mask[..., None],
        (image_states + network.segment_embeddings[1]) * has_image[:, None, None],
        prompt_states * words.gather(1, order)[..., None],
    )


def counterfactual_states(
    network: ScopeNetwork, num_heads: int, inputs: NetworkInputs, memory: EditMemory
) -> tuple[Tensor, Tensor]:
    """What the counterfactual model makes of each position: a state and a pointer into the answer.

    With g the states of the edit's answer and p the distance of position t from the prompt's last
    token, the pointer is

        softmax_j( (W_ask h_t) . (W_match g_j) / sqrt(d) + near [j = p] )

    with one more slot, `nothing`, which is favoured after the end of the answer.

    Args:
        network: The network.
        num_heads: Attention heads.
        inputs: Rows of the questions.
        memory: The edit of each row.

    Returns:
        States h [B L d] and pointers [B L A].
    """
    d, length = inputs.states.shape[-1], inputs.states.shape[1]
    image_states, has_image = _pool_images(network, inputs)
    words = inputs.attention_mask & ~inputs.image_mask
    x = inputs.states + _position_encoding(words.cumsum(1) - 1, d) + network.segment_embeddings[4]
    memory_states = torch.cat([memory.answer_states, memory.image_states, memory.prompt_states], 1)
    sequence = torch.cat([memory_states, image_states + network.segment_embeddings[3], x], 1)
    is_real = torch.cat(
        [(memory_states != 0).any(-1), has_image[:, None].expand(-1, image_states.shape[1]), words],
        1,
    )
    # An edit's memory sees itself, the scene that too, a word both and the words before it.
    segment_lengths = (memory_states.shape[1], image_states.shape[1], length)
    segment = torch.repeat_interleave(
        torch.arange(3, device=x.device, dtype=torch.int64),
        torch.tensor(segment_lengths, device=x.device, dtype=torch.int64),
    )
    position = torch.arange(len(segment), device=x.device, dtype=torch.int64)
    attention_mask = (segment[None] < segment[:, None]) | (
        (segment[None] == segment[:, None]) & (segment[None] < 2)
    )
    attention_mask = attention_mask | (
        (segment[:, None] == 2) & (position[None] <= position[:, None])
    )
    h = _norm(
        _run_layers(
            network.counterfactual,
            num_heads,
            sequence,
            (attention_mask & is_real[:, None])[:, None],
        ),
        network.final_norms[1],
    )
    answer_states, h = h[:, : memory.answer_states.shape[1]], h[:, -length:]
    is_answer = (memory.answer_states != 0).any(-1)  # [B A]
    distance = _tokens_after_prompt(inputs)[..., None]  # [B L 1]
    scores = (h @ network.pointer_query.mT) @ (answer_states @ network.pointer_key.mT).mT / d**0.5
    scores = scores + network.pointer_position_bias * (
        torch.arange(is_answer.shape[1], device=x.device, dtype=torch.int64) == distance
    )
    scores = scores.masked_fill(~is_answer[:, None], _MASKED_SCORE)
    no_copy = network.pointer_position_bias * (distance >= is_answer.sum(1)[:, None, None])
    return h, torch.cat([scores, no_copy], -1).softmax(-1)[..., :-1]


def read_answer(
    network: ScopeNetwork, states: Tensor, pointer: Tensor, answer_outputs: Tensor
) -> Tensor:
    """The residual stream that is read as the answer: the copied part and the generated part.

    Args:
        network: The network.
        states: States h, [B T d].
        pointer: Weights over the answer's tokens, [B T A].
        answer_outputs: Residual streams that are read as the answer's tokens, [B A D].

    Returns:
        [B T D].
    """
    return pointer @ answer_outputs.float() + states @ network.up_projection.mT


def _in_prompt(inputs: NetworkInputs) -> Tensor:
    """[B L] the tokens up to the prompt's last; all where it is not in the row."""
    return inputs.prompt_end.cumsum(1) - inputs.prompt_end.int() == 0


def _tokens_after_prompt(inputs: NetworkInputs) -> Tensor:
    """[B L] the number of real tokens from the prompt's last, exclusive, to each; below it, -1."""
    begun = inputs.prompt_end.cumsum(1) > 0
    return (inputs.attention_mask & begun).cumsum(1) - 1


def _pool_images(network: ScopeNetwork, inputs: NetworkInputs) -> tuple[Tensor, Tensor]:
    """The images of each row as m rows [B m d], and whether there are any [B]."""
    is_image = inputs.attention_mask & inputs.image_mask & _in_prompt(inputs)
    keys, values = F.linear(inputs.states, network.image_key_value).chunk(2, -1)
    scores = (network.image_queries @ keys.mT) / keys.shape[-1] ** 0.5  # [B m L]
    pooled = scores.masked_fill(~is_image[:, None], _MASKED_SCORE).softmax(-1) @ values
    has_image = is_image.any(1)
    return pooled * has_image[:, None, None], has_image


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    total = torch.where(mask[..., None], x, 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp_min(1)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * gain


def _run_layers(
    stack: TransformerStack, num_heads: int, x: Tensor, attention_mask: Tensor
) -> Tensor:
    """The layers; `sees` [B 1 L L] (or [B 1 1 L]) which token may look at which."""
    for norms, qkv_weight, output_weight, up, down in zip(*stack):
        qkv = F.linear(_norm(x, norms[0]), qkv_weight).unflatten(-1, (3, num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B H L d/H]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        x = x + F.linear(attended.transpose(1, 2).flatten(2), output_weight)
        x = x + F.linear(F.gelu(F.linear(_norm(x, norms[1]), up)), down)
    return x


def _position_encoding(index: Tensor, dim: int) -> Tensor:
    """Sines and cosines of positions: [...] -> [... width]."""
    half = (dim + 1) // 2
    rates = torch.exp(-torch.arange(half, device=index.device, dtype=torch.float32) * (6.0 / half))
    angles = index[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :dim]
