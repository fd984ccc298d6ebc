"""Types of the settings that several methods share, with their descriptions."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

__all__ = [
    "AppendEos",
    "LayerChoice",
    "LearningRate",
    "LinearMap",
    "NormConstraint",
    "NumSteps",
    "StopLoss",
    "Untrained",
    "WeightDecay",
    "Weights",
]

AppendEos = Annotated[
    bool,
    Meta(
        description="Whether the token that ends an answer is taught too, so that free generation "
        "stops there."
    ),
]
LayerChoice = Annotated[
    Annotated[float, Meta(ge=0, lt=1)] | int,
    Meta(
        description="Decoder layer: a number (negative from the end), or a fraction of the depth."
    ),
]
LearningRate = Annotated[float, Meta(gt=0, description="Learning rate.")]
LinearMap = Annotated[str, Meta(description="A linear map of the layer, by its site name.")]
NormConstraint = Annotated[
    Annotated[float, Meta(gt=0)] | None,
    Meta(description="Bound on the absolute change of each element. None: no bound."),
]
NumSteps = Annotated[int, Meta(ge=1, le=10**9, description="Optimization steps, at most.")]
StopLoss = Annotated[
    float,
    Meta(ge=0, description="Loss in nats per token below which an edit stops. 0: never."),
]
WeightDecay = Annotated[float, Meta(ge=0, description="Weight decay, decoupled for adamw.")]
Untrained = Annotated[
    bool,
    Meta(
        description="Whether edits may be made with random weights, without training. Results say "
        "so."
    ),
]
Weights = Annotated[
    str,
    Meta(
        description='Trained weights: "shipped", or a file that `errata train` wrote. '
        '"": untrained.'
    ),
]
