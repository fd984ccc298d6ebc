"""MEND: a trained network turns the gradient of an edit into an update that generalises.

The gradient of the edit's loss at a linear map is sum_t delta_t u_t^T. A network g (`mend_net.py`)
sees each token's factors and gives

    dW = alpha * sum_t delta~_t u~_t^T,    (u~_t, delta~_t) = g(u_t, delta_t),    W' = W + dW

with alpha learned per map. The update is kept as its factors, A = u~ and B = alpha delta~: its rank
is the number of tokens that carry a gradient, and no dense matrix is formed. Being added in fp32
beside W it is not lost to rounding either, as half-precision W + dW is.

Training minimises, over g and alpha, with p the base and p' the edited model,

    c_edit * NLL_p'(edit, rephrased) + c_image * NLL_p'(other picture) + c_loc * KL(p || p')

Sources: Mitchell et al. 2022, "Fast Model Editing at Scale"; eric-mitchell/mend; EasyEdit's
`trainer/algs/MEND.py` for the multimodal losses (whose decoder-only models were trained on logits
one position off). A sequence of edits differentiates the edited model each time and adds rows.

Cost of an edit: one forward to the lowest site, one forward and backward above it, and g.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.functional import (
    Batch,
    Delta,
    Editor,
    EditRecord,
    Header,
    LowRank,
    Model,
    Query,
    prefix,
)
from errata.functional.bind import bind
from errata.functional.errors import UnknownSite, listed
from errata.functional.factors import factors
from errata.functional.losses import nll
from errata.functional.records import base_of, header_for
from errata.functional.types import Learner

from . import statefile
from .fit import Course, FitConfig, Lesson, weighed
from .mend_net import Network, Norms, Packed, network, norms, observe, pack, transform

__all__ = [
    "PRESETS",
    "TRAINING",
    "Editing",
    "MendConfig",
    "Meta",
    "about",
    "course",
    "kept",
    "mend",
]


class MendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mend"):
    """Settings of MEND; `edit_lr` is where alpha starts: below zero an untrained MEND descends."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = (
        "layers.-3.mlp",
        "layers.-2.mlp",
        "layers.-1.mlp",
    )
    rank: Annotated[int, msgspec.Meta(ge=1)] = 1920
    num_hidden: Annotated[int, msgspec.Meta(ge=0)] = 1
    combine: bool = True  # u and delta go through one network
    edit_lr: float = 1e-4
    end: bool = False  # the token that ends an answer is learned with it
    trained: str = ""  # "shipped", or a file that `statefile.keep` wrote; "": untrained


class Meta(NamedTuple):
    """What is trained: a network per shape of map, and alpha per map."""

    nets: dict[str, Network]
    rates: dict[str, Tensor]


class Editing(NamedTuple):
    """State of MEND: the trained part, what it whitens by, and the edits so far."""

    meta: Meta
    norms: dict[str, Norms]
    config: MendConfig
    tensors: dict[str, Tensor] = {}
    ranks: tuple[int, ...] = ()  # rows of each edit so far
    edits: tuple[EditRecord, ...] = ()


