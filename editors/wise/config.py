"""`WiseConfig` and its presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from errata.editors.common.settings import (
    AppendEos,
    LayerChoice,
    LearningRate,
    LinearMap,
    NormConstraint,
    NumSteps,
    WeightDecay,
)
from errata.editors.wise.merging import MergeMethod
from errata.functional.kinds.masked.entry import Activation, GateStatistic

__all__ = ["PRESETS", "WiseConfig"]

# EasyEdit's yaml for vision-language models.
_EASYEDIT_SETTINGS: dict[str, Any] = {
    "num_steps": 10,
    "act_ratio": 0.4,
    "num_unrelated": 1,
    "layer": 23,
    "append_eos": False,
}

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
OwnNegative = Literal["image", "question"]


class WiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="wise"):
    """Settings of WISE. Defaults that do not depend on the model are EasyEdit's."""

    site: LinearMap = "mlp.down"
    layer: LayerChoice = 0.8
    mask_ratio: Annotated[
        float,
        msgspec.Meta(
            gt=0, le=1, description="Fraction of the map's elements that a side memory may change."
        ),
    ] = 0.2
    optimizer: Annotated[Literal["sgd", "adam"], msgspec.Meta(description="Optimizer.")] = "sgd"
    lr: LearningRate = 1.0
    weight_decay: WeightDecay = 1e-5
    num_steps: NumSteps = 70
    norm_constraint: NormConstraint = 1.0
    alpha: Annotated[
        NonNegative,
        msgspec.Meta(description="Activation distance that unrelated prompts must stay below."),
    ] = 5.0
    beta: Annotated[
        NonNegative, msgspec.Meta(description="Activation distance that edits must exceed.")
    ] = 20.0
    gamma: Annotated[
        NonNegative,
        msgspec.Meta(description="Margin between the distances of edits and of unrelated prompts."),
    ] = 10.0
    act_ratio: Annotated[
        Positive,
        msgspec.Meta(
            description="Gate threshold, as a fraction of the edit's own activation distance."
        ),
    ] = 0.88
    activation: Annotated[
        Activation | Literal["auto"],
        msgspec.Meta(
            description='Activation function before distances are taken. "auto": the model\'s own.'
        ),
    ] = "auto"
    gate_statistic: Annotated[
        GateStatistic,
        msgspec.Meta(
            description='How distances of a prompt\'s tokens become one number: "mean" of all, '
            'of the "text" tokens, the "last" one, or "easyedit": as its code does.'
        ),
    ] = "mean"
    unrelated_texts: Annotated[
        tuple[str, ...],
        msgspec.Meta(description="Unrelated prompts. (): those that come with the package."),
    ] = ()
    unrelated_questions: Annotated[
        tuple[str, ...],
        msgspec.Meta(
            description="Unrelated questions about the edit's image. (): those that come with "
            "the package."
        ),
    ] = ()
    num_unrelated: Annotated[
        Count, msgspec.Meta(description="Unrelated prompts of each sort per edit.")
    ] = 4
    own_negatives: Annotated[
        tuple[OwnNegative, ...],
        msgspec.Meta(
            description='Further negatives: "image" (questions about the edit\'s image), '
            '"question" (its question without the image).'
        ),
    ] = ()
    stop_loss: Annotated[
        NonNegative,
        msgspec.Meta(
            description="Loss below which an edit stops, once a step improves it by less than "
            "`stop_improvement`."
        ),
    ] = 0.02
    stop_improvement: Annotated[
        NonNegative,
        msgspec.Meta(description="Improvement of the loss per step below which an edit may stop."),
    ] = 1e-4
    num_replayed: Annotated[
        int,
        msgspec.Meta(
            ge=0, description="Earlier edits of a memory that are trained again with a new one."
        ),
    ] = 0
    save_freq: Annotated[
        Count, msgspec.Meta(description="Edits per side memory before a new one begins.")
    ] = 500
    merge_freq: Annotated[
        Count, msgspec.Meta(description="Edits after which full memories are merged into one.")
    ] = 1000
    merge_alg: Annotated[
        MergeMethod,
        msgspec.Meta(
            description='Merge algorithm: "ties", "sign", "magnitude", "magnitude_norm", '
            '"dare_ties", "dare_linear", "linear" or "slerp".'
        ),
    ] = "ties"
    density: Annotated[
        float,
        msgspec.Meta(gt=0, le=1, description="Fraction of the largest changes that a merge keeps."),
    ] = 0.53
    mode: Annotated[
        Literal["retrieve", "merge"],
        msgspec.Meta(
            description='"retrieve": merged memories stay separate. "merge": a merged memory is '
            "merged again with the next ones."
        ),
    ] = "retrieve"
    append_eos: AppendEos = True


PRESETS: dict[str, WiseConfig] = {
    # Llama-2-7b, Mistral-7b, Llama-3.2-3b: the paper's settings for text-only models.
    "easyedit-llama": WiseConfig(layer=27, num_unrelated=1, append_eos=False),
    # EasyEdit sets `silu` for this ReLU model. Here: the model's own activation.
    "easyedit-blip2": WiseConfig(site="mlp.up", mode="merge", **_EASYEDIT_SETTINGS),
    "easyedit-minigpt4": WiseConfig(mode="merge", **_EASYEDIT_SETTINGS),
    "easyedit-llava-onevision": WiseConfig(**_EASYEDIT_SETTINGS),
    "easyedit-qwen2-vl": WiseConfig(**_EASYEDIT_SETTINGS),
    "easyedit-qwen3-vl": WiseConfig(**{**_EASYEDIT_SETTINGS, "layer": 30}),
    # As qwen2-vl, with EasyEdit's two statistics: the mean in editing, the maximum over long
    # prompts at inference. The gate is then open for nearly every image.
    "easyedit-statistic": WiseConfig(gate_statistic="easyedit", **_EASYEDIT_SETTINGS),
    # The micro models': the first MLP map, at the prompt's last token. There activations separate
    # questions and creatures. With mlp.down and the mean, 96 to 100 % of other questions about an
    # edit's image reach 0.6 to 0.8 of its activation (24 cases, LLaVA).
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
        merge_freq=1_000_000,  # never: the maps are small
    ),
}
