"""A whole run: models x editors x cases x protocols -> results, delta files and a report."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import torch

from errata import editors
from errata.functional import Case, Editor, Model, io
from errata.functional.atomic import whole_file
from errata.functional.errors import BadInput, BadSettings, ErrataError, listed
from errata.functional.metrics import scorer

from . import clock, protocols, report
from .checkpoint import Marks
from .corpora import corpus
from .ledger import PROGRESS, RESULTS, Ledger, Part, Row, locked, read_rows
from .probes import Terms
from .progress import Progress
from .protocols import Result, Step
from .settings import (
    EditorChoice,
    Lifelong,
    ModelChoice,
    Protocol,
    RunSettings,
    Sequential,
    Single,
)
from .shared import Shared
from .sources import (
    check_cases,
    check_settings,
    open_cases,
    open_model,
    picture_name,
    picture_of,
    queries_of,
)

__all__ = ["run", "versions"]

IDENTITY = "run.json"
PROFILE = "profile.json"
MARK = ".state.safetensors"  # of the sequence that is going on


def versions() -> str:
    """What the figures of a run were made with.

    >>> versions().split()[0]
    'errata'
    """
    named = ("errata", "torch", "transformers")
    found = [f"{name} {metadata.version(name)}" for name in named]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def run(
    settings: RunSettings,
    text: str,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    profile: bool = False,
) -> Path:
    """Do everything a settings file asks for and return the folder it lies in.

    Goes on where an earlier run of the same settings stopped, however it was stopped; `fresh`
    starts over. `text` is the settings file as it was read, kept beside the results. `profile`
    writes where this start's time went into `profile.json`, and the report shows it. Raises
    BadSettings and BadInput before anything is written where that can be known, and BadInput when
    the folder holds another run or is in use.
    """
    progress = progress or Progress()
    check_settings(settings)
    scorers = tuple(map(scorer, settings.scorers))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    cases = open_cases(settings.cases)
    check_cases(cases)
    terms = Terms(
        scorers, settings.generate, settings.generate_for, settings.ppl_r, settings.budget
    )
    folder = Path(settings.out)
    identity = settings.digest(versions(), _digest(cases))
    if not _size(folder / RESULTS):
        _check_editors(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _claim(folder, identity, fresh)
        with whole_file(folder / "settings.toml") as file:
            file.write(text.encode())
        ledger = Ledger(folder)
        _keep_pictures(folder, cases[: settings.pictures])
        with clock.running() if profile else contextlib.nullcontext() as watch:
            for choice in settings.models:
                _run_model(settings, choice, cases, terms, ledger, identity, progress)
        if watch is not None:
            _keep_profile(folder, watch)
        rows = read_rows(folder)
        with whole_file(folder / "summary.json") as file:
            file.write(msgspec.json.format(msgspec.json.encode(report.summary(rows))) + b"\n")
        report.html(
            rows, folder / "report.html", folder=folder, settings=text, title=settings.title
        )
    return folder


def _keep_profile(folder: Path, watch: clock.Clock) -> None:
    """Seconds and shares by leg, and the busiest operators of one step of each, as JSON."""
    found = {
        subject: {
            "parts": {n: {"seconds": round(s, 4), "share": round(q, 4)}
                      for n, (s, q) in parts.items()},
            "operators": [
                {"name": name, "seconds": round(spent, 6), "calls": calls}
                for name, spent, calls in watch.ops.get(subject, [])
            ],
        }
        for subject, parts in watch.shares().items() if subject
    }  # fmt: skip
    with whole_file(folder / PROFILE) as file:
        file.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")


def _claim(folder: Path, identity: str, fresh: bool) -> None:
    """Make the folder this run's, or refuse because it is another's."""
    path = folder / IDENTITY
    if path.is_file() and not any(_size(folder / name) for name in (RESULTS, PROGRESS)):
        fresh = fresh or _there(path).get("run") != identity  # stopped before its first result
    if fresh and path.is_file():  # else what lies there is not ours to remove
        for name in (RESULTS, PROGRESS, IDENTITY, MARK, PROFILE, "report.html", "summary.json"):
            (folder / name).unlink(missing_ok=True)
        for name in ("deltas", "pictures"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if path.is_file():
        there = _there(path)
        if there.get("run") != identity:
            raise BadInput(
                f"{folder} must be empty or hold the same run, and holds run {there.get('run')} "
                f"({there.get('versions')}) while these settings and cases are run {identity} "
                f"({versions()}): give another `out`, or --fresh to start over."
            )
        return
    if (folder / RESULTS).exists():
        raise BadInput(
            f"{folder} must be empty or hold a run, and holds {RESULTS} without {IDENTITY}: give "
            "another `out`."
        )
    with whole_file(path) as file:
        file.write(msgspec.json.encode({"run": identity, "versions": versions()}) + b"\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _there(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError:
        return {}


def _digest(cases: Sequence[Case]) -> str:
    """What is asked, as a hash: an annotation file that was changed is another run."""
    asked = [
        [
            case.id,
            [(name, i, q.prompt, q.target, *q.aliases) for name, i, q in queries_of(case)],
        ]
        for case in cases
    ]
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()


def _run_model(
    settings: RunSettings,
    choice: ModelChoice,
    cases: Sequence[Case],
    terms: Terms,
    ledger: Ledger,
    identity: str,
    progress: Progress,
) -> None:
    chosen = _chosen(settings, choice)
    legs = [(e, p) for e in chosen for p in settings.protocols]
    open_legs = [
        leg for leg in legs if not ledger.finished(choice.label, leg[0].label, _name(leg[1]))
    ]
    if not open_legs:
        return
    progress.note(f"{choice.label}: loading {choice.id}")
    model = open_model(choice)
    made = {e.label: _make(e, model) for e in chosen}
    shared = Shared(model, cases, terms)
    for editor in dict.fromkeys(leg[0].label for leg in open_legs):
        shared.expect(made[editor])
    together = [leg for leg in open_legs if isinstance(leg[1], Single)]
    rest = [[leg] for leg in open_legs if not isinstance(leg[1], Single)]
    for some in [together, *rest] if together else rest:
        turns = []
        for editor, protocol in some:
            name = _name(protocol)
            there = ledger.leg(choice.label, editor.label, name)
            done = {unit.part.number for unit in there}
            marks = Marks(ledger.folder / MARK, f"{identity}/{choice.label}/{editor.label}")
            steps = _steps(
                protocol, model, made[editor.label], cases, terms, settings.seed, done, marks,
                shared,
            )  # fmt: skip
            turns.append(_Turn(editor.label, name, steps, marks, sum(u.cases for u in there)))
        labels = ", ".join(turn.editor for turn in turns)
        edited = sum(turn.edited for turn in turns)
        said = f"{choice.label} · {labels} · {turns[0].protocol}"
        progress.start(said, len(cases) * len(turns), edited)
        _take_turns(settings, choice, turns, ledger, identity, progress)
        progress.stop()


@dataclass
class _Turn:
    """A leg that is going on."""

    editor: str
    protocol: str
    steps: Iterator[Step]
    marks: Marks
    edited: int  # cases so far


def _take_turns(
    settings: RunSettings,
    choice: ModelChoice,
    turns: list[_Turn],
    ledger: Ledger,
    identity: str,
    progress: Progress,
) -> None:
    """Finish legs side by side: who has edited least is next, so that all ask the same cases.

    The order follows from what the ledger holds, so a run that goes on takes the same one.
    """
    waiting = list(turns)
    while waiting:
        turn = min(waiting, key=lambda turn: turn.edited)
        clock.about(f"{choice.label}/{turn.editor}/{turn.protocol}")
        with clock.ops():
            step = next(turn.steps, None)
        if step is None:
            turn.marks.drop()
            waiting.remove(turn)
            continue
        turn.edited += step.cases
        part = Part(
            model=choice.label, editor=turn.editor, protocol=turn.protocol,
            number=step.number, of=step.of,
        )  # fmt: skip
        with clock.part("writing"):
            if settings.deltas:
                _save(ledger.folder / "deltas" / choice.label / turn.editor / turn.protocol, step)
            ledger.append(
                part,
                [_row(one, part, identity, settings.seed) for one in step.results],
                cases=step.cases,
                edit_seconds=step.edit_seconds,
                probe_seconds=step.probe_seconds,
                peak_bytes=step.peak_bytes,
            )
        progress.step(step.cases)


def _chosen(settings: RunSettings, choice: ModelChoice) -> list[EditorChoice]:
    return [e for e in settings.editors if not e.models or choice.label in e.models]


def _check_editors(settings: RunSettings) -> None:
    """Try every editor on every model, so that the last one's sites are known before any edit."""
    faults = []
    for choice in settings.models:
        model = open_model(choice)
        for editor in _chosen(settings, choice):
            try:
                _make(editor, model)
            except ErrataError as fault:
                faults.append(str(fault).rstrip("."))
    if faults:
        raise BadSettings(f"{listed(faults)}.")


