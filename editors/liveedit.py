"""LiveEdit: each edit a low-rank expert made by a trained network, chosen by picture and question.

An edit is one forward up to a layer. From what the layer gives the edit's picture V, prompt Q and
answer A, trained networks (`liveedit_net.py`) make two routing keys and the factors of an expert;
`functional/experts.py` says how experts are chosen and applied. Nothing is optimised, earlier
experts never change, and an edit is taken back by taking its expert out. An edit of the same
question about the same pictures takes the place of the earlier one.

Training minimises, over lessons of E edits side by side,

    L = sum of weights * NLL(p', target)        where an edit should reach: own expert, some others
      + sum of weights * KL(p || p')            localities: some of the lesson's experts
      + soft + hard + apart                     routing, `liveedit_losses.py`

Source: LiveEdit (CVPR 2025, arXiv 2411.15432), qizhou000/LiveEdit. Different from the original:

* Training runs the layers behind the edited one on h + residual. There the edited layer's output
  is fed into that layer again, which no inference does.
* Experts beside a row's own are a random subset of the lesson's, not a prefix of the batch: there
  the first expert is a distractor in 8 of 9 steps and the last in 1 of 9.
* Localities of every kind are learned from, text among them; there only those with a picture.
* With `blend` "both" chosen experts are weighed by vision too: of two alike creatures asked the
  same, a query alone can not tell which was edited.
* `apart` compares each expert with the sentinel, as the gate does. The hard loss is a softmax over
  the lesson's experts, and lets any of them pass the gate as long as it is not the largest.
* Half of a lesson's experts are made from the answer alone, so that makers learn to read it rather
  than to know the training's answers by heart.
* With `sure` an edit's vision key is lengthened until its own question passes the gate by so much;
  there nothing makes certain that an edit is heard at all.
* With `places` makers know the order of an answer's tokens; the original's have to guess it.
* Edits and questions without a picture work: see `functional/experts.py`.
* Many edits are made in one forward, each as if alone.

Legend: B rows · E edits · N experts · D width · S slots · K width of a slot · R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import (
    Batch,
    Delta,
    Editor,
    EditRecord,
    Experts,
    Header,
    Model,
    Query,
    prefix,
)
from errata.functional.errors import BadSettings
from errata.functional.experts import features, tokens_of
from errata.functional.header import Blend
from errata.functional.records import base_of, header_for
from errata.functional.taps import tap
from errata.functional.types import Learner

from . import statefile
from .fit import Course, Lesson
from .liveedit_losses import lesson_loss, likeness
from .liveedit_net import Nets, Pool, absorbed, networks, pool_of

__all__ = [
    "PRESETS", "Editing", "LiveEditConfig", "Site", "about", "course", "generated", "kept",
    "liveedit", "site_of",
]  # fmt: skip


class LiveEditConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="liveedit"
):
    """Settings of LiveEdit; the default layer fits any decoder."""

    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 2 / 3  # number, or share of the depth
    width: Annotated[int, msgspec.Meta(ge=1)] = 1024  # of a slot
    slots: Annotated[int, msgspec.Meta(ge=1)] = 4
    heads: Annotated[int, msgspec.Meta(ge=1)] = 8
    rank: Annotated[int, msgspec.Meta(ge=1)] = 4
    strength: float = 0.2  # experts start this strong: 1 / `lora_scale` of the original
    places: Annotated[int, msgspec.Meta(ge=0)] = 0  # of answer tokens that makers tell apart
    sentinel: Annotated[int, msgspec.Meta(ge=1)] = 32  # tokens of the sentinel picture
    sentinel_text: Annotated[int, msgspec.Meta(ge=1)] = 8  # and of its stand-in without a picture
    sure: Annotated[float, msgspec.Meta(ge=0)] = (
        0.0  # how far an edit's own question passes; 0: as is
    )
    blend: Blend = "query"  # what chosen experts are weighed by; "query" is the published
    margin: float = 1.0  # in training: how far experts are kept from the sentinel
    most: Annotated[int, msgspec.Meta(ge=0)] = 0  # experts of one row, the heaviest; 0: all chosen
    end: bool = True  # teach the end of the answer too, so that free generation stops there
    trained: str = ""  # "shipped", or a file that `statefile.keep` wrote; "": untrained


class Editing(NamedTuple):
    """State of LiveEdit: the trained networks, and the edits so far."""

    nets: Nets
    pool: Pool
    edits: tuple[EditRecord, ...] = ()
    owners: tuple[int, ...] = ()  # the expert of each edit, -1 where it was taken over


class Site(NamedTuple):
    """The layer whose output experts are added to, and the weight that names it."""

    weight: str
    path: str
    layer: int


def liveedit(config: LiveEditConfig = LiveEditConfig()) -> Editor:
    """LiveEdit as an editor: the delta is a pool of `experts` at one layer's output.

    Untrained networks make experts that change answers at random: train them (`fit`), or take a
    shipped state. Raises BadSettings for a layer that has none behind it or for sizes that do not
    fit the model, BadInput for a trained state that is missing or does not fit.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = liveedit(LiveEditConfig(width=8, heads=2))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> for target in ("bo", "owl"):
    ...     delta, state = editor.edit(model, state, [Query("who is it?", target)])
    >>> delta.header.entries[0].owners
    (-1, 0)
    """

    def init(model: Model, generator: torch.Generator) -> Editing:
        fresh = _fresh(model, config, generator)
        if not config.trained:
            return fresh
        shipped = config.trained == "shipped"
        path = statefile.shipped("liveedit", model) if shipped else config.trained
        nets = statefile.recall(path, fresh.nets, about(model, config))
        return fresh._replace(nets=nets)

    def edit(model: Model, state: Editing, queries: Sequence[Query]) -> tuple[Delta, Editing]:
        records = _header(model, config, (), queries).edits
        fresh = generated(model, state.nets, config, queries)
        for row, record in enumerate(records):
            state = _joined(state, record, Pool(*(part[row : row + 1] for part in fresh)))
        header = _header(
            model, config, state.owners, queries, state.edits[: -len(records)],
            num_experts=len(state.pool.down),
        )  # fmt: skip
        return Delta(header, _tensors(model, config, state.nets, state.pool)), state

    def each(model: Model, state: Editing, queries: Sequence[Query]) -> Delta:
        records = _header(model, config, (), queries).edits
        fresh = generated(model, state.nets, config, queries)
        alone = [
            _joined(state, record, Pool(*(part[row : row + 1] for part in fresh)))
            for row, record in enumerate(records)
        ]
        longest = max(len(one.pool.down) for one in alone)
        pools = [_padded(one.pool, longest) for one in alone]
        pool = Pool(*(torch.stack(parts) for parts in zip(*pools)))
        owners = tuple(one.owners[-1] for one in alone)
        header = _header(model, config, owners, queries, num_experts=longest, stack=len(queries))
        return Delta(header, _tensors(model, config, state.nets, pool))

    return Editor("liveedit", config, init, edit, each)


def course(config: LiveEditConfig = LiveEditConfig()) -> Course:
    """How LiveEdit is trained, for `fit`: the edits of a lesson are one another's distractors."""

    def loss(model: Model, state: Editing, lesson: Lesson):
        return lesson_loss(config, model, state.nets, lesson)

    def sites(model: Model):
        # the layers behind the edited one are all that training runs
        behind = f"{model.card.layers}.{site_of(model, config).layer + 1}."
        return [path for path in model.card.linears if path.startswith(behind)]

    return Course(
        learner=Learner(liveedit(config), loss),
        sites=sites,
        trained=lambda state: state.nets,
        placed=lambda state, nets: state._replace(nets=nets),
        study=lambda model, state, lesson, learn: (state, lesson),
        end=config.end,
    )


