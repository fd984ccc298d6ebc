"""The command line: `errata run | edit | generate | models | editors | ...`.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once. What a user can
put right ends with exit code 2 and one sentence; `--debug` shows where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.functional.errors import ErrataError, InvalidInputError, InvalidSettingsError

from . import cli_data, cli_delta

if TYPE_CHECKING:
    from errata.functional import Model, Query

__all__ = ["main"]

Command = Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0: done, 2: the user can put it right, 130: stopped."""
    options = _parser().parse_args(argv)
    # Threads that wait must sleep: beside other work, spinning costs several times the time. Both
    # are read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("errata: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ErrataError, OSError) as fault:
        if options.debug:
            raise
        print(f"errata: {_error_message(fault)}", file=sys.stderr)
        return 2
    except Exception as fault:
        if options.debug:
            raise
        print(
            f"errata: this should not have happened: {type(fault).__name__}: {fault}. "
            "Please report it with what `errata --debug ...` prints.",
            file=sys.stderr,
        )
        return 1


def _error_message(error: Exception) -> str:
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    reason = error.strerror or str(error)
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{reason}; it must be there, of the right kind and open to you: check the path, "
        "its permissions and the space left."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="errata", description="Edit what a multimodal language model knows: edits as values."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    run = _add_command(
        subparsers, "run", _run, "models x editors x cases, from a TOML file; goes on if stopped"
    )
    run.add_argument("file", type=Path, help="settings, e.g. demo.toml")
    run.add_argument("--output", help="folder for the results instead of the file's `output_dir`")
    run.add_argument(
        "--overwrite", action="store_true", help="drop what `output_dir` holds and start over"
    )
    run.add_argument("--profile", action="store_true", help="say where the time of this run goes")

    edit = _add_command(subparsers, "edit", _edit, "make one edit and write it to a delta file")
    _add_model_options(edit)
    edit.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    edit.add_argument("--prompt", required=True)
    edit.add_argument("--target", required=True, help="the answer wanted")
    edit.add_argument("--editor", default="finetune", help="see `errata editors`")
    edit.add_argument("--preset", default="")
    edit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("-o", "--output", type=Path, required=True, help="the delta file to write")

    ask = _add_command(
        subparsers, "generate", _generate, "ask a model a question, with or without edits"
    )
    _add_model_options(ask)
    ask.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    ask.add_argument("--prompt", required=True)
    ask.add_argument("--delta", type=Path, action="append", default=[], help="may be repeated")
    ask.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")

    _add_command(
        subparsers, "models", _models, "the micro models that are shipped, and the families served"
    )
    editors = _add_command(
        subparsers, "editors", _editors, "the editors, their settings and presets"
    )
    editors.add_argument("name", nargs="?", help="only this one")
    cli_data.register(subparsers)
    cli_delta.register(subparsers)
    return parser


def _add_command(
    subparsers: Any, name: str, function: Command, summary: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + "."
    )
    parser.set_defaults(command=function)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="micro/NAME, a folder, or a hub id")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cpu")


def _run(options: argparse.Namespace) -> None:
    import msgspec

    from .settings import read_settings

    settings = read_settings(options.file)
    if options.output:
        settings = msgspec.structs.replace(settings, output_dir=options.output)

    from . import report
    from .ledger import read_rows
    from .run import run

    text = options.file.read_text()
    folder = run(settings, text, overwrite=options.overwrite, profile=options.profile)
    print(report.table(read_rows(folder)))
    if options.profile:
        print(f"\n{report.timing_table(folder)}")
    print(f"\n{folder / 'report.html'}")


