"""What every benchmark loader shares: options, templates, faults, and the way to a `Case`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from errata.functional.errors import BadInput
from errata.functional.queries import Case, Query

from .pictures import MISSING, Drawn, Folder, Missing, Picture
from .stream import records

__all__ = [
    "RAW",
    "TEMPLATES",
    "Benchmark",
    "Hop",
    "Options",
    "Skipped",
    "Source",
    "Template",
    "cases",
    "clean_rephrase",
    "open_source",
    "portability",
    "readable",
    "repaired",
]


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer writes around the words of a record; `{}` is the field.

    `edit` also wraps the rephrased prompt. The space between prompt and target is not said here:
    the adapters write it."""

    edit: str = "{}"
    text_loc: str = "{}"
    image_loc: str = "{}"


TEMPLATES: Mapping[str, Template] = {
    # no peer's: the words of the file and nothing else
    "raw": Template(),
    # easyeditor/dataset/vqa.py:72, :210-211: only the image-locality question is wrapped
    "easyedit": Template(image_loc="Question: {} Short answer:"),
    # VLKEB dataset/coco_caption.py: as written
    "vlkeb": Template(),
    # UniKE dataset/vqa.py:49: one space more than EasyEdit, which changes the tokens
    "unike": Template(image_loc="Question: {} Short answer: "),
    # LiveEdit dataset/vllm.py:92-142; captions and VLKEB leave the edit prompt alone
    "liveedit": Template(edit="{} The answer is:", text_loc="{}?", image_loc="{} The answer is:"),
}


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a file is read. Every default leaves the words of the file untouched."""

    images: str = ""
    """Folder the image names start from; empty: beside the file and above it."""
    on_missing: MISSING = "error"
    on_fault: Literal["error", "skip"] = "error"
    """What a record of wrong type, or lacking a field, does. Skips are counted."""
    template: str = "raw"
    clean: bool = False
    """Strip quotes from either end of a rephrase, drop refusals of the paraphrasing model."""
    strip: bool = False
    """Strip white space around prompts and targets (14% of caption targets carry some)."""
    repair: bool = False
    """Undo mojibake, UTF-8 read as Windows-1252 ("itâ€™s" becomes "it’s")."""
    hop: int = 0
    """Keep only portability questions of that many hops, and records that have one; 0: all."""
    neighbours: int = 0
    """ComprehendEdit: ask each edit's k nearest and farthest neighbours too (KGI, KPI)."""
    neighbour_answers: str = "answer"
    """Whose answers KPI wants: the field of the record, such as `ori_pred_blip2`."""
    start: int = 0
    limit: int = 0
    """Records to read from `start` on; 0: all."""


RAW = Options()


class Skipped(Exception):
    """A record that is left out for a reason worth counting; never reaches the user."""


class Source(NamedTuple):
    """What turns one record into a case: where it stands, how it is read, what was met."""

    options: Options
    folder: Folder
    tally: Counter[str]
    template: Template
    path: Path

    def image(self, name: str) -> tuple[Picture | Drawn, ...]:
        """The images of a query, as a tuple; empty for no name or one that may be missing."""
        try:
            found = self.folder.find(name) if name else None
        except Missing as fault:
            if self.folder.on_missing == "skip":
                raise Skipped("an image is missing") from fault
            raise
        if name and found is None:
            self.tally["asked without its missing image"] += 1
        return (found,) if found else ()

    def text(self, words: str) -> str:
        """A field's words as the options want them."""
        if self.options.repair and (better := repaired(words)) != words:
            self.tally["mojibake repaired"] += 1
            words = better
        return words.strip() if self.options.strip else words

    def rephrase(self, words: str) -> str | None:
        """A rephrased prompt, cleaned where the options ask for it; None when nothing is left."""
        words = self.text(words)
        if not self.options.clean:
            return words or None
        better = clean_rephrase(words)
        if better != words:
            self.tally["rephrase cleaned" if better else "rephrase dropped: no question"] += 1
        return better or None

    def asks(self, kind: Literal["edit", "text_loc", "image_loc"], words: str) -> str:
        """A prompt of that kind in the template's words."""
        return getattr(self.template, kind).replace("{}", self.text(words))


class Benchmark(NamedTuple):
    """One benchmark: its record, how a record becomes a case, and what is odd about one."""

    name: str
    title: str
    record: type[msgspec.Struct]
    case: Callable[[Any, str, Source], Case]
    images: Callable[[Any], Iterable[str]]
    sniff: Callable[[Mapping[str, Any], Path], bool]
    oddities: Callable[[Any], Iterable[str]]
    above: bool = False  # image names may start with ../
    follow: Callable[[Any, Case, Source], Iterator[Case]] | None = None  # cases edited right after


