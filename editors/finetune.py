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

from errata.editors.common.gradient_descent import (
    DescentConfig,
    DescentState,
    Objective,
    descend_each,
    descend_jointly,
    require_no_edits,
)
from errata.editors.common.guards import guarded
from errata.editors.common.settings import (
    AppendEos,
    LearningRate,
    NormConstraint,
    NumSteps,
    StopLoss,
    WeightDecay,
)
from errata.editors.common.sites import resolve_parameters
from errata.functional import Delta, Editor, Header, Model, Query
from errata.functional.deltas.records import make_header
from errata.functional.kinds.schema import Dense

__all__ = ["PRESETS", "FinetuneConfig", "finetune_editor"]


class FinetuneConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="finetune"
):
    """Settings of FT: by default the last feed-forward's output map, as LiveEdit's baseline."""

    sites: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            min_length=1,
            description="Sites whose linear maps are trained, e.g. layers.-1.mlp.down, "
            "projector or vision.",
        ),
    ] = ("layers.-1.mlp.down",)
    all_parameters: Annotated[
        bool,
        msgspec.Meta(
            description="Whether every parameter below a site is trained, not only weights of "
            "linear maps."
        ),
    ] = False
    objective: Annotated[
        Objective,
        msgspec.Meta(
            description='Scored tokens: "target_tokens" (FT-M) or "last_prompt_token" (FT-L).'
        ),
    ] = "target_tokens"
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"], msgspec.Meta(description="Optimizer.")
    ] = "adamw"
    lr: LearningRate = 1e-3
    weight_decay: WeightDecay = 0.0
    num_steps: NumSteps = 25
    stop_loss: StopLoss = 1e-2
    norm_constraint: NormConstraint = None
    append_eos: AppendEos = True


def finetune_editor(config: FinetuneConfig = FinetuneConfig()) -> Editor:
    """FT as an editor: a `dense` change of each parameter at the sites, by gradient descent.

    The state is the change so far, one tensor per parameter. Sequential edits start from it with a
    fresh optimizer. `edit_each` makes independent edits, one per query.

    Args:
        config: The settings.

    Returns:
        The editor.

    Raises:
        UnknownSiteError: If a site is not in the model.

    References:
        Zhu et al. 2020, "Modifying Memories in Transformer Models", arXiv:2012.00363. FT-L and
        FT-M are presets of EasyEdit.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> editor = finetune_editor(FinetuneConfig(num_steps=2))
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
        >>> [entry.name for entry in delta.header.entries]
        ['model.language_model.layers.2.mlp.down_proj.weight']
    """
    descent_config = DescentConfig(
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        num_steps=config.num_steps,
        stop_loss=config.stop_loss,
        norm_constraint=config.norm_constraint,
        objective=config.objective,
        append_eos=config.append_eos,
    )

    def init(model: Model, generator: torch.Generator) -> DescentState:
        del generator  # nothing is random
        names = resolve_parameters(model, config.sites, all_parameters=config.all_parameters)
        zero = {n: torch.zeros_like(model.params[n], dtype=torch.float32) for n in names}
        return DescentState(zero)

    def edit(model: Model, state: DescentState, queries: Sequence[Query]):
        make_edit_header = partial(_make_header, config, model, state)
        tensors = descend_jointly(
            model,
            make_edit_header,
            state.tensors,
            queries,
            descent_config,
            decay_reference=model.params,
        )
        delta = Delta(make_edit_header(queries, 0), tensors)
        return delta, DescentState(tensors, delta.header.edits)

    def edit_each(model: Model, state: DescentState, queries: Sequence[Query]) -> Delta:
        make_edit_header = partial(_make_header, config, model, require_no_edits(state))
        tensors = descend_each(
            model,
            make_edit_header,
            state.tensors,
            queries,
            descent_config,
            decay_reference=model.params,
        )
        return Delta(make_edit_header(queries, len(queries)), tensors)

    return guarded(Editor("finetune", config, init, edit, edit_each))


def _make_header(
    config: FinetuneConfig, model: Model, state: DescentState, queries: Sequence[Query], stack: int
) -> Header:
    entries = tuple(
        Dense(
            name=name,
            checkpoint_name=model.card.checkpoint_name(name),
            shape=tuple(model.params[name].shape),
        )
        for name in state.tensors
    )
    earlier = () if stack else state.edits
    return make_header(
        model,
        "finetune",
        config,
        entries,
        queries,
        earlier_edits=earlier,
        stack=stack,
        order_dependent=True,
    )


_LAST_MLP = ("layers.-1.mlp.up", "layers.-1.mlp.down")


def _vlkeb_config(
    sites: tuple[str, ...], num_steps: int, lr: float, all_parameters: bool
) -> FinetuneConfig:
    return FinetuneConfig(
        sites=sites,
        all_parameters=all_parameters,
        num_steps=num_steps,
        lr=lr,
        weight_decay=0.01,
        stop_loss=0.0,
        append_eos=False,
    )


PRESETS: dict[str, FinetuneConfig] = {
    "liveedit": FinetuneConfig(append_eos=False),
    "vlkeb-llm-blip2": _vlkeb_config(_LAST_MLP, 15, 2e-4, False),
    "vlkeb-llm-minigpt4": _vlkeb_config(_LAST_MLP, 15, 1e-4, False),
    "vlkeb-llm-llava": _vlkeb_config(_LAST_MLP, 10, 1e-4, False),
    "vlkeb-alignment-blip2": _vlkeb_config(("projector",), 15, 2e-4, True),
    "vlkeb-alignment-minigpt4": _vlkeb_config(("projector",), 15, 1e-4, True),
    "vlkeb-alignment-llava": _vlkeb_config(("projector",), 10, 1e-4, True),
    "vlkeb-vision": _vlkeb_config(("vision.layers.-1.mlp",), 25, 2e-3, False),
    "mmke-llm": _vlkeb_config(_LAST_MLP, 40, 1e-4, False),
    "mmke-alignment": _vlkeb_config(("projector",), 30, 1e-4, True),
    "ice-ft-l": FinetuneConfig(
        sites=tuple(f"layers.{i}.mlp.down" for i in range(4, 9)),
        objective="last_prompt_token",
        optimizer="adam",
        lr=7e-4,
        norm_constraint=5e-4,
        append_eos=False,
    ),
    "ice-ft-m": FinetuneConfig(
        sites=tuple(f"layers.{i}.mlp.down" for i in range(4, 9)),
        optimizer="adam",
        lr=7e-4,
        norm_constraint=5e-4,
        append_eos=False,
    ),
}
