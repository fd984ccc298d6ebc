"""How WISE trains a side memory: rows and unrelated prompts up to the site once, then its values.

Legend: E memories trained side by side · R rows that are edited · U unrelated prompts per row · n
tokens of a prompt · K values of a memory · O, I of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Batch, EditRecord, Inputs, Model, Query, optim, prefix, rows
from errata.functional.entries import Activation, Statistic
from errata.functional.errors import BadSettings, UnknownSite
from errata.functional.grouped import grouped_linear
from errata.functional.losses import nll
from errata.functional.masked import ACTIVATIONS, activation_of, distances, prompt_tokens
from errata.functional.stacks import per_edit
from errata.functional.taps import tap

from .wise_merge import Method
from .wise_texts import QUESTIONS, TEXTS

__all__ = [
    "Ready",
    "Site",
    "WiseConfig",
    "draw_mask",
    "drawn",
    "last",
    "margins",
    "objective",
    "picked",
    "prepare",
    "site_of",
    "together",
    "train",
]

Positive = Annotated[float, msgspec.Meta(gt=0)]
Natural = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Beside = Literal["picture", "question"]


class WiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="wise"):
    """Settings of WISE; the defaults are EasyEdit's where they do not depend on the model."""

    site: str = "mlp.down"  # a linear map of a layer
    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 0.8  # number, or share of the depth
    mask_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1.0
    weight_decay: Natural = 1e-5
    num_steps: Count = 70
    clamp: Positive | None = 1.0  # bound on |D|, per element
    alpha: Natural = 5.0  # unrelated prompts stay below it
    beta: Natural = 20.0  # edits rise above it
    gamma: Natural = 10.0  # and are as far apart
    act_ratio: Positive = 0.88  # of an edit's own activation: the threshold
    activation: Activation | Literal["auto"] = "auto"  # phi; "auto": the model's own
    statistic: Statistic = "mean"
    texts: tuple[str, ...] = ()  # unrelated prompts; (): the packaged ones
    questions: tuple[str, ...] = ()  # of any picture; (): the packaged ones
    num_texts: Count = 4  # of each per edit
    beside: tuple[Beside, ...] = ()  # questions about the edit's picture; its question without it
    stop_loss: Natural = 0.02  # an edit stops below it, once a step changes it by less than
    stop_change: Natural = 1e-4
    replay: Annotated[int, msgspec.Meta(ge=0)] = 0  # earlier edits of a memory trained along
    save_every: Count = 500  # edits of one memory
    merge_every: Count = 1000  # edits after which full memories are merged into one
    merge: Method = "ties"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.53  # of what a merge keeps
    mode: Literal["retrieve", "merge"] = "retrieve"  # merged memories stay apart, or become one
    end: bool = True  # teach the end of the answer too, so that free generation stops there


class Site(NamedTuple):
    """The linear map with the memories, and how its outputs are compared."""

    path: str
    layer: int
    size: tuple[int, int]  # O, I
    transposed: bool
    activation: Activation

    @property
    def weight(self) -> str:
        return f"{self.path}.weight"


class Ready(NamedTuple):
    """The edited rows before the site's layer, and what the site is given at prompts' tokens.

    Of each row's U + 1 prompts the first is its own.
    """

    batch: Batch  # R rows; `edit`: the memory that each trains
    given: Tensor  # [R U+1 n I]
    output: Tensor  # [R U+1 n O] of the map as it is
    tokens: Tensor  # [R U+1 n] bool: those that count


def site_of(model: Model, config: WiseConfig) -> Site:
    """The map that the settings mean."""
    count, layer = model.card.num_layers, config.layer
    if isinstance(layer, float):
        layer = min(int(count * layer), count - 1)
    path = model.card.linear(f"layers.{layer}.{config.site}")
    number = model.card.layer_of(path)
    if number is None:
        raise UnknownSite(f"WISE's site must be a linear map of a decoder layer, {path!r} is none.")
    phi: Any = config.activation if config.activation != "auto" else model.card.activation or "silu"
    if phi not in ACTIVATIONS:
        raise BadSettings(
            f"activation must be one of {', '.join(ACTIVATIONS)}, and that of {model.card.id} is "
            f"{phi!r}: name the nearest."
        )
    size = model.card.linears[path]
    return Site(path, number, size, path in model.card.transposed, phi)


