"""`errata train`: train an editor for a model."""

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
from errata.adapters.zoo import micro
from errata.bench.training.recipes import (
    CASE_MIXES,
    RECIPES,
    SAVED_IN_HALF,
    CaseMix,
    training_cases,
)
from errata.editors.common import checkpoint
from errata.editors.training.loop import TrainingProgress, train

__all__ = ["main"]

Config = TypeVar("Config", bound=msgspec.Struct)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one editor for one micro model; with a folder a killed training goes on from there."""
    parser = argparse.ArgumentParser(prog="errata train", description=main.__doc__)
    parser.add_argument("editor", choices=sorted(RECIPES))
    parser.add_argument("model", choices=micro.micro_names())
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
    output = options.output or checkpoint.WEIGHTS / f"{options.editor}-{options.model}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if options.editor in SAVED_IN_HALF else None
    checkpoint.save_checkpoint(
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
            f"{progress.step}/{progress.num_steps}  loss {progress.loss:.3f}{held}  "
            f"{progress.cases_per_second:.1f} cases/s  "
            f"{terms}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