def mend(config: MendConfig = MendConfig()) -> Editor:
    """MEND as an editor: a `lowrank` delta, its rows tagged by edit, added in fp32.

    Taking one edit of a sequence away removes its rows; edits that followed were made with it
    present. Raises UnknownSite for a site that matches no linear map, BadInput for a trained state
    that is missing or does not fit.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = mend(MendConfig(sites=("layers.-1.mlp.down",), rank=4, edit_lr=-0.1))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> tokens = model.read([Query("who is it?", "bo")]).labels.shape[1]
    >>> delta.header.entries[0].rows == (tokens,)
    True
    """

    def init(model: Model, generator: torch.Generator) -> Editing:
        fresh = _fresh(model, config, generator)
        if not config.trained:
            return fresh
        shipped = config.trained == "shipped"
        path = statefile.shipped("mend", model) if shipped else config.trained
        meta, norms = statefile.recall(path, (fresh.meta, fresh.norms), about(model, config))
        return fresh._replace(meta=meta, norms=norms)

    def edit(model: Model, state: Editing, queries: Sequence[Query]) -> tuple[Delta, Editing]:
        batch = _cut(model, config, queries)
        packed = _packed(model, state, config, batch, scale=1 / len(queries))
        counts = torch.stack([one.keep.sum(-1) for one in packed.values()]).amax(0)  # [E]
        ranks = tuple(counts.clamp_min(1).tolist())
        tensors = {}
        for name, fresh in _updates(model, state, packed).items():
            axis = 0 if name.endswith(".A") else 1
            own = [part.narrow(axis, 0, rank) for part, rank in zip(fresh, ranks)]
            before = [state.tensors[name]] if state.edits else []
            tensors[name] = torch.cat([*before, *own], axis)
        delta = _delta(model, config, state, tensors, state.ranks + ranks, queries)
        return delta, state._replace(
            tensors=tensors, ranks=state.ranks + ranks, edits=delta.header.edits
        )

    def each(model: Model, state: Editing, queries: Sequence[Query]) -> Delta:
        packed = _packed(model, state, config, _cut(model, config, queries))
        tensors = {}
        for name, fresh in _updates(model, state, packed).items():
            before = [state.tensors[name].expand(len(queries), -1, -1)] if state.edits else []
            tensors[name] = torch.cat([*before, fresh], 1 if name.endswith(".A") else 2)
        return _delta(model, config, state, tensors, (), queries, stack=len(queries))

    return Editor("mend", config, init, edit, each)


def course(config: MendConfig = MendConfig()) -> Course:
    """How MEND is trained, for `fit`: every case of a lesson is edited on its own, side by side."""
    editor = mend(config)

    def study(model: Model, state: Editing, lesson: Lesson, learn: bool):
        packed = _packed(model, state, config, lesson.edit)
        if learn:
            seen = dict(state.norms)
            for site, group, _ in _maps(model, config):
                seen[group] = observe(seen[group], packed[site])
            state = state._replace(norms=seen)
        return state, (lesson, packed)

    def loss(model: Model, state: Editing, studied: tuple[Lesson, dict[str, Packed]]):
        lesson, packed = studied
        tensors = _updates(model, state, packed)
        header = _header(model, config, state, tensors, (), lesson.queries, len(lesson.queries))
        return weighed(bind(model, Delta(header, tensors), check=False), lesson)

    return Course(
        learner=Learner(editor, loss),
        sites=lambda model: model.card.match(config.sites),
        trained=lambda state: state.meta,
        placed=lambda state, meta: state._replace(meta=meta),
        study=study,
        end=config.end,
    )


def about(model: Model, config: MendConfig) -> dict[str, Any]:
    """What a trained state fits: the architecture of the network, and the sites' own values."""
    names = [path + ".weight" for path in model.card.match(config.sites)]
    base = base_of(model, names)
    return {
        "editor": "mend",
        "sites": list(config.sites),
        "rank": config.rank,
        "num_hidden": config.num_hidden,
        "combine": config.combine,
        "end": config.end,
        "family": base.family,
        "touched": base.touched,
    }


def kept(state: Editing) -> tuple[Meta, dict[str, Norms]]:
    """What a file of a trained state holds."""
    return state.meta, state.norms


def _maps(model: Model, config: MendConfig) -> list[tuple[str, str, int]]:
    """Each edited map: its path, the group of its shape, its number in the group."""
    found, counts = [], Counter()
    for path in model.card.match(config.sites):
        out, width = model.card.linears[path]
        group = f"{width}x{out}"
        found.append((path, group, counts[group]))
        counts[group] += 1
    outside = [path for path, _, _ in found if model.card.layer_of(path) is None]
    if outside:
        raise UnknownSite(
            f"sites of MEND must be linear maps of decoder layers, and {listed(outside)} is not."
        )
    return found


def _fresh(model: Model, config: MendConfig, generator: torch.Generator) -> Editing:
    maps = _maps(model, config)
    nets, seen = {}, {}
    for group, number in Counter(group for _, group, _ in maps).items():
        width, out = map(int, group.split("x"))
        nets[group] = network(
            width, out, number, rank=config.rank, num_layers=config.num_hidden + 1,
            combine=config.combine, generator=generator,
        )  # fmt: skip
        seen[group] = norms(width, out)
    device = model.params[maps[0][0] + ".weight"].device
    rates = {path: torch.tensor(config.edit_lr) for path, _, _ in maps}
    meta, seen = pytree.tree_map(lambda t: t.to(device), (Meta(nets, rates), seen))
    return Editing(meta, seen, config)