def cases(
    benchmark: Benchmark,
    path: str | Path,
    options: Options = RAW,
    tally: Counter[str] | None = None,
) -> Iterator[Case]:
    """Stream the cases of one annotation file, in its order; ids are `<file stem>/<index>`.

    `tally` (a Counter of yours) is told what was skipped and why, and what the options changed.

    Raises `BadInput`, naming the file and the record, for broken JSON; and, with `on_fault` or
    `on_missing` "error", for records and images that can not be used.
    """
    path = Path(path)
    tally = Counter() if tally is None else tally
    source = open_source(benchmark, path, options, tally)
    stop = options.start + options.limit if options.limit else None
    for index, raw in enumerate(records(path)):
        if stop is not None and index >= stop:
            break
        if index < options.start:
            continue
        tally["records"] += 1
        try:
            readable(raw)
            record = msgspec.convert(raw, benchmark.record)
            case = benchmark.case(record, f"{path.stem}/{index:05d}", source)
            yield from (case, *(benchmark.follow(record, case, source) if benchmark.follow else ()))
        except Skipped as reason:
            tally[f"skipped: {reason}"] += 1
        except (msgspec.ValidationError, BadInput) as fault:
            if options.on_fault == "error":
                raise BadInput(f"{path}, record {index}: {fault}") from fault
            tally[f"skipped: {_kind(fault)}"] += 1


def open_source(benchmark: Benchmark, path: Path, options: Options, tally: Counter) -> Source:
    """Options as a loader needs them. Raises `BadInput` for an unknown template or image root."""
    if options.template not in TEMPLATES:
        raise BadInput(f"template must be one of {', '.join(TEMPLATES)}; got {options.template!r}.")
    folder = Folder.around(path, options.images, options.on_missing, benchmark.above)
    return Source(options, folder, tally, TEMPLATES[options.template], path)


def _kind(fault: Exception) -> str:
    """A fault without its particulars, so that faults of one kind are counted together."""
    if isinstance(fault, Missing):
        return "an image is missing"
    if "image name" in str(fault):
        return "an image name leaves its root"
    if "missing required field" in str(fault):
        return "a field is missing"
    typed = isinstance(fault, msgspec.ValidationError)
    return "a field has the wrong type" if typed else "a field can not be used"


def readable(raw: Mapping[str, Any]) -> None:
    """Refuse lone surrogates: JSON can spell them, no tokenizer can read them."""
    try:
        msgspec.json.encode(raw)
    except UnicodeEncodeError as fault:
        raise BadInput("text must be Unicode; a field has a lone surrogate.") from fault


_REFUSAL = re.compile(r"i'm sorry|i cannot|i can't|as an ai|language model", re.IGNORECASE)
_LEAD = re.compile(
    r"^\W*(?:rewritten|rephrased|paraphrased)[\w\s]*:\s*|^.*?\bre(?:written|phrased) as:?\s*",
    re.IGNORECASE | re.DOTALL,
)
_QUOTES = "\"“”'`"


def clean_rephrase(words: str) -> str:
    """A paraphrase without the paraphrasing model's debris; '' when it is a refusal.

    Quotes are stripped from either end on its own, for they are unbalanced in MMEdit; a lead-in
    ("Rewritten question:", "... can be rewritten as") goes; of several lines the first is kept.

    >>> clean_rephrase('Rewritten question: "How many balls are there?'), clean_rephrase('"Why?"')
    ('How many balls are there?', 'Why?')
    >>> clean_rephrase("I'm sorry, but I cannot see the image.")
    ''
    """
    if _REFUSAL.search(words):
        return ""
    rest = _LEAD.sub("", words.strip())
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    return lines[0].strip(_QUOTES).strip() if lines else ""


def repaired(words: str) -> str:
    """Undo UTF-8 read as Windows-1252, where that is what happened.

    >>> repaired("itâ€™s dusk"), repaired("café")
    ('it’s dusk', 'café')
    """
    if words.isascii():
        return words
    try:
        return words.encode("cp1252").decode()
    except UnicodeError:
        return words


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

    def asked(self) -> tuple[str, str, str]:
        """(hop, question, answer). Raises `BadInput` for an item of neither schema."""
        if self.pair is not None:
            number = self.port_type.split("-")[0]
            if not number.isdecimal():
                raise BadInput(f"port_type must be like '2-hop'; got {self.port_type!r}.")
            return f"{number}hop", self.pair.question, self.pair.answer
        if self.port_q is None:
            raise BadInput("an item of port_new must hold 'Q&A' or 'port_q'.")
        return "1hop", self.port_q, self.port_a


def portability(
    items: Sequence[Hop] | None, images: tuple[Any, ...], source: Source
) -> dict[str, tuple[Query, ...]]:
    """Portability probes by hop; with `Options.hop` that one alone, of records that have it."""
    wanted = source.options.hop
    probes: dict[str, tuple[Query, ...]] = {}
    for hop, question, answer in (item.asked() for item in items or ()):
        if question and answer and (not wanted or hop == f"{wanted}hop"):
            one = Query(source.text(question), source.text(answer), images)
            probes[f"portability_{hop}"] = (*probes.get(f"portability_{hop}", ()), one)
    if wanted and not probes:
        raise Skipped(f"no {wanted}-hop question")
    return probes
