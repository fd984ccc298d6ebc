"""`SeracConfig`, presets, published training settings."""

from __future__ import annotations

from typing import Annotated

import msgspec

from errata.editors.common.settings import AppendEos, Untrained, Weights
from errata.editors.training.config import MEND_LOSS_WEIGHTS, TrainingConfig
from errata.functional.kinds.scope.entry import Gate

__all__ = ["PRESETS", "TRAINING", "SeracConfig"]

_PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class SeracConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="serac"
):
    """Settings of SERAC; the sizes are those of the small network, for any base."""

    gate: Annotated[
        Gate,
        msgspec.Meta(
            description='"hard": in scope above the threshold. "soft": logits of base and '
            "counterfactual model are mixed."
        ),
    ] = "hard"
    threshold: Annotated[
        float,
        msgspec.Meta(
            ge=0,
            le=1,
            description="Similarity (0 to 1) above which a hard gate answers from the memory.",
        ),
    ] = 0.5
    dim: Annotated[_PositiveInt, msgspec.Meta(description="Width of the small network.")] = 256
    num_heads: Annotated[
        _PositiveInt, msgspec.Meta(description="Attention heads of the small network.")
    ] = 8
    num_classifier_layers: Annotated[
        _PositiveInt, msgspec.Meta(description="Layers of the scope classifier.")
    ] = 4
    num_counterfactual_layers: Annotated[
        _PositiveInt, msgspec.Meta(description="Layers of the counterfactual model.")
    ] = 4
    ffn_dim: Annotated[_PositiveInt, msgspec.Meta(description="Width of a feed-forward part.")] = (
        1024
    )
    key_dim: Annotated[
        _PositiveInt,
        msgspec.Meta(description="Width of the text half and of the image half of a key."),
    ] = 128
    num_image_queries: Annotated[
        _PositiveInt, msgspec.Meta(description="Rows that summarize the images of a question.")
    ] = 8
    append_eos: AppendEos = True
    weights: Weights = ""
    untrained: Untrained = False


PRESETS: dict[str, SeracConfig] = {
    "default": SeracConfig(),
    # EasyEdit's gate: mixed by the similarity; targets without the token that ends an answer
    "easyedit": SeracConfig(gate="soft", append_eos=False),
    # eric-mitchell/serac at test time
    "original": SeracConfig(gate="hard", threshold=0.5, append_eos=False),
    # the micro zoo's: trained states come with the package
    "micro": SeracConfig(
        dim=96,
        num_heads=4,
        num_classifier_layers=2,
        num_counterfactual_layers=2,
        ffn_dim=256,
        key_dim=64,
        num_image_queries=4,
        weights="shipped",
    ),
}

TRAINING: dict[str, TrainingConfig] = {
    # hparams/TRAINING/SERAC/*.yaml
    "easyedit": TrainingConfig(
        num_steps=50_000, batch_size=1, lr=1e-5, max_grad_norm=100.0, loss_weights=MEND_LOSS_WEIGHTS
    ),
    # serac: batches of ten edits, so that other edits are hard negatives
    "original": TrainingConfig(
        num_steps=50_000,
        batch_size=10,
        lr=1e-5,
        max_grad_norm=100.0,
        loss_weights=MEND_LOSS_WEIGHTS,
    ),
}
"""Published trainings: Adam at 1e-5, 0.1 for what an edit should reach, 1 for localities."""
