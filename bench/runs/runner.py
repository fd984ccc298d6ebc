"""A whole run: models x editors x cases x protocols -> results, delta files and a report."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from errata.bench.runs.folder import _result_row, _save_deltas, _save_profile, _save_thumbnails
from errata.bench.runs.identity import (
    THREADS,
    changed_parts,
    leg_identity,
    leg_parts,
    unit_states,
)
from errata.bench.runs.progress import Progress
from errata.bench.runs.settings import EditorSettings, ModelSettings, RunSettings
from errata.bench.runs.settings_file import validate_settings
from errata.bench.runs.skipped import SkippedCases
from errata.bench.runs.sources import open_cases, open_model
from errata.bench.storage.checkpoint import CheckpointFile
from errata.bench.storage.fingerprints import Fingerprints
from errata.bench.storage.log_records import PROGRESS, RESULTS, LegKey, UnitState
from errata.bench.storage.results_log import ResultsLog, lock_folder, read_rows
from errata.bench.storage.run_folder import CHECKPOINT_FILE, RunFolder
from errata.functional import Case, Editor, Model
from errata.functional.errors import (
    ErrataError,
    InvalidInputError,
    InvalidSettingsError,
    join_messages,
)
from errata.functional.metrics.conventions import get_scorer

__all__ = ["run"]

FINGERPRINTS = ".fingerprints.json"


def run(
    settings: RunSettings,
    text: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    profile: bool = False,
) -> Path:
    """Run everything that a settings file asks for.

    Resumes an earlier run, however it was interrupted, and adds what is new: further editors,
    models, protocols and cases. Finished legs are kept. Corrected records are run again.

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
        InvalidInputError: If the folder is not a run's or is in use, or inputs cannot be read; and,
            after all other legs were run, if a leg has results of other weights, images, settings
            or versions.
    """
    progress = progress or Progress()
    validate_settings(settings)
    scorers = tuple(map(get_scorer, settings.scorers))
    cases = open_cases(settings.cases)
    validate_cases(cases, allow_unreadable=settings.unreadable_cases == "skip")
    evaluation_config = EvaluationConfig(
        scorers,
        settings.max_new_tokens,
        settings.generate_probes,
        settings.ppl_r_tokens,
        settings.memory_bytes,
    )
    path = Path(settings.output_dir)
    if not has_results(path):
        _validate_editors(settings)
    path.mkdir(parents=True, exist_ok=True)
    with lock_folder(path):
        folder = RunFolder(path, overwrite)
        _set_threads(settings, folder)
        folder.claim(RESULTS, PROGRESS, CHECKPOINT_FILE)
        folder.write("settings.toml", text.encode())
        results_log = ResultsLog(path)
        for sentence in results_log.damage:
            progress.note(f"damaged: {sentence}; a copy is kept, all other rows are used")
        _save_thumbnails(folder, cases[: settings.num_thumbnails])
        run_state = _Run(settings, cases, evaluation_config, folder, results_log, progress)
        with profiling.active_profiler() if profile else contextlib.nullcontext() as profiler:
            for model_settings in settings.models:
                run_state.run_model(model_settings)
        if profiler is not None:
            _save_profile(folder, profiler)
        rows = read_rows(path)
        summarized = msgspec.json.encode(summary.summary_json(rows))
        folder.write("summary.json", msgspec.json.format(summarized) + b"\n")
        (report,) = folder.claim("report.html")
        page.write_page(rows, report, folder=path, settings=text, title=settings.title)
        if run_state.refused:
            raise InvalidInputError(
                f"{join_messages(run_state.refused)}. These results stay as they are: undo the "
                "change, give another `output_dir`, or --overwrite to start over."
            )
    return path


def has_results(folder: Path) -> bool:
    """Whether a run folder holds results of an earlier start."""
    return (folder / RESULTS).is_file() and (folder / RESULTS).stat().st_size > 0


def _set_threads(settings: RunSettings, folder: RunFolder) -> None:
    """Use the settings' number of threads, or that of the first start: sums are split by thread."""
    recorded = {parts.get(THREADS, "") for parts in folder.legs.values()}
    numbers = {int(number) for number in recorded if number.isdecimal() and len(number) < 5}
    number = settings.num_threads or max(numbers, default=0)
    if number:
        torch.set_num_threads(number)


