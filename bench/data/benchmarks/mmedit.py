"""MMEdit (EMNLP 2023): E-VQA and E-IC in EasyEdit's layout, with their two locality files.

`vqa/vqa_{train,eval}.json`, `caption/caption_{train,eval}_edit.json`: a list of records with eleven
strings. `locality/NQ dataset/*.json` is one object of two columns. `multimodal_locality/OK-VQA
dataset/okvqa_loc.json` is a list with ten answers for each question. Image names are relative to
the image root (`val2014/...`). VLKEB has the same eleven fields, see `vlkeb.py`.

The published files hold 6,345 and 2,093 (E-VQA), 2,849 and 1,000 (E-IC), 4,289 (NQ validation) and
5,046 (OK-VQA) records. The paper counts 6,346.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from errata.bench.data.reading.benchmark import Benchmark, RecordContext, SkipRecord
from errata.bench.data.reading.common_probes import common_probes
from errata.functional.queries import Case, Query

__all__ = [
    "CAPTION",
    "NQ",
    "OKVQA",
    "VQA",
    "Locality",
    "Question",
    "Record",
    "anomalies",
    "caption_case",
    "case",
    "images",
]


class Record(msgspec.Struct, frozen=True):
    """The eleven fields of MMEdit and VLKEB. Only prompt, target and image are required."""

    src: str
    alt: str
    image: str
    pred: str = ""
    rephrase: str = ""
    image_rephrase: str = ""
    loc: str = ""
    loc_ans: str = ""
    m_loc: str = ""
    m_loc_q: str = ""
    m_loc_a: str = ""


def case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert an E-VQA record to a case. The template's `edit` wraps its prompts.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The edit and its probes.

    Raises:
        InvalidInputError: If an image name or a missing image is an error.
        SkipRecord: If the target is empty.
    """
    return _make_case(record, name, context, context.template.edit)


