"""The command line: `errata run | edit | generate | models | editors | ...`.

A command imports torch only when it runs, so `--help` is instant. An error that the user can fix
ends with exit code 2 and one sentence. `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from errata.bench.cli import convert, data, deltas, train
from errata.bench.cli.edit import (
    _add_model_options,
    _add_query_options,
    _add_sampling_options,
    _edit,
    _generate,
)
from errata.bench.cli.listing import _editors, _models
from errata.bench.cli.options import _add_command
from errata.bench.cli.renamed import renamed_word
from errata.bench.cli.run import _run
from errata.bench.runs.escaping import EscapedStream
from errata.bench.storage.log_records import DamagedLogWarning
from errata.functional.errors import ErrataError
from errata.functional.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after `errata`. Defaults to those of the process.

    Returns:
        The exit code: 0 done, 1 an internal error, 2 an error the user can fix, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    output, errors = EscapedStream(sys.stdout), EscapedStream(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(TextIO, output)),
        contextlib.redirect_stderr(cast(TextIO, errors)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always", DamagedLogWarning)
        warnings.showwarning = _print_warning
        return _run_command(words)


def _print_warning(message: Any, category: Any, *rest: Any, **more: Any) -> None:
    print(f"errata: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run_command(words: list[str]) -> int:
    renamed = renamed_word(words)
    if renamed:
        print(f"errata: {renamed}", file=sys.stderr)
        return 2
    parser = _parser()
    options = parser.parse_args(words)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    # Waiting threads must sleep: if other processes run, spinning is several times slower. torch
    # reads both variables when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("errata: interrupted; the same command resumes.", file=sys.stderr)
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
            f"errata: internal error: {type(fault).__name__}: {fault}. "
            "Please report it with the output of `errata --debug ...`.",
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
        prog="errata",
        description="Edit the knowledge of a multimodal language model. An edit is one file.",
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=f"errata-vlm {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")

    run = _add_command(
        subparsers, "run", _run, "run models x editors x cases from a TOML file; resumes"
    )
    run.add_argument("file", type=Path, help="settings, e.g. demo.toml")
    run.add_argument("--output", help="run folder, instead of the file's `output_dir`")
    run.add_argument(
        "--overwrite", action="store_true", help="delete what `output_dir` holds and start over"
    )
    run.add_argument("--profile", action="store_true", help="print where the time of this run goes")

    edit = _add_command(subparsers, "edit", _edit, "make one edit and write it to a delta file")
    _add_model_options(edit)
    _add_query_options(edit)
    edit.add_argument("--target", required=True, help="the new answer")
    edit.add_argument("--editor", default="finetune", help="see `errata editors`")
    edit.add_argument("--preset", default="", help="see `errata editors NAME`")
    edit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="a setting of the editor; may be repeated",
    )
    edit.add_argument("--seed", type=int, default=0, help="seed of the editor's state")
    edit.add_argument("-o", "--output", type=Path, required=True, help="the delta file to write")

    generate = _add_command(
        subparsers, "generate", _generate, "answer a question, with or without edits"
    )
    _add_model_options(generate)
    _add_query_options(generate)
    generate.add_argument(
        "--delta", type=Path, action="append", default=[], help="a delta file; may be repeated"
    )
    generate.add_argument(
        "--compare-base", action="store_true", help="print the unedited model's answer too"
    )
    _add_sampling_options(generate)
    generate.add_argument("--max-new-tokens", type=int, default=32, help="longest answer")

    _add_command(subparsers, "models", _models, "list the shipped models and the families")
    editors = _add_command(
        subparsers, "editors", _editors, "list the editors, their settings and presets"
    )
    editors.add_argument("name", nargs="?", help="explain the settings of this editor")
    train.register(subparsers)
    data.register(subparsers)
    convert.register(subparsers)
    deltas.register(subparsers)
    return parser