class _Run:
    """One start of a run.

    Args:
        settings: The settings.
        cases: The cases.
        evaluation_config: Scorers, generation and memory.
        folder: The run folder.
        results_log: Its results.
        progress: Where to report progress.

    Attributes:
        refused: Legs whose results were made of something else, a sentence each.
    """

    def __init__(
        self,
        settings: RunSettings,
        cases: Sequence[Case],
        evaluation_config: EvaluationConfig,
        folder: RunFolder,
        results_log: ResultsLog,
        progress: Progress,
    ) -> None:
        self._settings, self._cases = settings, cases
        self._evaluation_config = evaluation_config
        self._folder, self._log, self._progress = folder, results_log, progress
        self._fingerprints = Fingerprints(folder.read(FINGERPRINTS))
        self.refused: list[str] = []

    def run_model(self, model_settings: ModelSettings) -> None:
        """Run every leg of a model that is not finished."""
        legs = self._legs_of(model_settings)
        self._folder.write(FINGERPRINTS, self._fingerprints.to_json())
        if not legs:
            return
        model = None
        cases = self._cases
        if self._settings.unreadable_cases == "skip":
            skipped = SkippedCases(self._folder, model_settings.label, legs[0].parts, cases)
            if not skipped.known:
                model = self._open(model_settings)
                skipped.find(model, cases, self._progress.note)
            cases = skipped.without(cases)
        for leg in legs:
            leg.units = unit_states(leg.protocol, cases)
        pending = [leg for leg in legs if self._is_pending(leg)]
        if not pending:
            return
        model = model or self._open(model_settings)
        editor_by_label = {
            label: _make_editor(settings, model)
            for label, settings in {leg.editor.label: leg.editor for leg in legs}.items()
        }
        base_pass = SharedBasePass(model, cases, self._evaluation_config)
        for label in dict.fromkeys(leg.editor.label for leg in pending):
            base_pass.record_depth(editor_by_label[label])
        single_group = [leg for leg in pending if isinstance(leg.protocol, SingleSettings)]
        groups = [[leg] for leg in pending if not isinstance(leg.protocol, SingleSettings)]
        for group in [single_group, *groups] if single_group else groups:
            for leg in group:
                self._folder.set_leg(str(leg.key), leg.parts)
                self._start(leg, model, editor_by_label[leg.editor.label], cases, base_pass)
            labels = ", ".join(leg.editor.label for leg in group)
            title = f"{model_settings.label} · {labels} · {group[0].key.protocol}"
            num_edited = sum(leg.num_edited for leg in group)
            self._progress.start(title, len(cases) * len(group), num_edited)
            self._interleave(group)
            self._progress.stop()

    def _open(self, model_settings: ModelSettings) -> Model:
        self._progress.note(f"{model_settings.label}: loading {model_settings.id}")
        return open_model(model_settings)

    def _legs_of(self, model_settings: ModelSettings) -> list[_Leg]:
        """The legs of a model that may run: their results, if any, were made of the same."""
        legs = []
        for editor in _editors_for(self._settings, model_settings):
            for protocol in self._settings.protocols:
                parts = leg_parts(
                    self._settings,
                    model_settings,
                    editor,
                    protocol,
                    torch.get_num_threads(),
                    self._fingerprints,
                )
                name = str(protocol.__struct_config__.tag)
                key = LegKey(model=model_settings.label, editor=editor.label, protocol=name)
                old = dict(self._folder.legs.get(str(key), {}))
                changes = changed_parts(old, parts) if self._log.units_of(key) else []
                if changes:
                    self.refused.append(f"{key} has results of other {', other '.join(changes)}")
                else:
                    legs.append(_Leg(key, editor, protocol, parts))
        return legs

    def _is_pending(self, leg: _Leg) -> bool:
        """Whether units are to be made. Units of corrected records are declared superseded."""
        stored = self._log.units_of(leg.key)
        same = [unit for unit in leg.units if unit.number in stored]
        moved = [u for u in same if u.key == stored[u.number].key and u != stored[u.number]]
        if moved:
            case = min(moved[0].number, len(self._cases) - 1)
            self.refused.append(
                f"{leg.key} has results of other images (unit {moved[0].number}, case "
                f"{self._cases[case].id!r}, and {len(moved) - 1} more)"
            )
            return False
        superseded = [unit.number for unit in same if unit.key != stored[unit.number].key]
        if superseded:
            self._progress.note(f"{leg.key}: {len(superseded)} unit(s) of changed records again")
            self._log.void(leg.key, superseded)
        leg.completed = {unit.number for unit in same} - set(superseded)
        return len(leg.completed) < len(leg.units)

    def _start(
        self,
        leg: _Leg,
        model: Model,
        editor: Editor,
        cases: Sequence[Case],
        base_pass: SharedBasePass,
    ) -> None:
        keys = "".join(unit.key for unit in leg.units)
        identity = f"{leg_identity(leg.parts)}/{hashlib.sha256(keys.encode()).hexdigest()}"
        leg.checkpoint = CheckpointFile(self._folder.path / CHECKPOINT_FILE, identity)
        leg.num_edited = self._log.num_cases(leg.key)
        leg.steps = PROTOCOLS[type(leg.protocol)](
            model,
            editor,
            cases,
            self._evaluation_config,
            **msgspec.structs.asdict(leg.protocol),
            seed=self._settings.seed,
            completed=leg.completed,
            checkpoint=leg.checkpoint,
            base_pass=base_pass,
        )

    def _interleave(self, legs: Sequence[_Leg]) -> None:
        """Finish legs in turns: the one with the fewest edits is next, so all ask the same cases.

        The order follows from the results log, so a resumed run takes the same one.
        """
        waiting = list(legs)
        while waiting:
            leg = min(waiting, key=lambda turn: turn.num_edited)
            profiling.subject(str(leg.key))
            with profiling.record_operators():
                step = next(leg.steps, None)
            if step is None:
                assert leg.checkpoint is not None
                leg.checkpoint.delete()
                waiting.remove(leg)
                continue
            leg.num_edited += step.cases
            identity = leg_identity(leg.parts)
            with profiling.section("writing"):
                if self._settings.save_deltas:
                    _save_deltas(self._folder, leg.key, step)
                self._log.append(
                    leg.key,
                    [leg.units[number] for number in step.units],
                    [
                        _result_row(one, leg.key, identity, self._settings.seed)
                        for one in step.results
                    ],
                    cases=step.cases,
                    edit_seconds=step.edit_seconds,
                    probe_seconds=step.probe_seconds,
                    peak_bytes=step.peak_bytes,
                )
            self._progress.step(step.cases)


@dataclass
class _Leg:
    """One model, editor and protocol."""

    key: LegKey
    editor: EditorSettings
    protocol: Protocol
    parts: dict[str, str]
    units: list[UnitState] = field(default_factory=list)
    completed: set[int] = field(default_factory=set)
    steps: Iterator[Step] = field(default_factory=lambda: iter(()))
    checkpoint: CheckpointFile | None = None
    num_edited: int = 0  # cases so far


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