def caption_case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert an E-IC record to a case. Its prompt, `a photo of`, is not wrapped in any template.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The edit and its probes.

    Raises:
        InvalidInputError: If an image name or a missing image is an error.
        SkipRecord: If the target is empty.
    """
    return _make_case(record, name, context, "{}")


def _make_case(record: Record, name: str, context: RecordContext, wrap: str) -> Case:
    if not record.alt.strip():
        raise SkipRecord("the target is empty")
    prompt = wrap.replace("{}", context.clean_text(record.src))
    edit = Query(prompt, context.clean_text(record.alt), context.find_images(record.image))
    return Case(name, edit, common_probes(record, edit, context, wrap))


def images(record: Record) -> Iterator[str]:
    """List the image names of a record.

    Args:
        record: A record of the file.

    Returns:
        Every name that is not empty, as written in the file.
    """
    return (one for one in (record.image, record.image_rephrase, record.m_loc) if one)


def anomalies(record: Record) -> Iterator[str]:
    """List the anomalies of a record for `errata data verify`. None is an error.

    Args:
        record: A record of the file.

    Yields:
        A short description of each.
    """
    words = record.rephrase
    if words:
        yield from _rephrase_anomalies(words, record.src)
    yield from _target_anomalies(record)
    for field in ("src", "rephrase", "alt", "loc_ans", "m_loc_a"):
        text = getattr(record, field)
        if not text.isascii():
            yield f"{field} is not ASCII"
        if "\n" in text:
            yield f"{field} has several lines"
        if "â€" in text or "Ã" in text:
            yield f"{field} looks like mojibake"
    if len(record.loc_ans) > 100:
        yield "loc_ans is longer than 100 characters"
    if record.loc.startswith("nq question: "):
        yield "loc starts with 'nq question: '"
    if record.loc and not record.loc.endswith("?"):
        yield "loc ends without a question mark"
    one, two = Path(record.image).suffix, Path(record.image_rephrase).suffix
    if record.image_rephrase and one != two:
        yield f"image_rephrase is {two}, image is {one}"


def _rephrase_anomalies(rephrase: str, src: str) -> Iterator[str]:
    low = rephrase.lower()
    if rephrase.startswith('"'):
        yield "rephrase starts with a quote"
    if rephrase.endswith('"'):
        yield "rephrase ends with a quote"
    if rephrase.startswith('"') != rephrase.endswith('"'):
        yield "rephrase has a quote at one end only"
    if any(mark in low for mark in ("i'm sorry", "i cannot", "as an ai", "language model")):
        yield "rephrase is a refusal"
    if "rewritten" in low or "rephrased" in low:
        yield "rephrase has a lead-in"
    if low.strip('" ') == src.lower().strip('" '):
        yield "rephrase equals the prompt"
    if src.endswith("?") and "?" not in rephrase:
        yield "rephrase has no question mark"


def _normalize_text(text: str) -> str:
    """Remove case and punctuation, as in the published count."""
    return "".join(char for char in text.casefold() if char.isalnum() or char.isspace()).strip()


def _target_anomalies(record: Record) -> Iterator[str]:
    alt = record.alt
    if not alt.strip():
        yield "alt is empty"
    elif record.pred and _normalize_text(alt) == _normalize_text(record.pred):
        yield "alt equals pred after normalizing"
    if alt != alt.strip():
        yield "alt has white space at an end"
    if "_" in alt:
        yield "alt has underscores"
    if "(" in alt:
        yield "alt has parentheses"
    if alt.replace(".", "").replace(",", "").isdigit():
        yield "alt is a number"
    if alt.startswith('"'):
        yield "alt is quoted"
    if "_" in record.pred:
        yield "pred has underscores"
    if len(alt) > 2 and alt.lower() in record.src.lower():
        yield "alt occurs in the prompt"


def _has_common_fields(raw: Mapping[str, Any]) -> bool:
    return {"src", "alt", "image"} <= raw.keys() and "knowledge_type" not in raw


VQA = Benchmark(
    "mmedit-vqa",
    "MMEdit E-VQA",
    Record,
    case,
    images,
    lambda raw, path: (
        _has_common_fields(raw) and raw["src"] != "a photo of" and "image_type" not in raw
    ),
    anomalies,
)
CAPTION = Benchmark(
    "mmedit-caption",
    "MMEdit E-IC",
    Record,
    caption_case,
    images,
    lambda raw, path: _has_common_fields(raw) and raw["src"] == "a photo of",
    anomalies,
)


class Question(msgspec.Struct, frozen=True):
    """A row of the NQ file: a question without an image, and its answer."""

    questions: str
    answers: str


class Locality(msgspec.Struct, frozen=True):
    """A record of `okvqa_loc.json`: a question about an image and its ten answers."""

    question: str
    answer: list[str]
    image: str
    question_id: int = 0


def _nq_case(record: Question, name: str, context: RecordContext) -> Case:
    if not record.answers.strip():
        raise SkipRecord("the target is empty")
    return Case(
        name,
        Query(
            context.wrap_prompt("text_loc", record.questions), context.clean_text(record.answers)
        ),
    )


def _okvqa_case(record: Locality, name: str, context: RecordContext) -> Case:
    """Convert a record to a case with the majority answer. The first one wins a tie."""
    answers = [one for one in record.answer if one.strip()]
    if not answers:
        raise SkipRecord("the target is empty")
    answer = max(dict.fromkeys(answers), key=answers.count)
    prompt = context.wrap_prompt("image_loc", record.question)
    return Case(name, Query(prompt, context.clean_text(answer), context.find_images(record.image)))


def _nq_anomalies(record: Question) -> Iterable[str]:
    if record.questions.startswith("nq question: "):
        yield "loc starts with 'nq question: '"
    if not record.answers.isascii():
        yield "loc_ans is not ASCII"
    if len(record.answers) > 100:
        yield "loc_ans is longer than 100 characters"


def _okvqa_anomalies(record: Locality) -> Iterable[str]:
    if len(set(record.answer)) > 1:
        yield "the ten answers differ"


NQ = Benchmark(
    "nq-locality",
    "MMEdit text locality (NQ)",
    Question,
    _nq_case,
    lambda record: (),
    lambda raw, path: {"questions", "answers"} <= raw.keys(),
    _nq_anomalies,
)
OKVQA = Benchmark(
    "okvqa-locality",
    "MMEdit image locality (OK-VQA)",
    Locality,
    _okvqa_case,
    lambda record: (record.image,),
    lambda raw, path: {"question_id", "question", "answer", "image"} <= raw.keys(),
    _okvqa_anomalies,
)
