"""`WiseConfig` and presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from errata.editors.wise.merging import MergeMethod
from errata.functional.kinds.masked.entry import Activation, GateStatistic

__all__ = ["PRESETS", "WiseConfig"]

# EasyEdit's yaml for vision-language models: ten steps, ratio 0.4, the end of an answer untaught.
_EASYEDIT_SETTINGS: dict[str, Any] = {
    "num_steps": 10,
    "act_ratio": 0.4,
    "num_unrelated": 1,
    "layer": 23,
    "append_eos": False,
}

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
OwnNegative = Literal["image", "question"]


class WiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="wise"):
    """Settings of WISE; the defaults are EasyEdit's where they do not depend on the model."""

    site: str = "mlp.down"  # a linear map of a layer
    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 0.8  # number, or share of the depth
    mask_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1.0
    weight_decay: NonNegative = 1e-5
    num_steps: Count = 70
    norm_constraint: Positive | None = 1.0  # bound on |D|, per element
    alpha: NonNegative = 5.0  # unrelated prompts stay below it
    beta: NonNegative = 20.0  # edits rise above it
    gamma: NonNegative = 10.0  # and are as far apart
    act_ratio: Positive = 0.88  # of an edit's own activation: the threshold
    activation: Activation | Literal["auto"] = "auto"  # phi; "auto": the model's own
    gate_statistic: GateStatistic = "mean"
    unrelated_texts: tuple[str, ...] = ()  # unrelated prompts; (): the packaged ones
    unrelated_questions: tuple[str, ...] = ()  # of any picture; (): the packaged ones
    num_unrelated: Count = 4  # of each per edit
    own_negatives: tuple[
        OwnNegative, ...
    ] = ()  # questions about the edit's picture; its question without it
    stop_loss: NonNegative = 0.02  # an edit stops below it, once a step changes it by less than
    stop_improvement: NonNegative = 1e-4
    num_replayed: Annotated[int, msgspec.Meta(ge=0)] = 0  # earlier edits of a memory trained along
    save_freq: Count = 500  # edits of one memory
    merge_freq: Count = 1000  # edits after which full memories are merged into one
    merge_alg: MergeMethod = "ties"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.53  # of what a merge keeps
    mode: Literal["retrieve", "merge"] = "retrieve"  # merged memories stay apart, or become one
    append_eos: bool = True  # teach the end of the answer too, so that free generation stops there


PRESETS: dict[str, WiseConfig] = {
    # Llama-2-7b, Mistral-7b, Llama-3.2-3b; the paper's settings of its text-only models.
    "easyedit-llama": WiseConfig(layer=27, num_unrelated=1, append_eos=False),
    # `silu` there for a ReLU model: here the model's own.
    "easyedit-blip2": WiseConfig(site="mlp.up", mode="merge", **_EASYEDIT_SETTINGS),
    "easyedit-minigpt4": WiseConfig(mode="merge", **_EASYEDIT_SETTINGS),
    "easyedit-llava-onevision": WiseConfig(**_EASYEDIT_SETTINGS),
    "easyedit-qwen2-vl": WiseConfig(**_EASYEDIT_SETTINGS),
    "easyedit-qwen3-vl": WiseConfig(**{**_EASYEDIT_SETTINGS, "layer": 30}),
    # As qwen2-vl, by EasyEdit's two statistics: the mean of an edit against the largest of a long
    # prompt, so that a gate is open for nearly every picture.
    "easyedit-statistic": WiseConfig(gate_statistic="easyedit", **_EASYEDIT_SETTINGS),
    # The micro zoo's: the map that reads the normed stream, at the prompt's end. There activations
    # tell questions and creatures apart; with mlp.down and the mean, 96 to 100 % of other questions
    # about an edit's picture reach 0.6 to 0.8 of its activation (24 cases, LLaVA).
    "micro": WiseConfig(
        site="mlp.up",
        layer=-1,
        optimizer="adam",
        lr=3e-2,
        weight_decay=0.0,
        num_steps=250,
        norm_constraint=None,
        alpha=0.0,
        beta=80.0,
        gamma=40.0,
        act_ratio=0.8,
        gate_statistic="last",
        num_unrelated=8,
        own_negatives=("image", "question"),
        stop_loss=0.05,
        stop_improvement=1.0,
        num_replayed=9,
        save_freq=10,
        merge_freq=1_000_000,  # the maps are small: memories stay apart
    ),
}
