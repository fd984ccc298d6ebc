"""What every benchmark loader shares: options, templates, faults, and the way to a `Case`."""

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
    """What a peer writes around the words of a record; `{}` is the field.

    `edit` also wraps the rephrased prompt. The space between prompt and target is not said here:
    the adapters write it."""

    edit: str = "{}"
    text_loc: str = "{}"
    image_loc: str = "{}"


TEMPLATES: Mapping[str, RecordTemplate] = {
    # no peer's: the words of the file and nothing else
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
    """How a file is read. Every default leaves the words of the file untouched."""

    image_root: str = ""
    """Folder the image names start from; empty: beside the file and above it."""
    missing_images: OnMissing = "error"
    invalid_records: Literal["error", "skip"] = "error"
    """What a record of wrong type, or lacking a field, does. Skips are counted."""
    template: str = "raw"
    clean_rephrases: bool = False
    """Strip quotes from either end of a rephrase, drop refusals of the paraphrasing model."""
    strip_whitespace: bool = False
    """Strip white space around prompts and targets (14% of caption targets carry some)."""
    fix_encoding: bool = False
    """Undo mojibake, UTF-8 read as Windows-1252 ("itâ€™s" becomes "it’s")."""
    hop: int = 0
    """Keep only portability questions of that many hops, and records that have one; 0: all."""
    num_neighbors: int = 0
    """ComprehendEdit: ask each edit's k nearest and farthest neighbours too (KGI, KPI)."""
    neighbor_answers: str = "answer"
    """Whose answers KPI wants: the field of the record, such as `ori_pred_blip2`."""
    start: int = 0
    limit: int = 0
    """Records to read from `start` on; 0: all."""


DEFAULT_OPTIONS = ReadOptions()


class SkipRecord(Exception):
    """A record that is left out for a reason worth counting; never reaches the user."""


class RecordContext(NamedTuple):
    """What turns one record into a case: where it stands, how it is read, what was met."""

    options: ReadOptions
    image_folder: ImageFolder
    skip_counts: Counter[str]
    template: RecordTemplate
    path: Path

    def find_images(self, name: str) -> tuple[ImageFile | PlaceholderImage, ...]:
        """The images of a query, as a tuple; empty for no name or one that may be missing."""
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
        """A field's words as the options want them."""
        if self.options.fix_encoding and (better := fix_mojibake(text)) != text:
            self.skip_counts["mojibake repaired"] += 1
            text = better
        return text.strip() if self.options.strip_whitespace else text

    def rephrased_prompt(self, text: str) -> str | None:
        """A rephrased prompt, cleaned where the options ask for it; None when nothing is left."""
        text = self.clean_text(text)
        if not self.options.clean_rephrases:
            return text or None
        better = clean_rephrase(text)
        if better != text:
            self.skip_counts["rephrase cleaned" if better else "rephrase dropped: no question"] += 1
        return better or None

    def wrap_prompt(self, kind: Literal["edit", "text_loc", "image_loc"], text: str) -> str:
        """A prompt of that kind in the template's words."""
        return getattr(self.template, kind).replace("{}", self.clean_text(text))


class Benchmark(NamedTuple):
    """One benchmark: its record, how a record becomes a case, and what is odd about one."""

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
    """Stream the cases of one annotation file, in its order; ids are `<file stem>/<index>`.

    `skip_counts` (a Counter of yours) is told what was skipped and why, and what the options
    changed.

    Raises `InvalidInputError`, naming the file and the record, for broken JSON; and, with
    `invalid_records` or `missing_images` "error", for records and images that cannot be used.
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
    """Options as a loader needs them.

    Raises `InvalidInputError` for an unknown template or image root.
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
    """A fault without its particulars, so that faults of one kind are counted together."""
    if isinstance(fault, MissingImageError):
        return "an image is missing"
    if "image name" in str(fault):
        return "an image name leaves its root"
    if "missing required field" in str(fault):
        return "a field is missing"
    typed = isinstance(fault, msgspec.ValidationError)
    return "a field has the wrong type" if typed else "a field cannot be used"


class Pair(msgspec.Struct, frozen=True):
    """A question and its answer, as VLKEB's multi-hop file and MMKE-Bench spell them."""

    question: str = msgspec.field(name="Question", default="")
    answer: str = msgspec.field(name="Answer", default="")


class Hop(msgspec.Struct, frozen=True):
    """An item of `port_new`: the same key has two schemas, told apart by what is there.

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
        """(hop, question, answer). Raises `InvalidInputError` for an item of neither schema."""
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
    """Portability probes by hop; with `ReadOptions.hop` that one alone, of records that have it."""
    hop_wanted = context.options.hop
    probes: dict[str, tuple[Query, ...]] = {}
    for hop, question, answer in (item.question_answer() for item in items or ()):
        if question and answer and (not hop_wanted or hop == f"{hop_wanted}hop"):
            one = Query(context.clean_text(question), context.clean_text(answer), images)
            probes[f"portability_{hop}"] = (*probes.get(f"portability_{hop}", ()), one)
    if hop_wanted and not probes:
        raise SkipRecord(f"no {hop_wanted}-hop question")
    return probes