def prepare(
    model: Model, site: Site, queries: Sequence[Query], made: Sequence[EditRecord], seed: int,
    config: WiseConfig, unrelated: Sequence[Query] = (),
) -> Ready:  # fmt: skip
    """Read the rows and run them up to the site: what does not change is run once."""
    inputs = model.read(queries, end=True) if config.end else model.read(queries)
    own, batch = _seen(model, site, inputs, config)
    rivals = [
        _unrelated(query, record, seed, config, unrelated) for query, record in zip(queries, made)
    ]
    flat = [rival for row in rivals for rival in row]
    # Rows alike in pictures are read together; a prompt that several edits share is run once.
    distinct = list(dict.fromkeys(map(_key, flat)))
    place = {key: number for number, key in enumerate(distinct)}
    first = {key: query for query, key in zip(reversed(flat), map(_key, reversed(flat)))}
    found: list[Any] = [None] * len(distinct)
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(distinct):
        query = first[key]
        groups.setdefault((len(query.images), query.video), []).append(number)
    for numbers in groups.values():
        seen, _ = _seen(model, site, model.read([first[distinct[n]] for n in numbers]), config)
        for row, number in enumerate(numbers):
            found[number] = tuple(part[row] for part in seen)
    longest = max([own[0].shape[1], *(x.shape[0] for x, _, _ in found)])
    prompts = [
        [tuple(part[r] for part in own), *(found[place[_key(rival)]] for rival in row)]
        for r, row in enumerate(rivals)
    ]
    given, output, tokens = (
        torch.stack([torch.stack([_long(one[i], longest) for one in row]) for row in prompts])
        for i in range(3)
    )
    edit = torch.arange(len(queries), device=batch.edit.device)
    return Ready(batch._replace(edit=edit), given, output, tokens)


def together(earlier: Ready | None, later: Ready) -> Ready:
    """The rows of both, prompts padded to the longest."""
    if earlier is None:
        return later
    longest = max(earlier.tokens.shape[2], later.tokens.shape[2])
    parts = [
        torch.cat(
            [F.pad(part, (*(0, 0) * (part.ndim - 3), 0, longest - part.shape[2])) for part in pair]
        )
        for pair in zip(earlier[1:], later[1:])
    ]
    return Ready(rows.concat([earlier.batch, later.batch]), *parts)


def last(ready: Ready, count: int) -> Ready | None:
    """The last rows, as many as are there; none of none."""
    if not count:
        return None
    return picked(ready, slice(max(0, len(ready.given) - count), None))


def picked(ready: Ready, some: Tensor | slice) -> Ready:
    """Some of the rows."""
    return Ready(rows.take(ready.batch, some), *(part[some] for part in ready[1:]))


def _seen(
    model: Model, site: Site, inputs: Inputs, config: WiseConfig
) -> tuple[tuple[Tensor, Tensor, Tensor], Batch]:
    """What the site is given and gives at the tokens that count, and the rows before its layer."""
    reach = prefix.reach(model.card, [site.weight])
    whole = cast(Batch, prefix.cut(model, inputs, reach._replace(scored=False)))
    with torch.no_grad():
        _, seen = tap(model.decode, model.params, whole, [site.path], stop=site.layer + 1)
        tokens = prompt_tokens(whole, config.statistic)
        order = (~tokens).int().argsort(dim=1, stable=True)[:, : max(1, int(tokens.sum(1).max()))]
        parts = [
            part.reshape(*tokens.shape, -1).float().gather(1, order[..., None].expand(-1, -1, size))
            for part, size in zip(seen[site.path], reversed(site.size))
        ]
        batch = cast(Batch, prefix.cut(model, whole, reach))
    return (parts[0], parts[1], tokens.gather(1, order)), batch


def _long(part: Tensor, length: int) -> Tensor:
    """Tokens first, `length` of them: zeros (and False) behind the last."""
    return torch.cat([part, part.new_zeros(length - part.shape[0], *part.shape[1:])])


def _key(query: Query) -> Any:
    return query.prompt, tuple(map(id, query.images)), query.video


