"""Train an editor on the micro world: what makes the states that come with the package.

python -m errata.bench.fit mend llava                # to editors/states/mend-llava.safetensors
python -m errata.bench.fit mend llava --out my.safetensors --folder runs/mend
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from errata import adapters
from errata.bench.data import world
from errata.editors import statefile
from errata.editors.fit import FitConfig, Progress, fit

__all__ = ["MICRO", "RECIPES", "WORLD", "main"]

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
    num_steps=1200,
    together=16,
    lr=2e-3,
    warmup=50,
    decay=True,
    clip=1.0,
    weights=WORLD,
    held=32,
    validate_every=100,
    patience=100,
)
"""LiveEdit's."""


RECIPES: dict[str, FitConfig] = {"mend": MICRO, "liveedit": EXPERTS}
"""An editor that is trained joins by one entry. Its module has a preset "micro" and

    course(config) -> Course
    about(model, config) -> what a state fits
    kept(state) -> what a file holds
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train one editor for one micro model; with a folder a killed training goes on from there."""
    parser = argparse.ArgumentParser(prog="python -m errata.bench.fit", description=main.__doc__)
    parser.add_argument("editor", choices=sorted(RECIPES))
    parser.add_argument("model", choices=adapters.zoo.micro_names())
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--cases", type=int, default=320)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--editor-set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = adapters.micro(options.model)
    cases = world.cases(options.cases, 0, split="train")
    home = import_module(f"errata.editors.{options.editor}")
    settings = msgspec.structs.replace(home.PRESETS["micro"], trained="")
    settings = _over(settings, options.editor_set)
    done = fit(
        model, home.course(settings), cases, _over(RECIPES[options.editor], options.set),
        folder=options.folder, progress=_tell,
    )  # fmt: skip
    out = options.out or statefile.FOLDER / f"{options.editor}-{options.model}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    statefile.keep(out, home.kept(done.state), home.about(model, settings))
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
