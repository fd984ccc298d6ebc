"""What a folder of downloaded annotations holds, and everything odd or missing, in one pass.

Nothing is changed and no image is decoded unless asked. Memory stays small: records are streamed,
only names are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from errata.bench.data.benchmarks.table import detect
from errata.bench.data.reading.benchmark import Benchmark, ReadOptions, SkipRecord, record_context
from errata.bench.data.reading.cleaning import require_valid_unicode
from errata.bench.data.reading.image_files import ImageFile
from errata.bench.data.reading.json_stream import records
from errata.functional.errors import InvalidInputError
from errata.functional.queries import Query

__all__ = ["FileReport", "annotation_files", "format_report", "verify"]

PUBLISHED_COUNTS: Mapping[str, tuple[int, str]] = {
    "vqa_train.json": (6345, "the paper prints 6,346"),
    "vqa_eval.json": (2093, ""),
    "caption_train_edit.json": (2849, ""),
    "caption_eval_edit.json": (1000, ""),
    "okvqa_loc.json": (5046, ""),
    "eval_edit_onehop.json": (1278, ""),
    "ComprehendEdit_train.json": (13450, "as its README says"),
    "ComprehendEdit_test.json": (4482, "as its README says"),
    "entity_train.json": (636, "as its page says"),
    "entity_eval.json": (955, "as its page says"),
    "visual_train.json": (214, "as its page says"),
    "visual_eval.json": (293, "as its page says"),
    "user_train.json": (331, "as its page says"),
    "user_eval.json": (511, "as its page says"),
}
"""Records in the files as published, where a name says which file it is."""

MAX_LISTED = 20
_NUM_SHOWN = 5


class FileReport(msgspec.Struct, kw_only=True):
    """What one annotation file holds."""

    file: str
    benchmark: str = ""
    title: str = ""
    records: int = 0
    published: int | None = None
    cases: int = 0
    probes: dict[str, int] = {}
    skipped: dict[str, int] = {}
    faults: list[str] = []
    num_faults: int = 0
    anomalies: dict[str, int] = {}
    images: int = 0
    missing: list[str] = []
    num_missing: int = 0
    broken: list[str] = []
    notes: list[str] = []

    @property
    def usable(self) -> bool:
        """Whether every record reads and every image is there."""
        return bool(self.benchmark) and not (self.num_faults or self.num_missing or self.broken)


def annotation_files(path: str | Path) -> Iterator[Path]:
    """The annotation files at a path: itself, or every .json and .jsonl below it, in order.

    Raises `InvalidInputError` when there is none.
    """
    path = Path(path)
    if path.is_file():
        yield path
        return
    found = sorted(chain(path.rglob("*.json"), path.rglob("*.jsonl"))) if path.is_dir() else []
    if not found:
        raise InvalidInputError(
            f"{path} must be an annotation file or a folder with some; it is neither."
        )
    yield from found


def verify(path: str | Path, images: str = "", *, decode: bool = False) -> list[FileReport]:
    """Report on every annotation file at a path; `decode` also opens every image there is.

    Faults do not stop it: a file that cannot be read has its fault in its report.
    """
    checked = [_verify_file(file, images, decode) for file in annotation_files(path)]
    reports = [report for report, _ in checked]
    _note_shared_images(reports, [names for _, names in checked])
    return reports


def _verify_file(file: Path, images: str, decode: bool) -> tuple[FileReport, set[str]]:
    report = FileReport(file=str(file))
    try:
        benchmark = detect(file)
    except InvalidInputError as fault:
        report.faults, report.num_faults = [str(fault)], 1
        return report, set()
    report.benchmark, report.title = benchmark.name, benchmark.title
    if published := PUBLISHED_COUNTS.get(file.name):
        report.published = published[0]
    return report, _FileVerification(report, benchmark, file, images, decode).run()


class _FileVerification:
    """One reading of one file: what is counted on the way, and what is known only at its end."""

    def __init__(
        self, report: FileReport, benchmark: Benchmark, file: Path, images: str, decode: bool
    ) -> None:
        self.report, self.benchmark, self.file, self.decode = report, benchmark, file, decode
        self.skip_counts: Counter[str] = Counter()
        self.context = record_context(
            benchmark,
            file,
            ReadOptions(image_root=images, missing_images="placeholder"),
            self.skip_counts,
        )
        self.anomalies: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.probes: Counter[str] = Counter()
        self.names: set[str] = set()
        self.edit_images: set[str] = set()
        self.targets_by_question: dict[tuple[str, str], set[str]] = {}
        self.locality_images: Counter[str] = Counter()

    def run(self) -> set[str]:
        try:
            for index, raw in enumerate(records(self.file)):
                self.report.records += 1
                self._record(index, raw)
        except InvalidInputError as fault:
            self._add_fault(str(fault))
        self._finish()
        return self.edit_images

    def _add_fault(self, words: str) -> None:
        self.report.num_faults += 1
        if len(self.report.faults) < MAX_LISTED:
            self.report.faults.append(words)

    def _record(self, index: int, raw: dict[str, Any]) -> None:
        try:
            require_valid_unicode(raw)
            record = msgspec.convert(raw, self.benchmark.record)
            case = self.benchmark.case(record, str(index), self.context)
        except SkipRecord as reason:
            self.skipped[str(reason)] += 1
            return
        except (msgspec.ValidationError, InvalidInputError) as fault:
            self._add_fault(f"record {index}: {fault}")
            return
        self.report.cases += 1
        self.anomalies.update(self.benchmark.anomalies(record))
        self.names.update(self.benchmark.images(record))
        for name, queries in case.probes.items():
            self.probes[name] += len(queries)
        self._count_duplicates(case.edit, raw)

    def _count_duplicates(self, edit: Query, raw: dict[str, Any]) -> None:
        image = raw.get("image")
        if not isinstance(image, str):
            return
        key = (image, edit.prompt.casefold())
        targets = self.targets_by_question.setdefault(key, set())
        if targets:
            self.anomalies["same image and prompt as an earlier record"] += 1
            if edit.target not in targets:
                self.anomalies["same image and prompt, another target"] += 1
        targets.add(edit.target)
        self.edit_images.add(image)
        if isinstance(other := raw.get("m_loc"), str):
            self.locality_images[other] += 1

    def _finish(self) -> None:
        report = self.report
        also = sum(
            count for name, count in self.locality_images.items() if name in self.edit_images
        )
        if also:
            self.anomalies["m_loc is an edit's image elsewhere"] = also
        report.anomalies = dict(self.anomalies.most_common())
        report.skipped, report.probes = dict(self.skipped), dict(self.probes)
        report.images = len(self.names)
        absent = []
        for name in sorted(self.names):
            try:
                found = self.context.image_folder.path(name)
            except InvalidInputError:
                continue  # named as a fault of its record
            if found is None:
                absent.append(name)
            elif self.decode:
                self._try_open(found)
        report.missing, report.num_missing = absent[:MAX_LISTED], len(absent)
        _, why = PUBLISHED_COUNTS.get(self.file.name, (0, ""))
        if report.published and report.published != report.records:
            words = f"the published file has {report.published:,} records"
            report.notes.append(f"{words} ({why})" if why else words)

    def _try_open(self, path: Path) -> None:
        try:
            ImageFile(path).load()
        except InvalidInputError as fault:
            self.report.broken.append(str(fault))


def _note_shared_images(reports: list[FileReport], edits: list[set[str]]) -> None:
    """Say which files of one benchmark edit the same images: training data seen in evaluation."""
    for i, one in enumerate(reports):
        for j in range(i):
            both = len(edits[i] & edits[j])
            if both and reports[j].benchmark == one.benchmark:
                one.notes.append(f"{both:,} edit images are also in {Path(reports[j].file).name}")


def format_report(report: FileReport) -> str:
    """A report as people read it."""
    if not report.benchmark:
        return f"{report.file}\n  not read: {report.faults[0]}"
    lines = [report.file, f"  {report.title}: {report.records:,} records, {report.cases:,} cases"]
    lines += [f"  note: {note}" for note in report.notes]
    asked = ", ".join(f"{name} {count:,}" for name, count in report.probes.items())
    lines.append(f"  probes: {asked or 'none'}")
    lines += [f"  skipped: {count:,} ({why})" for why, count in report.skipped.items()]
    lines += _listing("faults", report.faults, report.num_faults)
    lines.append(f"  images named: {report.images:,}, missing: {report.num_missing:,}")
    lines += [f"    {name}" for name in report.missing[:_NUM_SHOWN]]
    lines += _listing("images that do not open", report.broken, len(report.broken))
    if report.anomalies:
        lines.append("  anomalies (none is an error):")
        lines += [f"    {count:>7,}  {what}" for what, count in report.anomalies.items()]
    return "\n".join(lines)


def _listing(title: str, items: list[str], count: int) -> list[str]:
    if not count:
        return []
    shown = [f"    {item}" for item in items[:MAX_LISTED]]
    more = [f"    and {count - len(shown):,} more"] if count > len(shown) else []
    return [f"  {title}: {count:,}", *shown, *more]