def _edit(options: argparse.Namespace) -> None:
    import torch

    from errata import editors
    from errata.functional import io
    from errata.functional.answers import read_out
    from errata.functional.bind import bind

    from .corpora import demonstration_cases
    from .probes import check_finite

    config = editors.configure(
        options.editor, options.preset, **_parse_assignments(options.settings)
    )
    editor = editors.make_editor(config, demonstration_cases(config))
    if not options.target.strip():
        raise InvalidInputError("--target must say the answer wanted; it is empty.")
    query = _make_query(options, options.target)
    model = _open_model(options)
    check_finite(model, read_out(model, model.preprocess([query])))
    state = editor.init(model, torch.Generator().manual_seed(options.seed))
    delta, _ = editor.edit(model, state, [query])
    texts = [
        " ".join(_generate_printable(one, query).split()) for one in (model, bind(model, delta))
    ]
    io.save_delta(options.output, delta)
    print(
        f"before: {texts[0]}\nafter:  {texts[1]}\n{options.output}: {_format_file_size(options.output)}"
    )


def _generate(options: argparse.Namespace) -> None:
    from errata.functional import io
    from errata.functional.bind import bind

    if options.max_new_tokens < 1:
        raise InvalidInputError(
            f"--max-new-tokens must be at least 1; got {options.max_new_tokens}."
        )
    query = _make_query(options, "")
    deltas = [io.load_delta(path) for path in options.delta]
    model = _open_model(options)
    for delta in deltas:
        model = bind(model, delta)
    print(_generate_printable(model, query, options.max_new_tokens))


def _models(options: argparse.Namespace) -> None:
    from errata import adapters
    from errata.adapters.zoo import WEIGHTS, micro_names

    print("Shipped, trained (use as micro/NAME):")
    for name in micro_names():
        print(f"  micro/{name:16} {_format_file_size(WEIGHTS / name / 'model.safetensors')}")
    print("\nFamilies served from a folder or hub id:")
    for name, description in adapters.list_families().items():
        print(f"  {name:16} {description}")
    print("  others           found by structure, where a cut forward proves to be the whole one")


def _editors(options: argparse.Namespace) -> None:
    import msgspec

    from errata import editors

    from .settings import unknown_name

    if options.name and options.name not in editors.METHODS:
        raise InvalidSettingsError(f"editor: {unknown_name(options.name, editors.METHODS)}.")
    for name, method in editors.METHODS.items():
        if options.name not in (None, name):
            continue
        print(f"{name}: {method.summary}")
        plain = msgspec.to_builtins(method.config())
        for key in method.config.__struct_fields__:
            print(f"  {key} = {msgspec.json.encode(plain[key]).decode()}")
        print(f"  presets: {', '.join(method.presets) or 'none'}\n")


def _open_model(options: argparse.Namespace) -> Model:
    from .settings import ModelSettings
    from .sources import open_model

    return open_model(ModelSettings(id=options.model, dtype=options.dtype, device=options.device))


def _make_query(options: argparse.Namespace, target: str) -> Query:
    """The request; pictures are opened here, so that a bad one is said before a model is loaded."""
    from errata.adapters.images import open_image
    from errata.functional import Query

    if not options.prompt.strip():
        raise InvalidInputError("--prompt must ask something; it is empty.")
    return Query(options.prompt, target, tuple(map(open_image, options.image)))


def _generate_printable(model: Model, query: Query, max_new_tokens: int = 32) -> str:
    from errata.functional.generate import generate

    max_room = (
        model.card.max_positions - model.preprocess([query._replace(target="")]).input_ids.shape[1]
    )
    text = generate(model, [query], max(1, min(max_new_tokens, max_room)))[0].strip()
    # what a model says may hold codes that a terminal would obey
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _parse_assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`--set key=value`, the value as TOML has it; a bare word is text."""
    import tomllib

    settings: dict[str, Any] = {}
    faults = []
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not (sign and key.strip()):
            faults.append(f"--set must be KEY=VALUE, got {pair!r}")
            continue
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = value
    if faults:
        raise InvalidSettingsError("; ".join(faults) + ".")
    return settings


def _format_file_size(path: Path) -> str:
    size = float(path.stat().st_size)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