def _cut(model: Model, config: MendConfig, queries: Sequence[Query]) -> Batch:
    names = [path + ".weight" for path, _, _ in _maps(model, config)]
    inputs = model.read(queries, end=True) if config.end else model.read(queries)
    return cast(Batch, prefix.cut(model, inputs, prefix.reach(model.card, names)))


def _packed(
    model: Model, state: Editing, config: MendConfig, batch: Batch, scale: float = 1.0
) -> dict[str, Packed]:
    """The factors of each row's gradient, under the edits there are."""
    sites = [path for path, _, _ in _maps(model, config)]
    if state.edits:
        header = _header(model, config, state, state.tensors, state.ranks, (), 0)
        model = bind(model, Delta(header, state.tensors), check=False)
    batch = batch._replace(edit=torch.zeros_like(batch.edit))
    found = factors(model, batch, sites, loss=lambda logits, b: scale * nll(logits, b.labels).sum())
    return {site: pack(one) for site, one in found.items()}


def _updates(model: Model, state: Editing, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    """A [E R I] and B [E O R] of every map, R the most tokens that any edit has at any map."""
    most = max(one.keep.shape[1] for one in packed.values())
    tensors = {}
    for site, group, number in _maps(model, state.config):
        one = transform(state.meta.nets[group], state.norms[group], number, packed[site])
        more = (0, 0, 0, most - one.keep.shape[1])
        tensors[site + ".weight.A"] = F.pad(one.input, more)
        tensors[site + ".weight.B"] = F.pad(state.meta.rates[site] * one.delta, more).mT
    return tensors


def _header(
    model: Model, config: MendConfig, state: Editing, tensors: Mapping[str, Tensor],
    ranks: tuple[int, ...], queries: Sequence[Query], stack: int,
) -> Header:  # fmt: skip
    entries = tuple(
        LowRank(
            name=path + ".weight",
            checkpoint=model.card.checkpoint.get(path + ".weight", path + ".weight"),
            shape=tuple(model.params[path + ".weight"].shape),
            rank=tensors[path + ".weight.A"].shape[-2],
            rows=ranks,
            transposed=path in model.card.transposed,
        )
        for path, _, _ in _maps(model, config)
    )
    said = msgspec.structs.replace(config, trained=Path(config.trained).name)  # no one's folders
    return header_for(
        model, "mend", said, entries, queries, earlier=() if stack else state.edits,
        form="act_fp32", stack=stack,
    )  # fmt: skip


def _delta(
    model: Model, config: MendConfig, state: Editing, tensors: Mapping[str, Tensor],
    ranks: tuple[int, ...], queries: Sequence[Query], stack: int = 0,
) -> Delta:  # fmt: skip
    header = _header(model, config, state, tensors, ranks, queries, stack)
    return Delta(header, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _layers(*numbers: int, parts: Sequence[str] = ("up", "down")) -> tuple[str, ...]:
    return tuple(f"layers.{number}.mlp.{part}" for number in numbers for part in parts)


PRESETS: dict[str, MendConfig] = {
    "default": MendConfig(),
    # EasyEdit's yaml: layers 29 to 31 of 32 (BLIP-2, MiniGPT-4), 25 to 27 of 28 (LLaVA-OneVision,
    # Qwen2-VL), fc1 and fc2 or up and down; the same numbers for Qwen3-VL-4B, of 36.
    "easyedit": MendConfig(sites=_layers(-3, -2, -1)),
    "easyedit-qwen3-vl": MendConfig(sites=_layers(25, 26, 27)),
    # LiveEdit's: the gate too, where there is one
    "liveedit": MendConfig(),
    # the micro zoo's: trained states come with the package
    "micro": MendConfig(
        sites=("layers.-2.mlp", "layers.-1.mlp"),
        rank=16,
        edit_lr=-3e-3,
        end=True,
        trained="shipped",
    ),
    "untrained": MendConfig(edit_lr=-1e-2),
}

TRAINING: dict[str, FitConfig] = {
    # EasyEdit's and VLKEB's: one case at a time, two of them a step
    "easyedit": FitConfig(
        num_steps=30_000,
        together=1,
        accumulate=2,
        lr=1e-6,
        lr_of={"rates": 1e-4},
        clip=100.0,
        validate_every=5000,
        held=500,
    ),
}
