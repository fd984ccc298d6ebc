"""Shared parts of the benchmark loaders: options, templates and the conversion to a `Case`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from errata.bench.data.reading.cleaning import clean_rephrase, fix_mojibake, require_valid_unicode
from errata.bench.data.reading.image_files import (
    ImageFile,
    ImageFolder,
    MissingImageError,
    OnMissing,
    PlaceholderImage,
)
from errata.bench.data.reading.json_stream import records
from errata.functional.errors import InvalidInputError
from errata.functional.queries import Case, Query

__all__ = [
    "DEFAULT_OPTIONS",
    "TEMPLATES",
    "Benchmark",
    "Hop",
    "ReadOptions",
    "RecordContext",
    "RecordTemplate",
    "SkipRecord",
    "cases",
    "portability",
    "record_context",
]


class RecordTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """The text that a peer adds around the fields of a record. `{}` stands for the field.

    The adapters add the space between prompt and target, so it is not in a template.

    Attributes:
        edit: For the edit's prompt and the rephrased prompt.
        text_loc: For the question of text locality.
        image_loc: For the question of image locality.
    """

    edit: str = "{}"
    text_loc: str = "{}"
    image_loc: str = "{}"


TEMPLATES: Mapping[str, RecordTemplate] = {
    # the text of the file and nothing else; used by no peer
    "raw": RecordTemplate(),
    # easyeditor/dataset/vqa.py:72, :210-211: only the image-locality question is wrapped
    "easyedit": RecordTemplate(image_loc="Question: {} Short answer:"),
    # VLKEB dataset/coco_caption.py: as written
    "vlkeb": RecordTemplate(),
    # UniKE dataset/vqa.py:49: one space more than EasyEdit, which changes the tokens
    "unike": RecordTemplate(image_loc="Question: {} Short answer: "),
    # LiveEdit dataset/vllm.py:92-142; captions and VLKEB leave the edit prompt alone
    "liveedit": RecordTemplate(
        edit="{} The answer is:", text_loc="{}?", image_loc="{} The answer is:"
    ),
}


class ReadOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a file is read. The defaults leave all text unchanged."""

    image_root: str = ""
    """Folder to which image names are relative. Empty: search the file's folder and above it."""
    missing_images: OnMissing = "error"
    invalid_records: Literal["error", "skip"] = "error"
    """What to do with a record that lacks a field or has a wrong type. Skips are counted."""
    template: str = "raw"
    clean_rephrases: bool = False
    """Strip quotes from both ends of a rephrase and drop refusals of the paraphrasing model."""
    strip_whitespace: bool = False
    """Strip white space around prompts and targets (14% of caption targets carry some)."""
    fix_encoding: bool = False
    """Repair UTF-8 that was read as Windows-1252 ("itâ€™s" becomes "it’s")."""
    hop: int = 0
    """Keep only portability questions with this number of hops, and records with one. 0: all."""
    num_neighbors: int = 0
    """ComprehendEdit: add probes of each edit's k nearest and farthest neighbors (KGI, KPI)."""
    neighbor_answers: str = "answer"
    """The record's field with the answers for KPI, e.g. `ori_pred_blip2`."""
    start: int = 0
    limit: int = 0
    """Number of records to read, beginning at `start`. 0: all."""


DEFAULT_OPTIONS = ReadOptions()


class SkipRecord(Exception):
    """A record that is left out and counted. The loaders catch it."""


