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
from errata.functional.atomic import atomic_write
from errata.functional.errors import (
    ErrataError,
    InvalidInputError,
    InvalidSettingsError,
    join_messages,
)
from errata.functional.metrics import get_scorer

from . import clock, protocols, report
from .checkpoint import CheckpointFile
from .corpora import demonstration_cases
from .ledger import PROGRESS, RESULTS, ResultRow, ResultsLog, UnitKey, lock_folder, read_rows
from .probes import EvaluationConfig
from .progress import Progress
from .protocols import Result, Step
from .settings import (
    EditorSettings,
    LifelongSettings,
    ModelSettings,
    Protocol,
    RunSettings,
    SequentialSettings,
    SingleSettings,
)
from .shared import SharedBasePass
from .sources import (
    image_file_name,
    open_cases,
    open_model,
    questions_of,
    thumbnail,
    validate_cases,
    validate_settings,
)

__all__ = ["run", "versions"]

IDENTITY = "run.json"
PROFILE = "profile.json"
CHECKPOINT_FILE = ".state.safetensors"  # of the sequence that is going on


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
    overwrite: bool = False,
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
    validate_settings(settings)
    scorers = tuple(map(get_scorer, settings.scorers))
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    cases = open_cases(settings.cases)
    validate_cases(cases)
    evaluation_config = EvaluationConfig(
        scorers,
        settings.max_new_tokens,
        settings.generate_probes,
        settings.ppl_r_tokens,
        settings.memory_bytes,
    )
    folder = Path(settings.output_dir)
    identity = settings.digest(versions(), _cases_digest(cases))
    if not _file_size(folder / RESULTS):
        _validate_editors(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        _claim_folder(folder, identity, overwrite)
        with atomic_write(folder / "settings.toml") as file:
            file.write(text.encode())
        results_log = ResultsLog(folder)
        _save_thumbnails(folder, cases[: settings.num_thumbnails])
        with clock.active_profiler() if profile else contextlib.nullcontext() as profiler:
            for choice in settings.models:
                _run_model(
                    settings, choice, cases, evaluation_config, results_log, identity, progress
                )
        if profiler is not None:
            _save_profile(folder, profiler)
        rows = read_rows(folder)
        with atomic_write(folder / "summary.json") as file:
            file.write(msgspec.json.format(msgspec.json.encode(report.summary_json(rows))) + b"\n")
        report.write_page(
            rows, folder / "report.html", folder=folder, settings=text, title=settings.title
        )
    return folder


def _save_profile(folder: Path, profiler: clock.Profiler) -> None:
    """Seconds and shares by leg, and the busiest operators of one step of each, as JSON."""
    profile = {
        subject: {
            "parts": {
                n: {"seconds": round(s, 4), "share": round(q, 4)} for n, (s, q) in parts.items()
            },
            "operators": [
                {"name": name, "seconds": round(spent, 6), "calls": calls}
                for name, spent, calls in profiler.operators.get(subject, [])
            ],
        }
        for subject, parts in profiler.shares().items()
        if subject
    }
    with atomic_write(folder / PROFILE) as file:
        file.write(msgspec.json.format(msgspec.json.encode(profile)) + b"\n")


def _claim_folder(folder: Path, identity: str, overwrite: bool) -> None:
    """Make the folder this run's, or refuse because it is another's."""
    path = folder / IDENTITY
    if path.is_file() and not any(_file_size(folder / name) for name in (RESULTS, PROGRESS)):
        overwrite = (
            overwrite or _read_identity(path).get("run") != identity
        )  # stopped before its first result
    if overwrite and path.is_file():  # else what lies there is not ours to remove
        for name in (
            RESULTS,
            PROGRESS,
            IDENTITY,
            CHECKPOINT_FILE,
            PROFILE,
            "report.html",
            "summary.json",
        ):
            (folder / name).unlink(missing_ok=True)
        for name in ("deltas", "thumbnails"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if path.is_file():
        stored = _read_identity(path)
        if stored.get("run") != identity:
            raise InvalidInputError(
                f"{folder} must be empty or hold the same run, and holds run {stored.get('run')} "
                f"({stored.get('versions')}) while these settings and cases are run {identity} "
                f"({versions()}): give another `output_dir`, or --overwrite to start over."
            )
        return
    if (folder / RESULTS).exists():
        raise InvalidInputError(
            f"{folder} must be empty or hold a run, and holds {RESULTS} without {IDENTITY}: give "
            "another `output_dir`."
        )
    with atomic_write(path) as file:
        file.write(msgspec.json.encode({"run": identity, "versions": versions()}) + b"\n")


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_identity(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError:
        return {}


def _cases_digest(cases: Sequence[Case]) -> str:
    """What is asked, as a hash: an annotation file that was changed is another run."""
    questions = [
        [
            case.id,
            [(name, i, q.prompt, q.target, *q.aliases) for name, i, q in questions_of(case)],
        ]
        for case in cases
    ]
    return hashlib.sha256(msgspec.json.encode(questions)).hexdigest()


def _run_model(
    settings: RunSettings,
    model_settings: ModelSettings,
    cases: Sequence[Case],
    evaluation_config: EvaluationConfig,
    results_log: ResultsLog,
    identity: str,
    progress: Progress,
) -> None:
    editor_settings = _editors_for(settings, model_settings)
    pending = [(e, p) for e in editor_settings for p in settings.protocols]
    unfinished = [
        leg
        for leg in pending
        if not results_log.is_complete(model_settings.label, leg[0].label, _protocol_name(leg[1]))
    ]
    if not unfinished:
        return
    progress.note(f"{model_settings.label}: loading {model_settings.id}")
    model = open_model(model_settings)
    editor_by_label = {e.label: _make_editor(e, model) for e in editor_settings}
    base_pass = SharedBasePass(model, cases, evaluation_config)
    for editor in dict.fromkeys(leg[0].label for leg in unfinished):
        base_pass.record_depth(editor_by_label[editor])
    single_group = [leg for leg in unfinished if isinstance(leg[1], SingleSettings)]
    other_groups = [[leg] for leg in unfinished if not isinstance(leg[1], SingleSettings)]
    for group in [single_group, *other_groups] if single_group else other_groups:
        protocol_runs = []
        for editor, protocol in group:
            name = _protocol_name(protocol)
            unit_records = results_log.units_of(model_settings.label, editor.label, name)
            completed = {unit.unit.number for unit in unit_records}
            checkpoint = CheckpointFile(
                results_log.folder / CHECKPOINT_FILE,
                f"{identity}/{model_settings.label}/{editor.label}",
            )
            steps = _run_protocol(
                protocol,
                model,
                editor_by_label[editor.label],
                cases,
                evaluation_config,
                settings.seed,
                completed,
                checkpoint,
                base_pass,
            )
            protocol_runs.append(
                _ProtocolRun(
                    editor.label, name, steps, checkpoint, sum(u.cases for u in unit_records)
                )
            )
        labels = ", ".join(turn.editor for turn in protocol_runs)
        num_edited = sum(turn.num_edited for turn in protocol_runs)
        title = f"{model_settings.label} · {labels} · {protocol_runs[0].protocol}"
        progress.start(title, len(cases) * len(protocol_runs), num_edited)
        _interleave(settings, model_settings, protocol_runs, results_log, identity, progress)
        progress.stop()


@dataclass
class _ProtocolRun:
    """A leg that is going on."""

    editor: str
    protocol: str
    steps: Iterator[Step]
    checkpoint: CheckpointFile
    num_edited: int  # cases so far


def _interleave(
    settings: RunSettings,
    model_settings: ModelSettings,
    protocol_runs: list[_ProtocolRun],
    results_log: ResultsLog,
    identity: str,
    progress: Progress,
) -> None:
    """Finish legs side by side: who has edited least is next, so that all ask the same cases.

    The order follows from what the ledger holds, so a run that goes on takes the same one.
    """
    waiting = list(protocol_runs)
    while waiting:
        protocol_run = min(waiting, key=lambda turn: turn.num_edited)
        clock.subject(f"{model_settings.label}/{protocol_run.editor}/{protocol_run.protocol}")
        with clock.record_operators():
            step = next(protocol_run.steps, None)
        if step is None:
            protocol_run.checkpoint.delete()
            waiting.remove(protocol_run)
            continue
        protocol_run.num_edited += step.cases
        unit_key = UnitKey(
            model=model_settings.label,
            editor=protocol_run.editor,
            protocol=protocol_run.protocol,
            number=step.number,
            num_units=step.num_units,
        )
        with clock.section("writing"):
            if settings.save_deltas:
                _save_deltas(
                    results_log.folder
                    / "deltas"
                    / model_settings.label
                    / protocol_run.editor
                    / protocol_run.protocol,
                    step,
                )
            results_log.append(
                unit_key,
                [_result_row(one, unit_key, identity, settings.seed) for one in step.results],
                cases=step.cases,
                edit_seconds=step.edit_seconds,
                probe_seconds=step.probe_seconds,
                peak_bytes=step.peak_bytes,
            )
        progress.step(step.cases)


def _editors_for(settings: RunSettings, model_settings: ModelSettings) -> list[EditorSettings]:
    return [e for e in settings.editors if not e.models or model_settings.label in e.models]


def _validate_editors(settings: RunSettings) -> None:
    """Try every editor on every model, so that the last one's sites are known before any edit."""
    faults = []
    for model_settings in settings.models:
        model = open_model(model_settings)
        for editor in _editors_for(settings, model_settings):
            try:
                _make_editor(editor, model)
            except ErrataError as fault:
                faults.append(str(fault).rstrip("."))
    if faults:
        raise InvalidSettingsError(f"{join_messages(faults)}.")


def _make_editor(editor_settings: EditorSettings, model: Model) -> Editor:
    """The editor, tried on the model: a site it lacks is said before the first edit."""
    config = editors.configure(
        editor_settings.type, editor_settings.preset, **editor_settings.settings
    )
    try:
        editor = editors.make_editor(config, demonstration_cases(config))
        editor.init(model, torch.Generator().manual_seed(0))
    except ErrataError as fault:
        raise type(fault)(
            f"editor {editor_settings.label!r} on {model.card.id}: {fault}"
        ) from fault
    return editor


def _protocol_name(protocol: Protocol) -> str:
    return str(protocol.__struct_config__.tag)


def _run_protocol(
    protocol: Protocol,
    model: Model,
    editor: Editor,
    cases: Sequence[Case],
    evaluation_config: EvaluationConfig,
    seed: int,
    completed: Collection[int],
    checkpoint: CheckpointFile,
    base_pass: SharedBasePass,
) -> Iterator[Step]:
    if isinstance(protocol, SequentialSettings):
        return protocols.run_sequential(
            model,
            editor,
            cases,
            evaluation_config,
            seed=seed,
            sequence_length=protocol.sequence_length,
            gaps=protocol.gaps,
            completed=completed,
            checkpoint=checkpoint,
            base_pass=base_pass,
        )
    if isinstance(protocol, LifelongSettings):
        return protocols.run_lifelong(
            model,
            editor,
            cases,
            evaluation_config,
            seed=seed,
            eval_after=protocol.eval_after,
            max_evaluated=protocol.max_evaluated,
            completed=completed,
            checkpoint=checkpoint,
        )
    return protocols.run_single(
        model,
        editor,
        cases,
        evaluation_config,
        seed=seed,
        batch_size=protocol.batch_size,
        completed=completed,
        base_pass=base_pass,
    )


def _result_row(result: Result, unit_key: UnitKey, identity: str, seed: int) -> ResultRow:
    return ResultRow(
        run=identity,
        model=unit_key.model,
        editor=unit_key.editor,
        protocol=unit_key.protocol,
        evaluated_at=result.evaluated_at,
        gap=result.gap,
        case_number=result.case_number,
        case=result.case.id,
        probe=result.probe,
        index=result.index,
        scorer=result.scorer,
        seed=seed,
        prompt=result.query.prompt,
        target=result.query.target,
        images=tuple(map(image_file_name, result.query.images)),
        base=result.base,
        score=result.score,
        before=result.before,
        after=result.after,
        kl=result.kl,
        generation_unchanged=result.generation_unchanged,
        ppl_r=result.ppl_r,
        versions=versions(),
    )


def _save_deltas(folder: Path, step: Step) -> None:
    if step.deltas:
        folder.mkdir(parents=True, exist_ok=True)
    for name, delta in step.deltas.items():
        io.save_delta(folder / f"{name}.safetensors", delta)


def _save_thumbnails(folder: Path, cases: Sequence[Case]) -> None:
    """Small copies of the first cases' pictures, so that the report can show them."""
    thumbnails = folder / "thumbnails"
    thumbnails.mkdir(exist_ok=True)
    for case in cases:
        for _, _, query in questions_of(case):
            for image in query.images:
                path = thumbnails / f"{image_file_name(image)}.png"
                if not path.exists():
                    with atomic_write(path) as file:
                        file.write(thumbnail(image))
