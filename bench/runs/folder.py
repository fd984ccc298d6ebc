"""What a run writes into its folder: rows, deltas, thumbnails, profile."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec

from errata.bench.evaluation import profiling
from errata.bench.evaluation.questions import questions_of
from errata.bench.protocols.base import Result, Step
from errata.bench.runs.identity import versions
from errata.bench.storage.log_records import LegKey
from errata.bench.storage.results_log import ResultRow
from errata.bench.storage.run_folder import RunFolder
from errata.bench.storage.thumbnails import image_file_name, thumbnail
from errata.functional import Case
from errata.functional.deltas import serialization
from errata.functional.errors import ErrataError

PROFILE = "profile.json"


def _save_profile(folder: RunFolder, profiler: profiling.Profiler) -> None:
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
    folder.write(PROFILE, msgspec.json.format(msgspec.json.encode(profile)) + b"\n")


def _result_row(result: Result, leg: LegKey, identity: str, seed: int) -> ResultRow:
    return ResultRow(
        run=identity,
        model=leg.model,
        editor=leg.editor,
        protocol=leg.protocol,
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
        fault=result.fault,
        versions=versions(),
    )


def _save_deltas(folder: RunFolder, leg: LegKey, step: Step) -> None:
    names = [f"deltas/{leg}/{name}.safetensors" for name in step.deltas]
    for path, delta in zip(folder.claim(*names), step.deltas.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        serialization.save_delta(path, delta)


def _save_thumbnails(folder: RunFolder, cases: Sequence[Case]) -> None:
    """Small copies of the first cases' images, so that the report can show them."""
    images = {
        f"thumbnails/{image_file_name(image)}.png": image
        for case in cases
        for _, _, query in questions_of(case)
        for image in query.images
    }
    folder.claim(*images)
    for name, image in images.items():
        if not (folder.path / name).exists():
            with contextlib.suppress(ErrataError):  # the first query that needs it says more
                folder.write(name, thumbnail(image))