class RecordContext(NamedTuple):
    """What the conversion of a record to a case needs.

    Attributes:
        options: How the file is read.
        image_folder: Where the images are.
        skip_counts: Counts what was skipped or changed.
        template: The template that `options.template` names.
        path: The annotation file.
    """

    options: ReadOptions
    image_folder: ImageFolder
    skip_counts: Counter[str]
    template: RecordTemplate
    path: Path

    def find_images(self, name: str) -> tuple[ImageFile | PlaceholderImage, ...]:
        """Find the image of a query.

        Args:
            name: The name in the file, or "" for a query without image.

        Returns:
            A tuple of one image. Empty for no name, and for a missing image if `missing_images` is
            "none".

        Raises:
            InvalidInputError: If the name is not a relative path below its root.
            MissingImageError: If the image is missing and `missing_images` is "error".
            SkipRecord: If the image is missing and `missing_images` is "skip".
        """
        try:
            found = self.image_folder.find(name) if name else None
        except MissingImageError as fault:
            if self.image_folder.missing_images == "skip":
                raise SkipRecord("an image is missing") from fault
            raise
        if name and found is None:
            self.skip_counts["asked without its missing image"] += 1
        return (found,) if found else ()

    def clean_text(self, text: str) -> str:
        """Repair the encoding and strip white space, if the options say so.

        Args:
            text: The text of a field.

        Returns:
            The text, unchanged by default.
        """
        if self.options.fix_encoding and (better := fix_mojibake(text)) != text:
            self.skip_counts["mojibake repaired"] += 1
            text = better
        return text.strip() if self.options.strip_whitespace else text

    def rephrased_prompt(self, text: str) -> str | None:
        """Clean a rephrased prompt, if the options say so.

        Args:
            text: The text of the field.

        Returns:
            The prompt. None if it is empty, or if cleaning leaves nothing.
        """
        text = self.clean_text(text)
        if not self.options.clean_rephrases:
            return text or None
        better = clean_rephrase(text)
        if better != text:
            self.skip_counts["rephrase cleaned" if better else "rephrase dropped: no question"] += 1
        return better or None

    def wrap_prompt(self, kind: Literal["edit", "text_loc", "image_loc"], text: str) -> str:
        """Wrap a prompt in the template.

        Args:
            kind: Which of the template's fields to use.
            text: The text of the field. It is cleaned first.

        Returns:
            The prompt.
        """
        return getattr(self.template, kind).replace("{}", self.clean_text(text))


class Benchmark(NamedTuple):
    """One benchmark: its schema and how its records become cases.

    Attributes:
        name: The name in settings.
        title: The name in reports.
        record: The type of a record.
        case: (record, id, context) to the case. May raise `SkipRecord`.
        images: Record to the image names in it.
        matches: (raw first record, file) to whether the file belongs to this benchmark.
        anomalies: Record to descriptions of what `errata data verify` counts.
        allow_parent_paths: Whether image names may start with `../`.
        follow_up: (record, its case, context) to further cases, which are edited right after it.
    """

    name: str
    title: str
    record: type[msgspec.Struct]
    case: Callable[[Any, str, RecordContext], Case]
    images: Callable[[Any], Iterable[str]]
    matches: Callable[[Mapping[str, Any], Path], bool]
    anomalies: Callable[[Any], Iterable[str]]
    allow_parent_paths: bool = False  # image names may start with ../
    follow_up: Callable[[Any, Case, RecordContext], Iterator[Case]] | None = (
        None  # cases edited right after
    )


def cases(
    benchmark: Benchmark,
    path: str | Path,
    options: ReadOptions = DEFAULT_OPTIONS,
    skip_counts: Counter[str] | None = None,
) -> Iterator[Case]:
    """Stream the cases of one annotation file, in its order.

    Args:
        benchmark: The file's benchmark.
        path: The annotation file.
        options: How the file is read.
        skip_counts: Updated with what was skipped and why, and with what the options changed.
            Defaults to a new counter.

    Yields:
        Cases with ids `<file stem>/<index>`.

    Raises:
        InvalidInputError: If an option or the JSON is invalid. With `invalid_records="error"`, also
            for a record that cannot be used. The message names the file and the record.
    """
    path = Path(path)
    skip_counts = Counter() if skip_counts is None else skip_counts
    context = record_context(benchmark, path, options, skip_counts)
    stop = options.start + options.limit if options.limit else None
    for index, raw in enumerate(records(path)):
        if stop is not None and index >= stop:
            break
        if index < options.start:
            continue
        skip_counts["records"] += 1
        try:
            require_valid_unicode(raw)
            record = msgspec.convert(raw, benchmark.record)
            case = benchmark.case(record, f"{path.stem}/{index:05d}", context)
            yield from (
                case,
                *(benchmark.follow_up(record, case, context) if benchmark.follow_up else ()),
            )
        except SkipRecord as reason:
            skip_counts[f"skipped: {reason}"] += 1
        except (msgspec.ValidationError, InvalidInputError) as fault:
            if options.invalid_records == "error":
                raise InvalidInputError(f"{path}, record {index}: {fault}") from fault
            skip_counts[f"skipped: {_error_kind(fault)}"] += 1


