"""The command line: `errata run | edit | generate | models | editors | ...`.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once. What a user can
put right ends with exit code 2 and one sentence; `--debug` shows where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from errata.bench.cli import data, deltas
from errata.bench.cli.edit import _add_model_options, _edit, _generate
from errata.bench.cli.listing import _editors, _models
from errata.bench.cli.options import _add_command
from errata.bench.cli.run import _run
from errata.functional.errors import ErrataError

__all__ = ["main"]


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
    data.register(subparsers)
    deltas.register(subparsers)
    return parser
