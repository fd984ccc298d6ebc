"""A whole run: models x editors x cases x protocols -> results, delta files and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from errata import editors
from errata.bench.data.demonstrations import demonstration_cases
from errata.bench.evaluation import profiling
from errata.bench.evaluation.base_pass import SharedBasePass
from errata.bench.evaluation.questions import EvaluationConfig, validate_cases
from errata.bench.protocols.base import Step
from errata.bench.protocols.settings import Protocol, SingleSettings
from errata.bench.protocols.table import PROTOCOLS
from errata.bench.report import page, summary
from errata.bench.runs.folder import (
    CHECKPOINT_FILE,
    _cases_digest,
    _claim_folder,
    _file_size,
    _result_row,
    _save_deltas,
    _save_profile,
    _save_thumbnails,
    versions,
)
from errata.bench.runs.progress import Progress
from errata.bench.runs.settings import (
    EditorSettings,
    ModelSettings,
    RunSettings,
)
from errata.bench.runs.settings_file import validate_settings
from errata.bench.runs.sources import open_cases, open_model
from errata.bench.storage.checkpoint import CheckpointFile
from errata.bench.storage.results_log import RESULTS, ResultsLog, UnitKey, lock_folder, read_rows
from errata.functional import Case, Editor, Model
from errata.functional.errors import ErrataError, InvalidSettingsError, join_messages
from errata.functional.files import atomic_write
from errata.functional.metrics.conventions import get_scorer

__all__ = ["run"]


def run(
    settings: RunSettings,
    text: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    profile: bool = False,
) -> Path:
    """Run everything that a settings file asks for.

    Resumes an earlier run of the same settings, however it was interrupted.

    Args:
        settings: The settings.
        text: The settings file as read, kept with the results.
        overwrite: Whether to start over.
        progress: Where to report progress.
        profile: Whether to write where the time went into `profile.json`, which the report shows.

    Returns:
        The run folder.

    Raises:
        InvalidSettingsError: Before anything is written.
        InvalidInputError: If the folder holds another run or is in use, or inputs cannot be read.
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
        with profiling.active_profiler() if profile else contextlib.nullcontext() as profiler:
            for choice in settings.models:
                _run_model(
                    settings, choice, cases, evaluation_config, results_log, identity, progress
                )
        if profiler is not None:
            _save_profile(folder, profiler)
        rows = read_rows(folder)
        with atomic_write(folder / "summary.json") as file:
            file.write(msgspec.json.format(msgspec.json.encode(summary.summary_json(rows))) + b"\n")
        page.write_page(
            rows, folder / "report.html", folder=folder, settings=text, title=settings.title
        )
    return folder


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

    The order follows from the results log, so a resumed run takes the same one.
    """
    waiting = list(protocol_runs)
    while waiting:
        protocol_run = min(waiting, key=lambda turn: turn.num_edited)
        profiling.subject(f"{model_settings.label}/{protocol_run.editor}/{protocol_run.protocol}")
        with profiling.record_operators():
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
        with profiling.section("writing"):
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
    return PROTOCOLS[type(protocol)](
        model,
        editor,
        cases,
        evaluation_config,
        **msgspec.structs.asdict(protocol),
        seed=seed,
        completed=completed,
        checkpoint=checkpoint,
        base_pass=base_pass,
    )