def _make(choice: EditorChoice, model: Model) -> Editor:
    """The editor, tried on the model: a site it lacks is said before the first edit."""
    config = editors.configure(choice.type, choice.preset, **choice.settings)
    try:
        editor = editors.make(config, corpus(config))
        editor.init(model, torch.Generator().manual_seed(0))
    except ErrataError as fault:
        raise type(fault)(f"editor {choice.label!r} on {model.card.id}: {fault}") from fault
    return editor


def _name(protocol: Protocol) -> str:
    return type(protocol).__name__.lower()


def _steps(
    protocol: Protocol,
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    terms: Terms,
    seed: int,
    done: Collection[int],
    marks: Marks,
    shared: Shared,
) -> Iterator[Step]:
    if isinstance(protocol, Sequential):
        return protocols.sequential(
            model, editor, cases, terms, seed=seed, group=protocol.group, gaps=protocol.gaps,
            done=done, marks=marks, shared=shared,
        )  # fmt: skip
    if isinstance(protocol, Lifelong):
        return protocols.lifelong(
            model, editor, cases, terms, seed=seed, lengths=protocol.lengths,
            asked=protocol.asked, done=done, marks=marks,
        )  # fmt: skip
    return protocols.single(
        model,
        editor,
        cases,
        terms,
        seed=seed,
        together=protocol.together,
        done=done,
        shared=shared,
    )