def _unrelated(
    query: Query, record: EditRecord, seed: int, config: WiseConfig, given: Sequence[Query]
) -> list[Query]:
    """The prompts one edit's gate stays shut for, drawn by the edit's name."""
    generator = drawn(seed, record, "unrelated")

    def some(known: Sequence[Query]) -> list[Query]:
        known = [one for one in known if one.prompt != query.prompt]
        if not known:
            raise BadSettings("unrelated prompts must be other ones than the edit's: name more.")
        order = torch.randperm(len(known), generator=generator).tolist()
        return [known[order[k % len(order)]] for k in range(config.num_texts)]

    texts = given or [Query(text) for text in config.texts or TEXTS]
    rivals = some(texts)
    if "picture" in config.beside:  # of an edit without one: about nothing, as texts are
        asked = config.questions or QUESTIONS
        shown = query.images, query.video
        rivals += some([Query(text, images=shown[0], video=shown[1]) for text in asked])
    if "question" in config.beside:  # without its picture; where it has none, one more text
        bare = query._replace(target="", images=(), video=False)
        rivals.append(bare if query.images else some(texts)[0])
    return rivals


def train(
    model: Model, site: Site, ready: Ready, positions: Tensor, start: Tensor, config: WiseConfig
) -> tuple[Tensor, Tensor]:
    """The values [E K] that make each row say its target, and each memory's nearest edit [E]."""
    rate, decay = config.lr, config.weight_decay
    make = optim.sgd if config.optimizer == "sgd" else optim.adam
    rule = make(rate, weight_decay=decay)
    parts, (out, inner) = objective(model, site, ready, config), site.size
    edit, count = ready.batch.edit, len(positions)
    weight = model.params[site.weight].detach()
    weight = (weight.mT if site.transposed else weight).reshape(-1)
    anchor = {"values": weight[positions].float()} if decay else None

    dense = start.new_zeros(count, out * inner, dtype=torch.float32)  # zero but at `positions`

    def maps(values: Tensor) -> Tensor:
        return dense.scatter_(1, positions, values).view(-1, out, inner)

    def loss(maps):
        answer, inside, outside = parts(maps)
        margin = margins(inside[:, None], outside, config.alpha, config.beta, config.gamma)
        each = per_edit(answer + margin, edit, count)
        return each.sum(), each.detach()

    step = torch.func.grad(loss, has_aux=True)
    tensors = {"values": start.float()}
    memory = rule.init(tensors, num_edits=count)
    before = torch.full((count,), torch.inf, device=start.device)
    active = torch.ones(count, dtype=torch.bool, device=start.device)
    for number in range(config.num_steps):
        slope, each = step(maps(tensors["values"]))
        grads = {"values": slope.flatten(1).gather(1, positions)}
        done = ((each - before).abs() <= config.stop_change) & (each <= config.stop_loss)
        active, before = active & ~done, each
        if not bool(active.any()):
            break
        if number == 0 and not bool(grads["values"].any()):
            raise BadSettings(
                "a side memory must act on the answer, and its gradient is zero: name another "
                "site or a larger mask_ratio."
            )
        tensors, memory = rule.update(grads, memory, tensors, mask=active, anchor=anchor)
        if config.clamp is not None:
            tensors = optim.clamp(tensors, config.clamp)
    values = tensors["values"]
    with torch.no_grad():
        inside = parts(maps(values), answers=False)[1]
    nearest = torch.full((count,), torch.inf, device=start.device)
    return values, nearest.scatter_reduce(0, edit, inside, "amin")


