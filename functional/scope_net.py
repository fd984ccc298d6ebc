"""The small network behind a `scope` entry: what a question is about, and what an edit makes of it.

Rows of the base at depth 0 (token embeddings, frozen visual features) are shrunk from width D to d,
by one map for words and one for pictures; nothing else of the base is seen. On them work

    classify   a transformer over the prompt's words and pictures, pooled to a key e
    say        a causal transformer over [an edit's memory ; the question's row], whose output is
               mapped back to D, with a pointer that copies from the edit's answer

Both have pre-norm layers of h + attention and h + W_down gelu(W_up norm(h)).

Legend: B rows · L tokens · D, d width of base and network · K width of a key · m looks · A, P most
tokens of an answer, of a prompt · N layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .entries import Sizes

__all__ = [
    "Memory", "Net", "Row", "Stack", "answered", "classify", "fresh", "memorise", "named", "net_of",
    "row_of", "say", "shrunk",
]  # fmt: skip

_HIDDEN = -1e9  # a score that no softmax sees


class Stack(NamedTuple):
    """Layers of a transformer."""

    norms: Tensor  # [N 2 d]
    attend: Tensor  # [N 3d d]
    join: Tensor  # [N d d]
    up: Tensor  # [N f d]
    down: Tensor  # [N d f]


class Net(NamedTuple):
    """All weights; everything that is trained."""

    shrink: Tensor  # [2 d D]: words, pictures
    bias: Tensor  # [2 d]
    roles: Tensor  # [5 d]: the edit's reply, scene, prompt; the question's scene, words
    looks: Tensor  # [m d]
    look: Tensor  # [2d d]
    see: Tensor  # [K d]
    read: Tensor  # [K 2d]
    norms: Tensor  # [2 d]: behind each transformer
    ask: Tensor  # [d d]
    match: Tensor  # [d d]
    near: Tensor  # []
    out: Tensor  # [D d]
    classify: Stack
    say: Stack


class Row(NamedTuple):
    """Questions as the network sees them."""

    small: Tensor  # [B L d]
    mask: Tensor  # [B L] bool
    image: Tensor  # [B L] bool
    prompt: Tensor  # [B L] bool, True on the last prompt token


class Memory(NamedTuple):
    """What is kept of an edit, in the small width: rows of zeros are padding."""

    replies: Tensor  # [B A d]
    scenes: Tensor  # [B m d]
    prompts: Tensor  # [B P d]


def fresh(sizes: Sizes, generator: torch.Generator) -> Net:
    """An untrained network: its pointer repeats the edit's answer, word after word."""

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        if name in ("bias", "ask", "out"):
            return torch.zeros(shape)
        if name.endswith("norms"):
            return torch.ones(shape)
        if name == "near":
            return torch.tensor(8.0)
        scale = 0.5 if name in ("roles", "looks") else shape[-1] ** -0.5
        if name.endswith(("join", "down", "read")):
            scale *= 0.5
        if name == "see":  # pictures begin about as far apart as a gate's threshold
            scale *= 0.2
        return scale * torch.randn(shape, generator=generator)

    return net_of({name: drawn(name, shape) for name, shape in sizes.weights().items()})


def net_of(weights: Mapping[str, Tensor]) -> Net:
    """The network of weights by name, as `Sizes.weights` names them."""

    def stack(name: str) -> Stack:
        return Stack(*(weights[f"{name}.{part}"] for part in Stack._fields))

    plain = {name: weights[name] for name in Net._fields if name not in ("classify", "say")}
    return Net(**plain, classify=stack("classify"), say=stack("say"))


def named(net: Net) -> dict[str, Tensor]:
    """The weights by name."""
    found: dict[str, Tensor] = {}
    for name, value in net._asdict().items():
        if isinstance(value, Stack):
            found |= {f"{name}.{part}": tensor for part, tensor in value._asdict().items()}
        else:
            found[name] = value
    return found


def shrunk(net: Net, hidden: Tensor, image: Tensor) -> Tensor:
    """Rows of the base [B L D] in the width of the network [B L d], in fp32.

    Whitened first: what a projector makes of pictures is thousands of times as long as a word.
    """
    x = F.layer_norm(hidden.float(), hidden.shape[-1:])
    both = [F.linear(x, net.shrink[n], net.bias[n]) for n in (0, 1)]
    return torch.where(image[..., None], both[1], both[0])


def row_of(net: Net, batch) -> Row:
    """The rows of a batch at depth 0."""
    return Row(shrunk(net, batch.hidden, batch.image), batch.mask, batch.image, batch.prompt)


def classify(net: Net, heads: int, row: Row, most: int | None = None) -> Tensor:
    """e(question) [B 2K]: from the prompt's words and pictures, never from the answer behind them.

        e = [W_see mean of pictures ; W_read [mean of words ; max of words]]

    Pictures go through linear maps alone: a transformer over them learns the pictures it is shown
    by heart. Words go through the transformer. `most`: no prompt has more words than that, and no
    more are run.
    """
    asked = row.mask & _asked(row)
    words, x = asked & ~row.image, row.small
    seen = _mean(x, asked & row.image)
    if most is not None:
        order = (~words).int().argsort(dim=1, stable=True)[:, :most]  # [B P]
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        words = words.gather(1, order)
    x = x + _places(words.cumsum(1), x.shape[-1])
    x = _norm(_run(net.classify, heads, x, words[:, None, None]), net.norms[0])
    highest = torch.where(words[..., None], x, _HIDDEN).amax(1) * words.any(1)[:, None]
    return torch.cat(
        [seen @ net.see.mT, torch.cat([_mean(x, words), highest], -1) @ net.read.mT], -1
    )