def site_of(model: Model, config: LiveEditConfig) -> Site:
    """The layer that the settings mean; a share of the depth leaves a layer behind it.

    Raises BadSettings for the last layer and for numbers that are no layer.
    """
    card, layer = model.card, config.layer
    if isinstance(layer, float):
        layer = max(0, min(int(card.num_layers * layer), card.num_layers - 2))
    number = layer + card.num_layers if layer < 0 else layer
    if not 0 <= number < card.num_layers - 1:
        raise BadSettings(
            f"experts must stand at a layer of {card.id} that has one behind it, 0 to "
            f"{card.num_layers - 2}; got {layer}."
        )
    path = f"{card.layers}.{number}"
    weights = [p for p in card.linears if p.startswith(f"{path}.")]
    return Site(f"{weights[-1]}.weight", path, number)


def generated(model: Model, nets: Nets, config: LiveEditConfig, queries: Sequence[Query]) -> Pool:
    """The experts and keys of many edits, each as if alone, from one forward up to the layer."""
    site = site_of(model, config)
    inputs = model.read(queries, end=True) if config.end else model.read(queries)
    with torch.no_grad():
        batch = cast(Batch, prefix.cut(model, inputs, prefix.Reach(layer=site.layer)))
        _, seen = tap(model.decode, model.params, batch, [site.path], stop=site.layer + 1)
        hidden = seen[site.path].output.reshape(*batch.mask.shape, -1)
        pool = pool_of(nets, config, hidden, batch)
        return _sure(nets, config, pool, hidden, batch) if config.sure else pool


