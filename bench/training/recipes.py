"""Train an editor on the micro world: what makes the states that come with the package.

errata train mend llava                # to editors/weights/mend-llava.safetensors
errata train mend llava --output my.safetensors --checkpoint-dir runs/mend
"""

from __future__ import annotations

import random
from typing import NamedTuple

from errata.bench.data.world import cases as world
from errata.bench.data.world.text_cases import text_cases
from errata.editors.training.config import TrainingConfig
from errata.functional import Case

__all__ = [
    "CASE_MIXES",
    "LIVEEDIT_RECIPE",
    "MEND_RECIPE",
    "RECIPES",
    "SERAC_RECIPE",
    "WORLD_LOSS_WEIGHTS",
    "CaseMix",
    "training_cases",
]

WORLD_LOSS_WEIGHTS = {
    "edit": 1.0,
    "rephrase": 1.0,
    "image_rephrase": 1.0,
    "text_locality": 1.0,
    "same_entity_locality": 1.0,
    "hard_locality": 1.0,
    "image_locality": 1.0,
}
"""All the world's probes but portability."""

MEND_RECIPE = TrainingConfig(
    num_steps=60,
    batch_size=16,
    lr=1e-3,
    lr_by_group={"edit_lrs": 1e-3},
    warmup_steps=10,
    linear_decay=True,
    max_grad_norm=1.0,
    loss_weights=WORLD_LOSS_WEIGHTS,
    num_validation_cases=32,
    eval_every=20,
    seed=0,
)
"""The micro zoo's training of MEND."""


LIVEEDIT_RECIPE = TrainingConfig(
    num_steps=600,
    batch_size=16,
    lr=4e-3,
    warmup_steps=30,
    linear_decay=True,
    max_grad_norm=1.0,
    loss_weights={**WORLD_LOSS_WEIGHTS, "rephrase": 0.0},
    num_validation_cases=32,
    eval_every=100,
    early_stopping_patience=100,
)
"""LiveEdit's; questions in other words train its routing alone."""


SERAC_RECIPE = TrainingConfig(
    num_steps=240,
    batch_size=32,
    lr=2e-3,
    warmup_steps=50,
    linear_decay=True,
    max_grad_norm=1.0,
    loss_weights={name: weight for name, weight in WORLD_LOSS_WEIGHTS.items() if name != "edit"},
    num_validation_cases=32,
    eval_every=100,
    early_stopping_patience=100,
)
"""SERAC's: an edit's own question is in its scope by definition."""


RECIPES: dict[str, TrainingConfig] = {
    "mend": MEND_RECIPE,
    "liveedit": LIVEEDIT_RECIPE,
    "serac": SERAC_RECIPE,
}
"""An editor that is trained joins by one entry. Its module has a preset "micro" and

    course(config) -> Course
    about(model, config) -> what a state fits
    kept(state) -> what a file holds
"""


class CaseMix(NamedTuple):
    """What an editor is trained on: how many cases of each sort, and questions of each probe."""

    num_known: int = 320  # of creatures that the models know
    num_new: int = 0  # of creatures that no model has seen
    num_text: int = 0  # without images
    num_names: int = 0  # more about known creatures' names, which are the hardest to say
    questions_per_probe: int = 99
    seed: int = 0  # of new creatures
    shuffled: bool = False  # else the new ones come first


CASE_MIXES: dict[str, CaseMix] = {
    "serac": CaseMix(200, 200),
    # a gate that tells a thousand creatures apart needs more of them than there are known ones
    "liveedit": CaseMix(
        1680, 600, 480, num_names=560, questions_per_probe=1, seed=1, shuffled=True
    ),
}
"""Of editors that want another mix than `Mix()`."""


SAVED_IN_HALF = {"liveedit"}
"""Editors whose states lose nothing when they are kept in half precision."""


def training_cases(mix: CaseMix) -> list[Case]:
    """The cases of a mix.

    Args:
        mix: How many cases of each kind.

    Returns:
        Cases.
    """
    new = world.cases(mix.num_new, mix.seed, split="train", subjects="new")
    known = world.cases(mix.num_known, 0, split="train")
    if mix.shuffled:
        name_cases = world.cases(mix.num_names, 2, split="train", relations=("name",))
        cases = known + new + name_cases + text_cases(mix.num_text, 0, split="train")
        random.Random(0).shuffle(cases)
    else:
        cases = new + known + text_cases(mix.num_text, 0, split="train")
    return [
        case._replace(
            probes={name: asked[: mix.questions_per_probe] for name, asked in case.probes.items()}
        )
        for case in cases
    ]