def objective(
    model: Model, site: Site, ready: Ready, config: WiseConfig
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """maps [E O I] -> rows' losses [R], activations [R], and those of unrelated prompts [R U]."""
    batch = ready.batch
    count, length = batch.hidden.shape[:2]
    # EasyEdit edits by the mean, and takes the largest of long prompts when it answers only.
    statistic = "mean" if config.statistic == "easyedit" else config.statistic
    own, every, rivals = prompt_tokens(batch, statistic), _packed(ready, 0), _packed(ready, 1)
    # Where the rows stand whole, their own prompts' tokens are among them: multiplied once.
    whole = own.shape[1] == length and torch.equal(own.sum(1), ready.tokens[:, 0].sum(1))

    def activations(more: Tensor, prompts: _Packed) -> Tensor:
        moved = distances(prompts.output, more, site.activation)
        spread = moved.new_zeros(count, prompts.tokens[0].numel()).scatter(1, prompts.at, moved)
        return activation_of(spread.view(prompts.tokens.shape), prompts.tokens, statistic)

    def parts(maps: Tensor, answers: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        found: list[Tensor] = []

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            given = x.reshape(count, length, -1).float()
            if whole:
                product = grouped_linear(torch.cat([given, rivals.given], 1), maps, batch.edit)
                added, more = product[:, :length], product[:, length:]
                moved = distances(y.reshape(added.shape), added, site.activation)
                inside = activation_of(moved, own, statistic)
                found.append(torch.cat([inside[:, None], activations(more, rivals)], 1))
            else:
                added = grouped_linear(given, maps, batch.edit)
            return (y + added.reshape(y.shape)).to(y.dtype)

        answer = None
        if answers:
            answer = nll(prefix.narrow(model, batch, {site.path: rewrite}), batch.labels)
        if not found:
            found.append(activations(grouped_linear(every.given, maps, batch.edit), every))
        active = found[0]  # [R U+1]
        return active[:, 0] if answer is None else answer, active[:, 0], active[:, 1:]

    return parts


class _Packed(NamedTuple):
    """Prompts of a row one behind the other, without the padding between them."""

    given: Tensor  # [R T I]
    output: Tensor  # [R T O]
    at: Tensor  # [R T] where each token stands among the P n of `tokens`
    tokens: Tensor  # [R P n] bool


def _packed(ready: Ready, first: int) -> _Packed:
    """The prompts from `first` on."""
    tokens = ready.tokens[:, first:]
    flat = tokens.flatten(1)
    at = (~flat).int().argsort(dim=1, stable=True)[:, : max(1, int(flat.sum(1).max()))]
    given, output = (
        part[:, first:].flatten(1, 2).gather(1, at[..., None].expand(*at.shape, part.shape[-1]))
        for part in (ready.given, ready.output)
    )
    return _Packed(given, output, at, tokens)


def margins(inside: Tensor, outside: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """The three terms that hold edits [... P] and unrelated prompts [... U] apart: [...].

        mean [out - in + gamma]_+ + mean [out - alpha]_+ + mean [beta - in]_+

    each a mean over its terms above zero, the first over all pairs (Wang et al. 2024, eq. 6).

    >>> margins(torch.tensor([15.0]), torch.tensor([7.0, 4.0]), 5.0, 20.0, 10.0)
    tensor(9.)
    """
    pairs = (outside[..., None] - inside[..., None, :] + gamma).flatten(-2)
    return _above(pairs) + _above(outside - alpha) + _above(beta - inside)


def _above(values: Tensor) -> Tensor:
    """The mean over the last axis of what lies above zero; 0 where nothing does."""
    return values.clamp_min(0).sum(-1) / (values > 0).sum(-1).clamp_min(1)


def drawn(seed: int, record: EditRecord, what: str) -> torch.Generator:
    """A generator named by the edit: the same in any order and in any company."""
    name = hashlib.sha256(f"{seed} {record.id} {what}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(name, "little") >> 1)


def draw_mask(size: tuple[int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """[O I] flat: True at round(ratio O I) positions, in each row as many as in any other or one
    fewer.

    >>> draw_mask((4, 5), 0.3, torch.Generator().manual_seed(0)).view(4, 5).sum(1)
    tensor([2, 2, 1, 1])
    """
    out, inner = size
    least, more = divmod(max(1, round(ratio * out * inner)), out)
    mask = torch.zeros(out, inner, dtype=torch.bool)
    for begin in range(0, out, 512):
        rows = mask[begin : begin + 512]
        order = torch.rand(rows.shape, generator=generator).topk(min(least + 1, inner)).indices
        longer = max(0, min(more - begin, len(rows)))
        rows[:longer].scatter_(1, order[:longer], True)
        rows[longer:].scatter_(1, order[longer:, :least], True)
    return mask.flatten()