def _sure(nets: Nets, config: LiveEditConfig, pool: Pool, hidden: Tensor, batch: Batch) -> Pool:
    """The pool with vision keys made longer where their own question is not `sure` to pass.

    E' = E * clamp((t + sure) / <f, E>, 1, 4), for an own similarity above 0: the gate's own terms.
    """
    sentinels = (nets.sentinel, nets.sentinel_text)
    reader = absorbed(nets.ask, config.heads)
    like = likeness(
        config, features(reader, hidden, tokens_of(batch), config.heads, sentinels), pool
    )
    own = like.vision.diagonal()  # [E]
    longer = ((like.sentinel + config.sure) / own.clamp_min(1e-6)).clamp(1, 4)
    longer = torch.where(own > 0, longer, 1)[:, None]
    keys = torch.cat([pool.vision_keys[:, :-2] * longer, pool.vision_keys[:, -2:]], 1)
    return pool._replace(vision_keys=keys)


def about(model: Model, config: LiveEditConfig) -> dict[str, Any]:
    """What a trained state fits: the architecture of the networks, and the layer."""
    site = site_of(model, config)
    base = base_of(model, [site.weight])
    sizes = (
        "width",
        "slots",
        "heads",
        "rank",
        "sentinel",
        "sentinel_text",
        "strength",
        "blend",
        "places",
    )
    return {
        "editor": "liveedit",
        "layer": site.layer,
        **{name: getattr(config, name) for name in sizes},
        "end": config.end,
        "family": base.family,
        "touched": base.touched,
    }


def kept(state: Editing) -> Nets:
    """What a file of a trained state holds."""
    return state.nets


def _fresh(model: Model, config: LiveEditConfig, generator: torch.Generator) -> Editing:
    site, width = site_of(model, config), model.card.width
    wrong = [
        f"{config.heads} heads must divide {what} {size}"
        for what, size in (("the slots' width", config.width), ("the model's width", width))
        if size % config.heads
    ]
    if wrong:
        raise BadSettings(f"LiveEdit for {model.card.id}: {'; '.join(wrong)}.")
    nets = networks(
        width, config.slots, config.width, config.rank, config.sentinel, config.sentinel_text,
        generator, config.places,
    )  # fmt: skip
    device = model.params[site.weight].device
    nets = pytree.tree_map(lambda tensor: tensor.to(device), nets)
    keys = config.slots * config.width
    blend = 2 if config.blend == "both" else 1
    factors = (0, config.rank, width)
    shapes = ((0, keys + 2), (0, keys * blend), factors, factors)
    return Editing(nets, Pool(*(torch.zeros(shape, device=device) for shape in shapes)))


def _joined(state: Editing, record: EditRecord, fresh: Pool) -> Editing:
    """The state with one more edit: a new expert, or one in place of the same question's."""
    question = (record.prompt, record.images)
    earlier = [
        owner
        for edit, owner in zip(state.edits, state.owners)
        if owner >= 0 and (edit.prompt, edit.images) == question
    ]
    edits = (*state.edits, record)
    if not earlier:
        with _APPENDING:
            pool = Pool(*(appended(*pair) for pair in zip(state.pool, fresh)))
        return state._replace(pool=pool, edits=edits, owners=(*state.owners, len(state.pool.down)))
    place = earlier[0]
    at = torch.tensor([place], device=fresh.down.device)
    pool = Pool(*(old.index_copy(0, at, new) for old, new in zip(state.pool, fresh)))
    owners = tuple(-1 if owner == place else owner for owner in state.owners)
    return state._replace(pool=pool, edits=edits, owners=(*owners, place))


