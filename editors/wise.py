"""WISE: side memories of one linear map, and a gate that only the edits' own prompts open.

A memory is a sparse change D of the map's weight W, zero outside a random mask. Side memory and base
stand side by side: a row runs with W + D where the prompt's activation

    a(x) = mean over the prompt's tokens of |phi((W + D) x_t) - phi(W x_t)|_2

reaches a threshold, and with W elsewhere. An edit trains the values of D under the mask,

    L = mean_j -log p(x*_j | image, prompt, x*_<j ; W + D)  +  m(a(edit), a(unrelated))
    m(a, b) = [b - alpha]_+ + [beta - a]_+ + [b - a + gamma]_+

and its threshold is `act_ratio` times a(edit) once it is trained. Edits in sequence share a memory;
every `save_every` of them a new one is begun (its mask drawn anew), and every `merge_every` the full
ones are merged into one (`wise_merge.py`).

Sources: Wang et al. 2024 (arXiv 2405.14768); EasyEdit `models/wise/WISE.py`. Different from it:

* Both sides of the gate are the same: the prompt's own tokens, no padding and no answer, at edit
  and at test (theirs: the mean of all tokens at edit, the largest at test in rows over 100 tokens;
  `statistic="easyedit"` measures so).
* What the gate learns to stay shut for is packaged or yours (`texts`, `unrelated`), never the
  question that locality is then measured by. Questions about the edit's own picture, and the edit's
  question without its picture, can join (`beside`).
* Weight decay acts under the mask only (theirs moves all of W), the map keeps its bias, a mask has
  its ratio exactly and follows from the edit's name, and asking a question merges nothing.

Cost of an edit: its rows and the unrelated ones once up to the site; then `num_steps` forwards and
backwards of its own rows from the site's layer on. Legend: E memories trained side by side · R rows
that are edited · U unrelated prompts per row · n tokens of a prompt · K values · O, I of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import torch
from torch import Tensor

from errata.functional import (
    Batch,
    Delta,
    Editor,
    EditRecord,
    Header,
    Inputs,
    Masked,
    Model,
    Query,
    optim,
    prefix,
)
from errata.functional.entries import Activation, Statistic
from errata.functional.errors import BadInput, BadSettings, UnknownSite
from errata.functional.grouped import grouped_linear
from errata.functional.losses import nll
from errata.functional.masked import activation_of, distances, pack, prompt_tokens
from errata.functional.records import header_for
from errata.functional.stacks import per_edit
from errata.functional.taps import tap

from .wise_merge import Method, merged
from .wise_texts import QUESTIONS, TEXTS

__all__ = ["PRESETS", "Memory", "Shard", "Side", "WiseConfig", "margins", "wise"]

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
    act_ratio: Positive = 0.4
    activation: Activation = "silu"  # the model's: phi
    statistic: Statistic = "mean"
    texts: tuple[str, ...] = ()  # unrelated prompts; (): the packaged ones
    questions: tuple[str, ...] = ()  # about any picture, for beside="picture"; (): the packaged ones
    num_texts: Count = 4  # of each per edit
    beside: tuple[Beside, ...] = ()  # questions about the edit's picture; its question without it
    stop_loss: Natural = 0.02  # an edit stops below it, once a step changes it by less than
    stop_change: Natural = 1e-4
    save_every: Count = 500  # edits of one memory
    merge_every: Count = 1000  # edits after which full memories are merged into one
    merge: Method = "ties"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.53  # of what a merge keeps
    mode: Literal["retrieve", "merge"] = "retrieve"  # merged memories stay apart, or become one
    end: bool = True  # teach the end of the answer too, so that free generation stops there


class Side(NamedTuple):
    """A side memory: values at positions of the map [O I] (row-major), and when it acts."""

    positions: Tensor  # [K] int64, ascending
    values: Tensor  # [K]
    nearest: Tensor  # [] the smallest activation of its edits
    edits: tuple[int, ...] = ()  # their numbers


class Shard(NamedTuple):
    """The memory that edits go into now."""

    side: Side
    room: int  # edits that it still takes


class Memory(NamedTuple):
    """State: full memories, the one that is being filled, and the edits so far."""

    seed: int
    full: tuple[Side, ...] = ()
    merged: int = 0  # how many of the full ones, from the first on, are merged already
    shard: Shard | None = None
    edits: tuple[EditRecord, ...] = ()

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.full if self.shard is None else (*self.full, self.shard.side)


class Site(NamedTuple):
    """The linear map with the memories."""

    path: str
    layer: int
    size: tuple[int, int]  # O, I
    transposed: bool

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


def wise(config: WiseConfig = WiseConfig(), unrelated: Sequence[Query] = ()) -> Editor:
    """WISE as an editor: the delta is a `masked` change of one linear map.

    `unrelated`: prompts (with pictures, where the model takes them) that the gate learns to stay
    shut for, in place of `config.texts`. State: the memories. A sequence fills one after another;
    single edits can be taken out where they are alone in one (save_every=1). Raises UnknownSite
    when the site is not in the model, BadSettings where its change could not act on the answer.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = wise(WiseConfig(num_steps=2, mask_ratio=0.5))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> delta.header.entries[0].counts, delta.header.entries[0].shape
    ((1024,), (32, 64))
    """
    others = tuple(query._replace(target="") for query in unrelated)

    def init(model: Model, generator: torch.Generator) -> Memory:
        site_of(model, config)
        return Memory(int(torch.randint(0, 2**62, (), generator=generator)))

    def header(model: Model, queries: Sequence[Query], sides: Sequence[Side], owners, earlier, stack):
        site = site_of(model, config)
        entry = Masked(
            name=site.weight,
            checkpoint=model.card.checkpoint.get(site.weight, site.weight),
            shape=tuple(model.params[site.weight].shape),
            counts=tuple(len(side.values) for side in sides),
            owners=owners,
            activation=config.activation,
            statistic=config.statistic,
            transposed=site.transposed,
        )
        return header_for(model, "wise", config, (entry,), queries, earlier=earlier, stack=stack)

    def records(model: Model, queries: Sequence[Query]) -> tuple[EditRecord, ...]:
        return header_for(model, "wise", config, (), queries).edits

    def edit(model: Model, state: Memory, queries: Sequence[Query]) -> tuple[Delta, Memory]:
        earlier, queries = state.edits, list(queries)
        while queries:
            room = config.save_every if state.shard is None else state.shard.room
            state = fill(model, state, queries[:room])
            queries = queries[room:]
        owners = [0] * len(state.edits)
        for number, side in enumerate(state.sides):
            for k in side.edits:
                owners[k] = number
        new = state.edits[len(earlier) :]
        described = header(model, (), state.sides, (), (), 0)
        described = msgspec.structs.replace(
            described,
            edits=earlier + new,
            entries=(msgspec.structs.replace(described.entries[0], owners=tuple(owners)),),
        )
        return _delta(described, site_of(model, config), [state.sides], config), state

    def fill(model: Model, state: Memory, queries: Sequence[Query]) -> Memory:
        """Train the current memory on a few more edits; put it aside where it is full."""
        site, made = site_of(model, config), records(model, queries)
        shard = state.shard or Shard(_empty(model, site, state.seed, made[0], config), config.save_every)
        ready = prepare(model, site, queries, made, state.seed, config, others)
        ready = ready._replace(batch=ready.batch._replace(edit=torch.zeros_like(ready.batch.edit)))
        values, nearest = train(
            model, site, ready, shard.side.positions[None], shard.side.values[None], config
        )
        numbers = range(len(state.edits), len(state.edits) + len(queries))
        side = shard.side._replace(
            values=values[0],
            nearest=torch.minimum(shard.side.nearest, nearest[0]),
            edits=(*shard.side.edits, *numbers),
        )
        shard = Shard(side, shard.room - len(queries))
        state = state._replace(edits=state.edits + made, shard=shard)
        if shard.room:
            return state
        state = state._replace(full=(*state.full, side), shard=None)
        return _merge(model, site, state, config)

    def each(model: Model, state: Memory, queries: Sequence[Query]) -> Delta:
        if state.edits:
            raise BadInput(
                f"edits side by side must start from a fresh state, and this one holds "
                f"{len(state.edits)}: take `editor.init(model, generator)`, or `editor.edit`."
            )
        site, made = site_of(model, config), records(model, queries)
        sides = [_empty(model, site, state.seed, record, config) for record in made]
        ready = prepare(model, site, queries, made, state.seed, config, others)
        positions = torch.stack([side.positions for side in sides])
        values, nearest = train(
            model, site, ready, positions, torch.stack([side.values for side in sides]), config
        )
        sides = [
            side._replace(values=v, nearest=a) for side, v, a in zip(sides, values, nearest)
        ]
        described = header(model, queries, sides[:1], (0,) * len(sides), (), len(sides))
        return _delta(described, site, [[side] for side in sides], config)

    return Editor("wise", config, init, edit, each)


def site_of(model: Model, config: WiseConfig) -> Site:
    """The map that the settings mean."""
    count, layer = model.card.num_layers, config.layer
    if isinstance(layer, float):
        layer = min(int(count * layer), count - 1)
    path = model.card.linear(f"layers.{layer}.{config.site}")
    number = model.card.layer_of(path)
    if number is None:
        raise UnknownSite(f"WISE's site must be a linear map of a decoder layer, {path!r} is none.")
    return Site(path, number, model.card.linears[path], path in model.card.transposed)


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
    rows = [
        [tuple(part[r] for part in own), *(found[place[_key(rival)]] for rival in row)]
        for r, row in enumerate(rivals)
    ]
    given, output, tokens = (
        torch.stack([torch.stack([_long(prompt[i], longest) for prompt in row]) for row in rows])
        for i in range(3)
    )
    edit = torch.arange(len(queries), device=batch.edit.device)
    return Ready(batch._replace(edit=edit), given, output, tokens)


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
    drawn = _drawn(seed, record, "unrelated")

    def some(known: Sequence[Query]) -> list[Query]:
        known = [one for one in known if one.prompt != query.prompt]
        if not known:
            raise BadSettings("unrelated prompts must be other ones than the edit's: name more.")
        order = torch.randperm(len(known), generator=drawn).tolist()
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

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(count, out * inner).scatter(1, positions, values).view(-1, out, inner)

    def loss(tensors):
        answer, inside, outside = parts(spread(tensors["values"]))
        margin = margins(inside[:, None], outside, config.alpha, config.beta, config.gamma)
        each = per_edit(answer + margin, edit, count)
        return each.sum(), each.detach()

    step = torch.func.grad(loss, has_aux=True)
    tensors = {"values": start.float()}
    memory = rule.init(tensors, num_edits=count)
    before = torch.full((count,), torch.inf, device=start.device)
    active = torch.ones(count, dtype=torch.bool, device=start.device)
    for number in range(config.num_steps):
        grads, each = step(tensors)
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
        inside = parts(spread(values), answers=False)[1]
    nearest = torch.full((count,), torch.inf, device=start.device)
    return values, nearest.scatter_reduce(0, edit, inside, "amin")


def objective(
    model: Model, site: Site, ready: Ready, config: WiseConfig
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """maps [E O I] -> each row's loss [R], its activation [R], those of its unrelated prompts [R U]."""
    batch = ready.batch
    length = batch.hidden.shape[1]

    def parts(maps: Tensor, answers: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        more = grouped_linear(ready.given.flatten(1, 2), maps, batch.edit)  # [R (U+1)n O]
        moved = distances(ready.output, more.view(ready.output.shape), config.activation)
        found = activation_of(moved, ready.tokens, config.statistic)  # [R U+1]

        def rewrite(x: Tensor, y: Tensor) -> Tensor:
            added = grouped_linear(x.reshape(len(found), length, -1).float(), maps, batch.edit)
            return (y + added.view(y.shape)).to(y.dtype)

        answer = found[:, 0]
        if answers:
            answer = nll(model.decode(model.params, batch, {site.path: rewrite}), batch.labels)
        return answer, found[:, 0], found[:, 1:]

    return parts


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


def _empty(model: Model, site: Site, seed: int, record: EditRecord, config: WiseConfig) -> Side:
    """A memory of zeros, under a mask that its first edit's name draws."""
    device = model.params[site.weight].device
    positions = _mask(site.size, config.mask_ratio, _drawn(seed, record, "mask")).to(device)
    values = torch.zeros(len(positions), device=device)
    return Side(positions, values, torch.tensor(torch.inf, device=device))


def _drawn(seed: int, record: EditRecord, what: str) -> torch.Generator:
    """By the edit's own name: the same in any order and in any company."""
    name = hashlib.sha256(f"{seed} {record.id} {what}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(name, "little") >> 1)


def _mask(size: tuple[int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """round(ratio O I) positions, as many in each row as in any other but for one: [K] ascending."""
    out, inner = size
    total = max(1, round(ratio * out * inner))
    least, more = divmod(total, out)
    found = []
    for begin in range(0, out, 512):
        rows = range(begin, min(begin + 512, out))
        order = torch.rand(len(rows), inner, generator=generator).topk(min(least + 1, inner)).indices
        order += torch.tensor(rows)[:, None] * inner
        longer = max(0, min(more - begin, len(rows)))
        found += [order[:longer].flatten(), order[longer:, :least].flatten()]
    return torch.cat(found).sort().values


def _merge(model: Model, site: Site, state: Memory, config: WiseConfig) -> Memory:
    """Merge the full memories that are not merged yet, once enough edits have gone into them."""
    fresh = state.full[state.merged :]
    if sum(len(side.edits) for side in fresh) < config.merge_every:
        return state
    before, weights = state.full[: state.merged], [1.0 / len(fresh)] * len(fresh)
    if config.mode == "merge" and before:
        fresh = (*fresh, *before)  # EasyEdit's weights: what was merged earlier counts for 0.6
        weights = [0.4 * weight for weight in weights] + [0.6]
        before = ()
    full = torch.stack([_full(side, site) for side in fresh])
    last = state.edits[fresh[0].edits[-1]]
    total = merged(full, weights, config.merge, config.density, _drawn(state.seed, last, "merge"))
    positions = total.nonzero()[:, 0]
    if not len(positions):
        positions = fresh[0].positions[:1]
    side = Side(
        positions,
        total[positions],
        torch.stack([side.nearest for side in fresh]).min(),
        tuple(sorted(k for side in fresh for k in side.edits)),
    )
    return state._replace(full=(*before, side), merged=len(before) + 1)


def _full(side: Side, site: Site) -> Tensor:
    out, inner = site.size
    return side.values.new_zeros(out * inner).scatter(0, side.positions, side.values)


def _delta(
    header: Header, site: Site, edits: Sequence[Sequence[Side]], config: WiseConfig
) -> Delta:
    """The tensors of one delta per entry of `edits`, stacked where the header says so."""
    name, total = header.entries[0].name, site.size[0] * site.size[1]
    tensors: dict[str, list[Tensor]] = {"mask": [], "values": [], "thresholds": []}
    for sides in edits:
        masks = [torch.zeros(total, dtype=torch.bool, device=s.values.device) for s in sides]
        bytes_ = [pack(m.index_fill(0, s.positions, True)) for m, s in zip(masks, sides)]
        tensors["mask"].append(torch.stack(bytes_))
        tensors["values"].append(torch.cat([side.values for side in sides]))
        nearest = torch.stack([side.nearest for side in sides])
        tensors["thresholds"].append(config.act_ratio * nearest)
    stacked = {part: torch.stack(found) for part, found in tensors.items()}
    return Delta(
        header, {f"{name}.{p}": x if header.stack else x[0] for p, x in stacked.items()}
    )


PRESETS: dict[str, WiseConfig] = {}