def _row(one: Result, part: Part, identity: str, seed: int) -> Row:
    return Row(
        run=identity, model=part.model, editor=part.editor, protocol=part.protocol,
        moment=one.moment, gap=one.gap, number=one.number, case=one.case.id, probe=one.probe,
        index=one.index, scorer=one.scorer, seed=seed, prompt=one.query.prompt,
        target=one.query.target, images=tuple(map(picture_name, one.query.images)),
        base=one.base, score=one.score, before=one.before, after=one.after, kl=one.kl,
        same=one.same, ppl_r=one.ppl_r, versions=versions(),
    )  # fmt: skip


def _save(folder: Path, step: Step) -> None:
    if step.deltas:
        folder.mkdir(parents=True, exist_ok=True)
    for name, delta in step.deltas.items():
        io.save(folder / f"{name}.safetensors", delta)


def _keep_pictures(folder: Path, cases: Sequence[Case]) -> None:
    """Small copies of the first cases' pictures, so that the report can show them."""
    home = folder / "pictures"
    home.mkdir(exist_ok=True)
    for case in cases:
        for _, _, query in queries_of(case):
            for image in query.images:
                path = home / f"{picture_name(image)}.png"
                if not path.exists():
                    with whole_file(path) as file:
                        file.write(picture_of(image))