def appended(old: Tensor, fresh: Tensor) -> Tensor:
    """old [N ...] and fresh [n ...] one after another, at the cost of `fresh` alone, on average.

    Tensors are the first rows of a roomy one whose rows are NaN until they are taken; nobody who
    holds fewer rows sees the later ones. Rows that another sequence of edits took are left to it:
    then, and where there is no room, everything moves to one of twice the size.

    >>> appended(torch.zeros(2, 1), torch.ones(1, 1)).T
    tensor([[0., 0., 1.]])
    """
    begin, end = len(old), len(old) + len(fresh)
    roomy = old._base
    free = (
        roomy is not None
        and roomy.shape[1:] == old.shape[1:]
        and roomy.data_ptr() == old.data_ptr()
        and len(roomy) >= end
        and bool(roomy[begin:end].isnan().all())
    )
    if roomy is None or not free:
        roomy = old.new_full((max(8, 2 * end), *old.shape[1:]), torch.nan)
        roomy[:begin] = old
    roomy[begin:end] = fresh
    return roomy[:end]


_APPENDING = threading.Lock()  # between looking for room and taking it


def _padded(pool: Pool, length: int) -> Pool:
    """The pool with experts for nothing behind it: their columns of kinds keep out every row."""
    more = length - len(pool.down)
    if not more:
        return pool
    parts = [torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for part in pool]
    parts[0][-more:, -2:] = 1.0
    return Pool(*parts)


def _header(
    model: Model, config: LiveEditConfig, owners: tuple[int, ...], queries: Sequence[Query],
    earlier: tuple[EditRecord, ...] = (), num_experts: int = 1, stack: int = 0,
) -> Header:  # fmt: skip
    site = site_of(model, config)
    entry = Experts(
        name=site.weight,
        checkpoint=model.card.checkpoint.get(site.weight, site.weight),
        shape=tuple(model.params[site.weight].shape),
        num_experts=num_experts,
        rank=config.rank,
        hidden=model.card.width,
        slots=config.slots,
        width=config.width,
        heads=config.heads,
        sentinel=config.sentinel,
        sentinel_text=config.sentinel_text,
        owners=owners,
        blend=config.blend,
        most=config.most,
    )
    said = msgspec.structs.replace(config, trained=Path(config.trained).name)  # no one's folders
    return header_for(model, "liveedit", said, (entry,), queries, earlier=earlier, stack=stack)


def _tensors(model: Model, config: LiveEditConfig, nets: Nets, pool: Pool) -> Mapping[str, Tensor]:
    name = site_of(model, config).weight
    reader = absorbed(nets.ask, config.heads)._asdict()
    parts = {
        **pool._asdict(),
        **{field.replace("_", ".", 1): tensor for field, tensor in reader.items()},
        "norm": nets.norm,
        "sentinel": nets.sentinel,
        "sentinel_text": nets.sentinel_text,
    }
    return {f"{name}.{part}": tensor.detach().contiguous() for part, tensor in parts.items()}


PRESETS: dict[str, LiveEditConfig] = {
    "default": LiveEditConfig(),
    # configs/liveedit/*.yaml: layer 21 of 32; the sentinel is as long as the backbone's picture
    "blip2": LiveEditConfig(layer=21, sentinel=32, end=False),
    "llava": LiveEditConfig(layer=21, sentinel=576, end=False),
    "minigpt4": LiveEditConfig(layer=21, sentinel=32, end=False),
    # the micro zoo's: trained states come with the package
    "micro": LiveEditConfig(
        layer=1, width=64, heads=4, rank=8, places=6, sentinel=8, sentinel_text=4, blend="both",
        most=16, strength=1.0, sure=4.0, trained="shipped",
    ),
}  # fmt: skip
