"""FT: gradient descent on a few parameters until the model gives the target.

Minimise over d, for the parameters W of the chosen sites,

    L(d) = mean over target tokens of -log p(x*_j | image, prompt, x*_<j ; W + d)      (FT-M)
    L(d) = mean over target tokens of -log p(x*_j | image, prompt ; W + d)             (FT-L)

with AdamW, Adam or SGD, optionally |d| <= clamp after each step. The variants of the field are
sites: last layers ("layers.-1.mlp.down"), alignment ("projector"), vision ("vision.layers.-1").

Sources: VLKEB `algs/FT.py` (FT-LLM, FT-alignment), qizhou000/LiveEdit `ft_vl.py` (stop at loss),
Yofuria/ICE (FT-L, FT-M, clamp). Where a peer re-runs the whole model in every step, only what lies
above the lowest edited place is run here, and for the last MLP only the target's positions.

Cost: one forward of the edited rows up to the cut, then `num_steps` forwards and backwards from it;
memory: four times the edited parameters per edit side by side (d, its gradient, two moments).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import msgspec
import torch

from errata.functional import Delta, Dense, Editor, Model, Query
from errata.functional.records import header_for

from .descent import Objective, Rule, Trained, descend_each, descend_jointly, fresh
from .sites import parameters

__all__ = ["PRESETS", "FinetuneConfig", "finetune"]


class FinetuneConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="finetune"
):
    """Settings of FT: by default the last feed-forward's output map, as LiveEdit's baseline."""

    sites: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("layers.-1.mlp.down",)
    whole: bool = False  # every parameter below a site, not only the weights of linear maps
    objective: Objective = "target"  # "target" is FT-M, "last" is FT-L
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    num_steps: Annotated[int, msgspec.Meta(ge=1)] = 25
    stop_loss: Annotated[float, msgspec.Meta(ge=0)] = 1e-2  # an edit stops below it; 0: never
    clamp: Annotated[float, msgspec.Meta(gt=0)] | None = None  # bound on |d|, per element
    end: bool = True  # teach the end of the answer too, so that free generation stops there


def finetune(config: FinetuneConfig = FinetuneConfig()) -> Editor:
    """FT as an editor: the delta is a `dense` change of each parameter at the sites.

    State: the change so far, one tensor per parameter. Sequential edits start from it with a fresh
    optimiser. Raises UnknownSite when a site is not in the model.

    >>> from errata import adapters
    >>> model = adapters.adapt(*adapters.tiny("llava"))
    >>> editor = finetune(FinetuneConfig(num_steps=2))
    >>> state = editor.init(model, torch.Generator().manual_seed(0))
    >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
    >>> [entry.name for entry in delta.header.entries]
    ['model.language_model.layers.2.mlp.down_proj.weight']
    """
    rule = Rule(
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        num_steps=config.num_steps,
        stop_loss=config.stop_loss,
        clamp=config.clamp,
        objective=config.objective,
        end=config.end,
    )

    def init(model: Model, generator: torch.Generator) -> Trained:
        del generator  # nothing is random
        names = parameters(model, config.sites, everything=config.whole)
        zero = {n: torch.zeros_like(model.params[n], dtype=torch.float32) for n in names}
        return Trained(zero)

    def describe(model: Model, state: Trained, queries: Sequence[Query], stack: int):
        entries = tuple(
            Dense(
                name=name,
                checkpoint=model.card.checkpoint.get(name, name),
                shape=tuple(model.params[name].shape),
            )
            for name in state.tensors
        )
        earlier = () if stack else state.edits
        return header_for(
            model, "finetune", config, entries, queries, earlier=earlier, stack=stack,
            recursive=True,
        )  # fmt: skip

    def edit(model: Model, state: Trained, queries: Sequence[Query]):
        header = partial(describe, model, state)
        tensors = descend_jointly(model, header, state.tensors, queries, rule, anchor=model.params)
        delta = Delta(header(queries, 0), tensors)
        return delta, Trained(tensors, delta.header.edits)

    def each(model: Model, state: Trained, queries: Sequence[Query]) -> Delta:
        header = partial(describe, model, fresh(state))
        tensors = descend_each(model, header, state.tensors, queries, rule, anchor=model.params)
        return Delta(header(queries, len(queries)), tensors)

    return Editor("finetune", config, init, edit, each)


_LAST = ("layers.-1.mlp.up", "layers.-1.mlp.down")


def _vlkeb(sites: tuple[str, ...], num_steps: int, lr: float, whole: bool) -> FinetuneConfig:
    return FinetuneConfig(
        sites=sites, whole=whole, num_steps=num_steps, lr=lr, weight_decay=0.01, stop_loss=0.0,
        end=False,
    )  # fmt: skip


PRESETS: dict[str, FinetuneConfig] = {
    "liveedit": FinetuneConfig(end=False),
    "vlkeb-llm-blip2": _vlkeb(_LAST, 15, 2e-4, False),
    "vlkeb-llm-minigpt4": _vlkeb(_LAST, 15, 1e-4, False),
    "vlkeb-llm-llava": _vlkeb(_LAST, 10, 1e-4, False),
    "vlkeb-alignment-blip2": _vlkeb(("projector",), 15, 2e-4, True),
    "vlkeb-alignment-minigpt4": _vlkeb(("projector",), 15, 1e-4, True),
    "vlkeb-alignment-llava": _vlkeb(("projector",), 10, 1e-4, True),
    "vlkeb-vision": _vlkeb(("vision.layers.-1.mlp",), 25, 2e-3, False),
    "mmke-llm": _vlkeb(_LAST, 40, 1e-4, False),
    "mmke-alignment": _vlkeb(("projector",), 30, 1e-4, True),
    "ice-ft-l": FinetuneConfig(
        sites=tuple(f"layers.{i}.mlp.down" for i in range(4, 9)),
        objective="last",
        optimizer="adam",
        lr=7e-4,
        clamp=5e-4,
        end=False,
    ),
    "ice-ft-m": FinetuneConfig(
        sites=tuple(f"layers.{i}.mlp.down" for i in range(4, 9)),
        optimizer="adam",
        lr=7e-4,
        clamp=5e-4,
        end=False,
    ),
}