def memorise(net: Net, row: Row, at: Tensor, scored: Tensor) -> Memory:
    """What to keep of edits: their answers, their pictures summed up, the words of their prompts.

    `at` [B A] are the positions that predict the answer's tokens, `scored` which of them count.
    """
    d = row.small.shape[-1]
    behind = (at + 1).clamp_max(row.small.shape[1] - 1)[..., None].expand(-1, -1, d)
    places = torch.arange(at.shape[1], device=at.device)
    replies = row.small.gather(1, behind) + _places(places, d) + net.roles[0]
    words = row.mask & _asked(row) & ~row.image
    most = max(1, int(words.sum(1).max()))
    order = (~words).int().argsort(dim=1, stable=True)[:, :most]  # [B P]
    prompts = row.small.gather(1, order[..., None].expand(-1, -1, d))
    prompts = prompts + _places(torch.arange(most, device=at.device), d) + net.roles[2]
    scenes, any_seen = _looked(net, row)
    return Memory(
        replies * scored[..., None],
        (scenes + net.roles[1]) * any_seen[:, None, None],
        prompts * words.gather(1, order)[..., None],
    )


def say(net: Net, heads: int, row: Row, memory: Memory) -> tuple[Tensor, Tensor]:
    """What an edit makes of each position: its state h [B L d] and its pointer [B L A].

    With g the states of the edit's answer, p how many tokens position t stands behind the prompt's
    last, the pointer is

        softmax_j( (W_ask h_t) . (W_match g_j) / sqrt(d) + near [j = p] )

    and one more place to point at, nothing, which is near where the answer has ended.
    """
    d, length = row.small.shape[-1], row.small.shape[1]
    scenes, any_seen = _looked(net, row)
    words = row.mask & ~row.image
    x = row.small + _places(words.cumsum(1) - 1, d) + net.roles[4]
    given = torch.cat([memory.replies, memory.scenes, memory.prompts], 1)
    whole = torch.cat([given, scenes + net.roles[3], x], 1)
    real = torch.cat(
        [(given != 0).any(-1), any_seen[:, None].expand(-1, scenes.shape[1]), words], 1
    )
    # An edit's memory sees itself, the scene that too, a word both and the words before it.
    spans = (given.shape[1], scenes.shape[1], length)
    part = torch.repeat_interleave(
        torch.arange(3, device=x.device), torch.tensor(spans, device=x.device)
    )
    place = torch.arange(len(part), device=x.device)
    sees = (part[None] < part[:, None]) | ((part[None] == part[:, None]) & (part[None] < 2))
    sees = sees | ((part[:, None] == 2) & (place[None] <= place[:, None]))
    h = _norm(_run(net.say, heads, whole, (sees & real[:, None])[:, None]), net.norms[1])
    told, h = h[:, : memory.replies.shape[1]], h[:, -length:]
    count = (memory.replies != 0).any(-1)  # [B A]
    ahead = _behind(row)[..., None]  # [B L 1]
    scores = (h @ net.ask.mT) @ (told @ net.match.mT).mT / d**0.5
    scores = scores + net.near * (torch.arange(count.shape[1], device=x.device) == ahead)
    scores = scores.masked_fill(~count[:, None], _HIDDEN)
    nothing = net.near * (ahead >= count.sum(1)[:, None, None])
    return h, torch.cat([scores, nothing], -1).softmax(-1)[..., :-1]


def answered(net: Net, states: Tensor, pointer: Tensor, answers: Tensor) -> Tensor:
    """The residual stream [B T D] that is read as the answer: what is copied, and what is said."""
    return pointer @ answers.float() + states @ net.out.mT


def _asked(row: Row) -> Tensor:
    """[B L] the tokens up to the prompt's last; all where it is not in the row."""
    return row.prompt.cumsum(1) - row.prompt.int() == 0


def _behind(row: Row) -> Tensor:
    """[B L] how many real tokens stand from the prompt's last, exclusive, to each; below it, -1."""
    begun = row.prompt.cumsum(1) > 0
    return (row.mask & begun).cumsum(1) - 1


def _looked(net: Net, row: Row) -> tuple[Tensor, Tensor]:
    """The pictures of each row as m rows [B m d], and whether there are any [B]."""
    seen = row.mask & row.image & _asked(row)
    keys, values = F.linear(row.small, net.look).chunk(2, -1)
    scores = (net.looks @ keys.mT) / keys.shape[-1] ** 0.5  # [B m L]
    found = scores.masked_fill(~seen[:, None], _HIDDEN).softmax(-1) @ values
    any_seen = seen.any(1)
    return found * any_seen[:, None, None], any_seen


def _mean(x: Tensor, keep: Tensor) -> Tensor:
    total = torch.where(keep[..., None], x, 0).sum(1)
    return total / keep.sum(1, keepdim=True).clamp_min(1)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * gain


def _run(stack: Stack, heads: int, x: Tensor, sees: Tensor) -> Tensor:
    """The layers; `sees` [B 1 L L] (or [B 1 1 L]) which token may look at which."""
    for norms, attend, join, up, down in zip(*stack):
        qkv = F.linear(_norm(x, norms[0]), attend).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B H L d/H]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        x = x + F.linear(found.transpose(1, 2).flatten(2), join)
        x = x + F.linear(F.gelu(F.linear(_norm(x, norms[1]), up)), down)
    return x


def _places(index: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions: [...] -> [... width]."""
    half = (width + 1) // 2
    rates = torch.exp(-torch.arange(half, device=index.device) * (6.0 / half))
    angles = index[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]
