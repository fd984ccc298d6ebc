"""The command line: `errata run | edit | ask | models | editors | ...`.

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

from errata.functional.errors import BadInput, BadSettings, ErrataError

from . import cli_data, cli_delta

if TYPE_CHECKING:
    from errata.functional import Model, Query

__all__ = ["main"]

Verb = Callable[[argparse.Namespace], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0: done, 2: the user can put it right, 130: stopped."""
    options = _parser().parse_args(argv)
    # Threads that wait must sleep: beside other work, spinning costs several times the time. Both
    # are read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        return options.verb(options) or 0
    except KeyboardInterrupt:
        print("errata: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ErrataError, OSError) as fault:
        if options.debug:
            raise
        print(f"errata: {_sentence(fault)}", file=sys.stderr)
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


def _sentence(fault: Exception) -> str:
    if not isinstance(fault, OSError):
        return " ".join(str(fault).split())
    reason = fault.strerror or str(fault)
    place = f"{fault.filename}: " if fault.filename else ""
    return (
        f"{place}{reason}; it must be there, of the right kind and open to you: check the path, "
        "its permissions and the space left."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="errata", description="Edit what a multimodal language model knows: edits as values."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    run = _verb(
        verbs, "run", _run, "models x editors x cases, from a TOML file; goes on if stopped"
    )
    run.add_argument("file", type=Path, help="settings, e.g. demo.toml")
    run.add_argument("--out", help="folder for the results instead of the file's `out`")
    run.add_argument("--fresh", action="store_true", help="drop what `out` holds and start over")
    run.add_argument("--profile", action="store_true", help="say where the time of this run goes")

    edit = _verb(verbs, "edit", _edit, "make one edit and write it to a delta file")
    _model_options(edit)
    edit.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    edit.add_argument("--prompt", required=True)
    edit.add_argument("--target", required=True, help="the answer wanted")
    edit.add_argument("--editor", default="finetune", help="see `errata editors`")
    edit.add_argument("--preset", default="")
    edit.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("-o", "--out", type=Path, required=True, help="the delta file to write")

    ask = _verb(verbs, "ask", _ask, "ask a model a question, with or without edits")
    _model_options(ask)
    ask.add_argument("--image", type=Path, action="append", default=[], help="may be repeated")
    ask.add_argument("--prompt", required=True)
    ask.add_argument("--delta", type=Path, action="append", default=[], help="may be repeated")
    ask.add_argument("--tokens", type=int, default=32, help="longest answer")

    _verb(verbs, "models", _models, "the micro models that are shipped, and the families served")
    editors = _verb(verbs, "editors", _editors, "the editors, their settings and presets")
    editors.add_argument("name", nargs="?", help="only this one")
    cli_data.register(verbs)
    cli_delta.register(verbs)
    return parser


def _verb(verbs: Any, name: str, function: Verb, words: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.set_defaults(verb=function)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="micro/NAME, a folder, or a hub id")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cpu")


def _run(options: argparse.Namespace) -> None:
    import msgspec

    from .settings import read_settings

    settings = read_settings(options.file)
    if options.out:
        settings = msgspec.structs.replace(settings, out=options.out)

    from . import report
    from .ledger import read_rows
    from .run import run

    text = options.file.read_text()
    folder = run(settings, text, fresh=options.fresh, profile=options.profile)
    print(report.table(read_rows(folder)))
    if options.profile:
        print(f"\n{report.shares(folder)}")
    print(f"\n{folder / 'report.html'}")


def _edit(options: argparse.Namespace) -> None:
    import torch

    from errata import editors
    from errata.functional import io
    from errata.functional.answers import answers
    from errata.functional.bind import bind

    from .corpora import corpus
    from .probes import check_finite

    config = editors.configure(options.editor, options.preset, **_assigned(options.settings))
    editor = editors.make(config, corpus(config))
    if not options.target.strip():
        raise BadInput("--target must say the answer wanted; it is empty.")
    query = _query(options, options.target)
    model = _open(options)
    check_finite(model, answers(model, model.read([query])))
    state = editor.init(model, torch.Generator().manual_seed(options.seed))
    delta, _ = editor.edit(model, state, [query])
    said = [" ".join(_said(one, query).split()) for one in (model, bind(model, delta))]
    io.save(options.out, delta)
    print(f"before: {said[0]}\nafter:  {said[1]}\n{options.out}: {_size(options.out)}")


def _ask(options: argparse.Namespace) -> None:
    from errata.functional import io
    from errata.functional.bind import bind

    if options.tokens < 1:
        raise BadInput(f"--tokens must be at least 1; got {options.tokens}.")
    query = _query(options, "")
    deltas = [io.load(path) for path in options.delta]
    model = _open(options)
    for delta in deltas:
        model = bind(model, delta)
    print(_said(model, query, options.tokens))


def _models(options: argparse.Namespace) -> None:
    from errata import adapters
    from errata.adapters.zoo import WEIGHTS, micro_names

    print("Shipped, trained (use as micro/NAME):")
    for name in micro_names():
        print(f"  micro/{name:16} {_size(WEIGHTS / name / 'model.safetensors')}")
    print("\nFamilies served from a folder or hub id:")
    for name, what in adapters.families().items():
        print(f"  {name:16} {what}")
    print("  others           found by structure, where a cut forward proves to be the whole one")


def _editors(options: argparse.Namespace) -> None:
    import msgspec

    from errata import editors

    from .settings import unknown

    if options.name and options.name not in editors.EDITORS:
        raise BadSettings(f"editor: {unknown(options.name, editors.EDITORS)}.")
    for name, method in editors.EDITORS.items():
        if options.name not in (None, name):
            continue
        print(f"{name}: {method.summary}")
        plain = msgspec.to_builtins(method.config())
        for key in method.config.__struct_fields__:
            print(f"  {key} = {msgspec.json.encode(plain[key]).decode()}")
        print(f"  presets: {', '.join(method.presets) or 'none'}\n")


def _open(options: argparse.Namespace) -> Model:
    from .settings import ModelChoice
    from .sources import open_model

    return open_model(ModelChoice(id=options.model, dtype=options.dtype, device=options.device))


def _query(options: argparse.Namespace, target: str) -> Query:
    """The request; pictures are opened here, so that a bad one is said before a model is loaded."""
    from errata.adapters.images import picture
    from errata.functional import Query

    if not options.prompt.strip():
        raise BadInput("--prompt must ask something; it is empty.")
    return Query(options.prompt, target, tuple(map(picture, options.image)))


def _said(model: Model, query: Query, tokens: int = 32) -> str:
    from errata.functional.generate import generate

    room = model.card.context - model.read([query._replace(target="")]).ids.shape[1]
    text = generate(model, [query], max(1, min(tokens, room)))[0].strip()
    # what a model says may hold codes that a terminal would obey
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _assigned(pairs: Sequence[str]) -> dict[str, Any]:
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
        raise BadSettings("; ".join(faults) + ".")
    return settings


def _size(path: Path) -> str:
    size = float(path.stat().st_size)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
