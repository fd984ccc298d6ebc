"""The run folder: identity, saved deltas, thumbnails, profile."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from errata.bench.evaluation import profiling
from errata.bench.evaluation.questions import questions_of
from errata.bench.protocols.base import Result, Step
from errata.bench.storage.results_log import PROGRESS, RESULTS, ResultRow, UnitKey
from errata.bench.storage.thumbnails import image_file_name, thumbnail
from errata.functional import Case
from errata.functional.deltas import serialization
from errata.functional.errors import InvalidInputError
from errata.functional.files import atomic_write
from errata.functional.version import __version__

__all__ = ["versions"]

IDENTITY = "run.json"
PROFILE = "profile.json"
CHECKPOINT_FILE = ".state.safetensors"  # of the sequence that is going on


def versions() -> str:
    """Name the versions that a run's results depend on.

    Returns:
        Names and versions, separated by commas.

    Example:
        >>> versions().split()[0]
        'errata-vlm'
    """
    others = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]
    return ", ".join([f"errata-vlm {__version__}", *others, f"Python {platform.python_version()}"])


def _save_profile(folder: Path, profiler: profiling.Profiler) -> None:
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
        serialization.save_delta(folder / f"{name}.safetensors", delta)


def _save_thumbnails(folder: Path, cases: Sequence[Case]) -> None:
    """Small copies of the first cases' images, so that the report can show them."""
    thumbnails = folder / "thumbnails"
    thumbnails.mkdir(exist_ok=True)
    for case in cases:
        for _, _, query in questions_of(case):
            for image in query.images:
                path = thumbnails / f"{image_file_name(image)}.png"
                if not path.exists():
                    with atomic_write(path) as file:
                        file.write(thumbnail(image))
