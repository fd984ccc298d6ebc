"""Train an editor on the micro world: what makes the states that come with the package.

errata train mend llava                # to editors/states/mend-llava.safetensors
errata train mend llava --output my.safetensors --checkpoint-dir runs/mend
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import torch

from errata import adapters
from errata.bench.data import world
from errata.bench.data.world_text import text_cases
from errata.editors import statefile
from errata.editors.fit import TrainingConfig, TrainingProgress, train
from errata.functional import Case

__all__ = [
    "CASE_MIXES",
    "LIVEEDIT_RECIPE",
    "SERAC_RECIPE",
    "MEND_RECIPE",
    "RECIPES",
    "WORLD_LOSS_WEIGHTS",
    "CaseMix",
    "main",
    "training_cases",
]

Config = TypeVar("Config", bound=msgspec.Struct)

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
    num_text: int = 0  # without pictures
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
    """The cases of a mix."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Train one editor for one micro model; with a folder a killed training goes on from there."""
    parser = argparse.ArgumentParser(prog="errata train", description=main.__doc__)
    parser.add_argument("editor", choices=sorted(RECIPES))
    parser.add_argument("model", choices=adapters.zoo.micro_names())
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--checkpoint-dir", type=Path, default=None)
    parser.add_argument("--num-known", type=int, default=None)
    parser.add_argument("--num-new", type=int, default=None)
    parser.add_argument("--training-set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--editor-set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = adapters.load_micro(options.model)
    mix = CASE_MIXES.get(options.editor, CaseMix())
    mix = mix._replace(
        num_known=mix.num_known if options.num_known is None else options.num_known,
        num_new=mix.num_new if options.num_new is None else options.num_new,
    )
    cases = training_cases(mix)
    module = import_module(f"errata.editors.{options.editor}")
    settings = msgspec.structs.replace(module.PRESETS["micro"], weights="")
    settings = _with_overrides(settings, options.editor_set)
    result = train(
        model,
        getattr(module, f"{options.editor}_trainable")(settings),
        cases,
        _with_overrides(RECIPES[options.editor], options.training_set),
        checkpoint_dir=options.checkpoint_dir,
        progress=_print_progress,
    )
    output = options.output or statefile.WEIGHTS / f"{options.editor}-{options.model}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if options.editor in SAVED_IN_HALF else None
    statefile.save_checkpoint(
        output, module.trained_weights(result.state), module.compatibility(model, settings), dtype
    )
    sys.stdout.write(
        f"{output}: {result.num_steps} steps, held-out loss {result.validation_loss}\n"
    )
    return 0


def _with_overrides(settings: Config, pairs: Sequence[str]) -> Config:
    overrides = {
        name: msgspec.json.decode(value) for name, _, value in (p.partition("=") for p in pairs)
    }
    return msgspec.convert({**msgspec.to_builtins(settings), **overrides}, type(settings))


def _print_progress(progress: TrainingProgress) -> None:
    if progress.step % 10 == 0 or progress.step == 1:
        terms = "  ".join(f"{name} {value:.3f}" for name, value in progress.terms.items())
        held = "" if progress.validation_loss is None else f"  held {progress.validation_loss:.3f}"
        sys.stdout.write(
            f"{progress.step}/{progress.num_steps}  loss {progress.loss:.3f}{held}  {progress.cases_per_second:.1f} cases/s  "
            f"{terms}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
