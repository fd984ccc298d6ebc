"""LoRA as an editor: train a low-rank change of chosen linear maps on the edit.

    y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ,   A [r in] ~ U(-1/sqrt(in), 1/sqrt(in)),   B [out r] = 0

with the loss of FT-M. The scale alpha / r is folded into B when the delta is written.

Sources: Hu et al. 2021 (arXiv 2106.09685); as an editing baseline: EasyEdit `lora_main.py`, whose
sequential edits continue to train one adapter, as here. Different from it: no dropout (its adapters
stay in training mode and make the edited model random), adapters for one edit or many independent
ones.

Cost: one vision and embedding pass, then `num_steps` passes from the lowest adapted layer. Memory:
four times the adapters per edit, and the activations of the layers above for the rows in flight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import msgspec
import torch

from errata.editors.common.gradient_descent import (
    DescentConfig,
    DescentState,
    descend_each,
    descend_jointly,
    require_no_edits,
)
from errata.editors.common.guards import guarded
from errata.editors.common.settings import AppendEos, LearningRate, NumSteps, StopLoss, WeightDecay
from errata.editors.common.sites import resolve_linears
from errata.functional import Delta, Editor, Header, Model, Query
from errata.functional.deltas.records import make_header
from errata.functional.kinds.schema import LowRank

__all__ = ["PRESETS", "LoraConfig", "lora_editor"]


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lora"):
    """Settings of LoRA; the defaults adapt q and v of every decoder layer."""

    target_modules: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            min_length=1, description="Sites of the adapted linear maps; * matches every layer."
        ),
    ] = (
        "layers.*.attn.q",
        "layers.*.attn.v",
    )
    rank: Annotated[int, msgspec.Meta(ge=1, le=1 << 20, description="Rank of each adapter.")] = 8
    alpha: Annotated[
        float,
        msgspec.Meta(
            gt=0, description="Scale of an adapter: its output is multiplied by alpha / rank."
        ),
    ] = 16.0
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"], msgspec.Meta(description="Optimizer.")
    ] = "adam"
    lr: LearningRate = 5e-3
    lr_decay: Annotated[
        float, msgspec.Meta(gt=0, le=1, description="Factor of the learning rate per step.")
    ] = 1.0
    weight_decay: WeightDecay = 0.0
    num_steps: NumSteps = 15
    stop_loss: StopLoss = 1e-2
    append_eos: AppendEos = True


def lora_editor(config: LoraConfig = LoraConfig()) -> Editor:
    """LoRA as an editor: a `lowrank` change of each target module, trained on the edit.

    The state is the adapter so far. Sequential edits train it further, so single edits cannot be
    removed from a sequence. `edit_each` makes independent adapters, one per query.

    Args:
        config: The settings.

    Returns:
        The editor.

    Raises:
        UnknownSiteError: If a target module is not in the model.

    References:
        Hu et al. 2021, "LoRA", arXiv:2106.09685.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> editor = lora_editor(LoraConfig(rank=2, num_steps=1))
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> queries = [Query("who is it?", "bo"), Query("and now?", "al")]
        >>> delta = editor.edit_each(model, state, queries)
        >>> delta.header.stack
        2
    """
    scale = config.alpha / config.rank
    descent_config = DescentConfig(
        optimizer=config.optimizer,
        lr=config.lr,
        lr_decay=config.lr_decay,
        weight_decay=config.weight_decay,
        num_steps=config.num_steps,
        stop_loss=config.stop_loss,
        append_eos=config.append_eos,
    )

    def to_delta_tensors(tensors):
        return {n: t * scale if n.endswith(".B") else t for n, t in tensors.items()}

    def init(model: Model, generator: torch.Generator) -> DescentState:
        return _init_state(model, config, generator)

    def edit(model: Model, state: DescentState, queries: Sequence[Query]):
        make_edit_header = partial(_make_header, config, model, state)
        tensors = descend_jointly(
            model,
            make_edit_header,
            state.tensors,
            queries,
            descent_config,
            to_delta_tensors=to_delta_tensors,
        )
        delta = Delta(make_edit_header(queries, 0), to_delta_tensors(tensors))
        return delta, DescentState(tensors, delta.header.edits)

    def edit_each(model: Model, state: DescentState, queries: Sequence[Query]) -> Delta:
        make_edit_header = partial(_make_header, config, model, require_no_edits(state))
        tensors = descend_each(
            model,
            make_edit_header,
            state.tensors,
            queries,
            descent_config,
            to_delta_tensors=to_delta_tensors,
        )
        return Delta(make_edit_header(queries, len(queries)), to_delta_tensors(tensors))

    return guarded(Editor("lora", config, init, edit, edit_each))


def _init_state(model: Model, config: LoraConfig, generator: torch.Generator) -> DescentState:
    tensors = {}
    for path in resolve_linears(model, config.target_modules):
        out_dim, in_dim = model.card.linear_shapes[path]
        device = model.params[model.card.canonical_name(path + ".weight")].device
        bound = 1 / math.sqrt(in_dim)
        down = torch.empty(config.rank, in_dim, dtype=torch.float32, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
        tensors[path + ".weight.A"] = down.to(device)
        tensors[path + ".weight.B"] = torch.zeros(
            out_dim, config.rank, device=device, dtype=torch.float32
        )
    return DescentState(tensors)


def _make_header(
    config: LoraConfig, model: Model, state: DescentState, queries: Sequence[Query], stack: int
) -> Header:
    names = [name.removesuffix(".A") for name in state.tensors if name.endswith(".A")]
    entries = tuple(
        LowRank(
            name=name,
            checkpoint_name=model.card.checkpoint_name(name),
            shape=tuple(model.params[model.card.canonical_name(name)].shape),
            rank=config.rank,
            transposed=name.removesuffix(".weight") in model.card.transposed,
        )
        for name in names
    )
    earlier = () if stack else state.edits
    return make_header(
        model,
        "lora",
        config,
        entries,
        queries,
        earlier_edits=earlier,
        stack=stack,
        order_dependent=True,
    )


PRESETS: dict[str, LoraConfig] = {
    "default": LoraConfig(),
    # EasyEdit's yaml for Qwen3-VL; its AdaLoRA ones for Qwen2-VL and LLaVA-OV cannot be built.
    "easyedit": LoraConfig(
        rank=8,
        alpha=32.0,
        optimizer="sgd",
        lr=0.1,
        lr_decay=0.9,
        num_steps=5,
        stop_loss=0.0,
        append_eos=False,
    ),
}
