"""Reports on downloaded annotation files: counts, faults, anomalies and missing images.

Files are only read. Images are decoded only with `decode=True`. Records are streamed and only names
are kept, so memory use is small.
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
"""Name of a published file to its number of records, and a remark on that number."""

MAX_LISTED = 20
_NUM_SHOWN = 5


class FileReport(msgspec.Struct, kw_only=True):
    """The report on one annotation file.

    Attributes:
        file: The file's path.
        benchmark: Name of the benchmark. Empty if the file is of no known benchmark.
        title: The benchmark's name in reports.
        records: The number of records read.
        published: The number of records in the published file of that name, if known.
        cases: The number of records that became cases.
        probes: Probe name to the number of its questions.
        skipped: Reason to the number of records skipped for it.
        faults: The first `MAX_LISTED` faults, as sentences.
        num_faults: The number of faults, including those not listed.
        anomalies: Description to the number of occurrences, most frequent first. None is an error.
        images: The number of different image names.
        missing: The first `MAX_LISTED` names of missing images.
        num_missing: The number of missing images.
        broken: Errors of images that do not open. Empty without `decode`.
        notes: Remarks on the record count and on images shared with other files.
    """

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
        """Whether the file is of a known benchmark, every record reads and no image is missing."""
        return bool(self.benchmark) and not (self.num_faults or self.num_missing or self.broken)


def annotation_files(path: str | Path) -> Iterator[Path]:
    """Find the annotation files at a path.

    Args:
        path: An annotation file, or a folder that is searched recursively.

    Yields:
        The file itself, or every .json and then every .jsonl file of the folder, in sorted order.

    Raises:
        InvalidInputError: If there is none.
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
    """Report on every annotation file at a path.

    A file that cannot be read does not stop the others. Its fault is in its report.

    Args:
        path: An annotation file, or a folder that is searched recursively.
        images: Folder to which image names are relative. Empty: the file's folder and the two
            folders above it are searched.
        decode: Also decode every image that exists.

    Returns:
        One report for each file.

    Raises:
        InvalidInputError: If there is no annotation file.
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
    """One pass over one file, with its counters."""

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
                continue  # already reported as a fault of its record
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
    """Note which files of one benchmark edit the same images, e.g. for training and evaluation."""
    for i, one in enumerate(reports):
        for j in range(i):
            both = len(edits[i] & edits[j])
            if both and reports[j].benchmark == one.benchmark:
                one.notes.append(f"{both:,} edit images are also in {Path(reports[j].file).name}")


def format_report(report: FileReport) -> str:
    """Format a report as text for the terminal.

    Args:
        report: The report on one file.

    Returns:
        Several lines, without a final newline.
    """
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
