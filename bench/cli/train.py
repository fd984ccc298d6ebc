"""`errata train`: train the networks of an editor for a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.cli.options import _add_command
from errata.functional.errors import InvalidInputError, InvalidSettingsError, unknown_name

if TYPE_CHECKING:
    from errata.editors.training.loop import TrainingProgress

__all__ = ["register"]


def register(subparsers: Any) -> None:
    """Add the command to the subparsers of `errata`.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
    """
    parser = _add_command(
        subparsers, "train", _train, "train the networks of MEND, SERAC or LiveEdit; resumes"
    )
    parser.add_argument("editor", help="a method that is trained: mend, serac, liveedit")
    parser.add_argument("model", help="a shipped model: micro/NAME, or NAME")
    parser.add_argument("--output", type=Path, help="file of the trained weights to write")
    parser.add_argument(
        "--checkpoint-dir", type=Path, help="folder of checkpoints, from which training resumes"
    )
    parser.add_argument("--num-known", type=int, help="training cases about known creatures")
    parser.add_argument("--num-new", type=int, help="training cases about new creatures")
    parser.add_argument(
        "--training-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the training; may be repeated",
    )
    parser.add_argument(
        "--editor-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the editor; may be repeated",
    )


def _train(options: argparse.Namespace) -> int:
    import msgspec
    import torch

    from errata import adapters
    from errata.adapters.zoo.micro import micro_names
    from errata.bench.training.recipes import (
        CASE_MIXES,
        RECIPES,
        SAVED_IN_HALF,
        CaseMix,
        training_cases,
    )
    from errata.editors import METHODS
    from errata.editors.common.checkpoint import WEIGHTS, save_checkpoint
    from errata.editors.renamed import RENAMED_SETTINGS, RENAMED_TRAINING
    from errata.editors.training.loop import train

    trained = [name for name, method in METHODS.items() if method.trainable]
    if options.editor not in trained:
        raise InvalidInputError(f"{unknown_name('trained editor', options.editor, trained)}.")
    name = options.model.removeprefix("micro/")
    if name not in micro_names():
        raise InvalidInputError(
            f"`errata train` trains for the shipped models ({', '.join(micro_names())}); got "
            f"{options.model!r}. For another model call errata.editors.training.loop.train."
        )
    method = METHODS[options.editor]
    config = msgspec.structs.replace(method.presets["micro"], weights="")
    config = _with_overrides(
        config, options.editor_set, "--editor-set", RENAMED_SETTINGS[options.editor]
    )
    recipe = _with_overrides(
        RECIPES[options.editor], options.training_set, "--training-set", RENAMED_TRAINING
    )
    mix = CASE_MIXES.get(options.editor, CaseMix())
    counts = {"num_known": options.num_known, "num_new": options.num_new}
    mix = mix._replace(**{key: count for key, count in counts.items() if count is not None})

    torch.set_num_threads(1)
    assert method.trainable
    model, trainable = adapters.load_micro(name), method.trainable(config)
    result = train(
        model,
        trainable,
        training_cases(mix),
        recipe,
        checkpoint_dir=options.checkpoint_dir,
        progress=_print_progress,
    )
    output = options.output or WEIGHTS / f"{options.editor}-{name}.safetensors"
    output.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if options.editor in SAVED_IN_HALF else None
    save_checkpoint(output, trainable.weights(result.state), trainable.compatibility(model), dtype)
    print(f"{output}: {result.num_steps} steps, validation loss {result.validation_loss}")
    return 0


def _with_overrides(
    settings: Any, pairs: Sequence[str], option: str, renamed: Mapping[str, str]
) -> Any:
    import msgspec

    from errata.bench.cli.edit import _parse_assignments

    overrides = _parse_assignments(pairs)
    unknown = sorted(set(overrides) - set(settings.__struct_fields__))
    if unknown:
        names = (
            unknown_name("setting", key, settings.__struct_fields__, renamed.get(key, ""))
            for key in unknown
        )
        raise InvalidSettingsError(f"{option}: {'; '.join(names)}.")
    try:
        return msgspec.convert({**msgspec.to_builtins(settings), **overrides}, type(settings))
    except msgspec.ValidationError as error:
        raise InvalidSettingsError(f"{option}: {error}.") from None


def _print_progress(progress: TrainingProgress) -> None:
    if progress.step % 10 and progress.step != 1:
        return
    terms = "  ".join(f"{name} {value:.3f}" for name, value in progress.terms.items())
    validation = (
        "" if progress.validation_loss is None else f"  validation {progress.validation_loss:.3f}"
    )
    print(
        f"{progress.step}/{progress.num_steps}  loss {progress.loss:.3f}{validation}  "
        f"{progress.cases_per_second:.1f} cases/s  {terms}",
        file=sys.stderr,
        flush=True,
    )
