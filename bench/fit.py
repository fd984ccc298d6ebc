"""Train an editor on the micro world: what makes the states that come with the package.

python -m errata.bench.fit mend llava                # to editors/states/mend-llava.safetensors
python -m errata.bench.fit mend llava --out my.safetensors --folder runs/mend
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
from errata.editors.fit import FitConfig, Progress, fit
from errata.functional import Case

__all__ = ["CASES", "EXPERTS", "MEMORY", "MICRO", "RECIPES", "WORLD", "Mix", "main", "material"]

Settings = TypeVar("Settings", bound=msgspec.Struct)

WORLD = {
    "edit": 1.0,
    "rephrase": 1.0,
    "image_rephrase": 1.0,
    "text_locality": 1.0,
    "same_entity_locality": 1.0,
    "hard_locality": 1.0,
    "image_locality": 1.0,
}
"""All the world's probes but portability."""

MICRO = FitConfig(
    num_steps=60,
    together=16,
    lr=1e-3,
    lr_of={"rates": 1e-3},
    warmup=10,
    decay=True,
    clip=1.0,
    weights=WORLD,
    held=32,
    validate_every=20,
    seed=0,
)
"""The micro zoo's training of MEND."""


EXPERTS = FitConfig(
    num_steps=600,
    together=16,
    lr=4e-3,
    warmup=30,
    decay=True,
    clip=1.0,
    weights={**WORLD, "rephrase": 0.0},
    held=32,
    validate_every=100,
    patience=100,
)
"""LiveEdit's; questions in other words train its routing alone."""


MEMORY = FitConfig(
    num_steps=240,
    together=32,
    lr=2e-3,
    warmup=50,
    decay=True,
    clip=1.0,
    weights={name: weight for name, weight in WORLD.items() if name != "edit"},
    held=32,
    validate_every=100,
    patience=100,
)
"""SERAC's: an edit's own question is in its scope by definition."""


RECIPES: dict[str, FitConfig] = {"mend": MICRO, "liveedit": EXPERTS, "serac": MEMORY}
"""An editor that is trained joins by one entry. Its module has a preset "micro" and

    course(config) -> Course
    about(model, config) -> what a state fits
    kept(state) -> what a file holds
"""


class Mix(NamedTuple):
    """What an editor is trained on: how many cases of each sort, and questions of each probe."""

    known: int = 320  # of creatures that the models know
    new: int = 0  # of creatures that no model has seen
    text: int = 0  # without pictures
    names: int = 0  # more about known creatures' names, which are the hardest to say
    asks: int = 99
    seed: int = 0  # of new creatures
    shuffled: bool = False  # else the new ones come first


CASES: dict[str, Mix] = {
    "serac": Mix(200, 200),
    # a gate that tells a thousand creatures apart needs more of them than there are known ones
    "liveedit": Mix(1680, 600, 480, names=560, asks=1, seed=1, shuffled=True),
}
"""Of editors that want another mix than `Mix()`."""


HALVES = {"liveedit"}
"""Editors whose states lose nothing when they are kept in half precision."""


def material(mix: Mix) -> list[Case]:
    """The cases of a mix."""
    new = world.cases(mix.new, mix.seed, split="train", subjects="new")
    known = world.cases(mix.known, 0, split="train")
    if mix.shuffled:
        named = world.cases(mix.names, 2, split="train", relations=("name",))
        cases = known + new + named + text_cases(mix.text, 0, split="train")
        random.Random(0).shuffle(cases)
    else:
        cases = new + known + text_cases(mix.text, 0, split="train")
    return [
        case._replace(probes={name: asked[: mix.asks] for name, asked in case.probes.items()})
        for case in cases
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train one editor for one micro model; with a folder a killed training goes on from there."""
    parser = argparse.ArgumentParser(prog="python -m errata.bench.fit", description=main.__doc__)
    parser.add_argument("editor", choices=sorted(RECIPES))
    parser.add_argument("model", choices=adapters.zoo.micro_names())
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--cases", type=int, default=None)
    parser.add_argument("--new-cases", type=int, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--editor-set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = adapters.micro(options.model)
    mix = CASES.get(options.editor, Mix())
    mix = mix._replace(
        known=mix.known if options.cases is None else options.cases,
        new=mix.new if options.new_cases is None else options.new_cases,
    )
    cases = material(mix)
    home = import_module(f"errata.editors.{options.editor}")
    settings = msgspec.structs.replace(home.PRESETS["micro"], trained="")
    settings = _over(settings, options.editor_set)
    done = fit(
        model, home.course(settings), cases, _over(RECIPES[options.editor], options.set),
        folder=options.folder, progress=_tell,
    )  # fmt: skip
    out = options.out or statefile.FOLDER / f"{options.editor}-{options.model}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if options.editor in HALVES else None
    statefile.keep(out, home.kept(done.state), home.about(model, settings), dtype)
    sys.stdout.write(f"{out}: {done.steps} steps, held-out loss {done.held}\n")
    return 0


def _over(settings: Settings, pairs: Sequence[str]) -> Settings:
    said = {
        name: msgspec.json.decode(value) for name, _, value in (p.partition("=") for p in pairs)
    }
    return msgspec.convert({**msgspec.to_builtins(settings), **said}, type(settings))


def _tell(now: Progress) -> None:
    if now.step % 10 == 0 or now.step == 1:
        terms = "  ".join(f"{name} {value:.3f}" for name, value in now.terms.items())
        held = "" if now.held is None else f"  held {now.held:.3f}"
        sys.stdout.write(
            f"{now.step}/{now.of}  loss {now.loss:.3f}{held}  {now.cases_per_second:.1f} cases/s  "
            f"{terms}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