def record_context(
    benchmark: Benchmark, path: Path, options: ReadOptions, skip_counts: Counter[str]
) -> RecordContext:
    """Make the context of a file from the options.

    Args:
        benchmark: The file's benchmark.
        path: The annotation file.
        options: How the file is read.
        skip_counts: The counter that the context updates.

    Returns:
        The context.

    Raises:
        InvalidInputError: If the template is unknown or the image root is not a folder.
    """
    if options.template not in TEMPLATES:
        raise InvalidInputError(
            f"template must be one of {', '.join(TEMPLATES)}; got {options.template!r}."
        )
    folder = ImageFolder.around(
        path, options.image_root, options.missing_images, benchmark.allow_parent_paths
    )
    return RecordContext(options, folder, skip_counts, TEMPLATES[options.template], path)


def _error_kind(fault: Exception) -> str:
    """Name the kind of an error, so that errors of one kind are counted together."""
    if isinstance(fault, MissingImageError):
        return "an image is missing"
    if "image name" in str(fault):
        return "an image name leaves its root"
    if "missing required field" in str(fault):
        return "a field is missing"
    typed = isinstance(fault, msgspec.ValidationError)
    return "a field has the wrong type" if typed else "a field cannot be used"


class Pair(msgspec.Struct, frozen=True):
    """A question and its answer, with the keys of VLKEB's multi-hop file and MMKE-Bench."""

    question: str = msgspec.field(name="Question", default="")
    answer: str = msgspec.field(name="Answer", default="")


class Hop(msgspec.Struct, frozen=True):
    """An item of `port_new`, which has two schemas.

    `{"port_type": "2-hop", "Q&A": {"Question", "Answer"}}` (VLKEB multi-hop, MMKE-Bench), or
    `{"port_q", "port_a", "port_edit_q", "port_edit_a"}` (VLKEB one-hop).
    """

    port_type: str = "1-hop"
    pair: Pair | None = msgspec.field(name="Q&A", default=None)
    port_q: str | None = None
    port_a: str = ""
    port_edit_q: str = ""
    port_edit_a: str = ""

    def question_answer(self) -> tuple[str, str, str]:
        """Read the item in either schema.

        Returns:
            Hop (e.g. "2hop"), question and answer.

        Raises:
            InvalidInputError: If the item has neither schema, or its `port_type` has no number.
        """
        if self.pair is not None:
            number = self.port_type.split("-")[0]
            if not number.isdecimal():
                raise InvalidInputError(f"port_type must be like '2-hop'; got {self.port_type!r}.")
            return f"{number}hop", self.pair.question, self.pair.answer
        if self.port_q is None:
            raise InvalidInputError("an item of port_new must hold 'Q&A' or 'port_q'.")
        return "1hop", self.port_q, self.port_a


def portability(
    items: Sequence[Hop] | None, images: tuple[Any, ...], context: RecordContext
) -> dict[str, tuple[Query, ...]]:
    """Make the portability probes of a record, one probe for each number of hops.

    Args:
        items: The record's `port_new`.
        images: The images of the queries.
        context: How the file is read. `options.hop` keeps the questions of one number of hops.

    Returns:
        `portability_<n>hop` to its queries. Questions with an empty part are left out.

    Raises:
        InvalidInputError: If an item has neither schema.
        SkipRecord: If `options.hop` is set and no question has that hop.
    """
    hop_wanted = context.options.hop
    probes: dict[str, tuple[Query, ...]] = {}
    for hop, question, answer in (item.question_answer() for item in items or ()):
        if question and answer and (not hop_wanted or hop == f"{hop_wanted}hop"):
            one = Query(context.clean_text(question), context.clean_text(answer), images)
            probes[f"portability_{hop}"] = (*probes.get(f"portability_{hop}", ()), one)
    if hop_wanted and not probes:
        raise SkipRecord(f"no {hop_wanted}-hop question")
    return probes
