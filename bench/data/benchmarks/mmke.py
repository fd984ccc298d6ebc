"""MMKE-Bench (ICLR 2025): visual entities, visual semantics, user-specific facts as free text.

The files are `data_json/{entity,visual,user}_{train,eval}.json` in the code and the published
folder, and `data_json/{entity,visual,user}/{train,eval}.json` in its README. Images are in
`data_image/`. Targets are paragraphs, so separate questions measure reliability, with and without
the image:

    T-Rel  text_reliability    rel_1, rel_2 (visual: rel)         no image
    I-Rel  image_reliability   m_rel_1, m_rel_2 (visual: m_rel)   the edit's image
    I-Gen  image_rephrase      the same questions                 the other image

(`trainer/MultimodalTrainer.py:502-582`). The files spell every answer key in two ways. Portability
questions use the edit's image (entity) or `one_hop_img` (visual, user).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from errata.bench.data.reading.benchmark import (
    Benchmark,
    Hop,
    RecordContext,
    SkipRecord,
    portability,
)
from errata.bench.data.reading.common_probes import common_probes
from errata.functional.queries import Case, Query

__all__ = ["MMKE", "Record", "anomalies", "case", "images"]


class Record(msgspec.Struct, frozen=True):
    """One record of any of the three knowledge types. Absent fields are empty."""

    knowledge_type: str
    src: str
    alt: str
    image: str
    pred: str = ""
    rephrase: str = ""
    image_rephrase: str = ""
    image_rephrase_question: str = ""
    one_hop_img: str = ""
    loc: str = ""
    loc_ans: str = ""
    m_loc: str = ""
    m_loc_q: str = ""
    m_loc_a: str = ""
    rel: str = ""
    rel_ans: str = ""
    rel_1: str = ""
    rel_2: str = ""
    rel_ans_1: str = ""
    rel_1_ans: str = ""
    rel_ans_2: str = ""
    rel_2_ans: str = ""
    m_rel: str = ""
    m_rel_ans: str = ""
    m_rel_1: str = ""
    m_rel_2: str = ""
    m_rel_ans_1: str = ""
    m_rel_1_ans: str = ""
    m_rel_ans_2: str = ""
    m_rel_2_ans: str = ""
    port_new: list[Hop] | None = None


def reliability_questions(record: Record, stem: str) -> list[tuple[str, str]]:
    """List a record's reliability questions and answers, in either spelling of the keys.

    Args:
        record: A record of the file.
        stem: "rel" (without image) or "m_rel" (with image).

    Returns:
        Pairs of question and answer. Pairs with an empty part are left out.
    """
    pairs = [(getattr(record, stem), getattr(record, f"{stem}_ans"))]
    for n in "12":
        answer = getattr(record, f"{stem}_ans_{n}") or getattr(record, f"{stem}_{n}_ans")
        pairs.append((getattr(record, f"{stem}_{n}"), answer))
    return [(question, answer) for question, answer in pairs if question and answer]


def case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert a record to a case.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The edit and its probes.

    Raises:
        InvalidInputError: If a portability item or an image name is invalid, or a missing image is
            an error.
        SkipRecord: If the target is empty, or `options.hop` is set and no question has that hop.
    """
    if not record.alt.strip():
        raise SkipRecord("the target is empty")
    edit = Query(
        context.clean_text(record.src),
        context.clean_text(record.alt),
        context.find_images(record.image),
    )
    probes = common_probes(record, edit, context)
    probes.pop("image_rephrase", None)  # I-Gen uses the questions below, not the paragraph
    image_questions = reliability_questions(record, "m_rel")

    def queries(pairs: list[tuple[str, str]], images: tuple[Any, ...]) -> tuple[Query, ...]:
        return tuple(Query(context.clean_text(q), context.clean_text(a), images) for q, a in pairs)

    if pairs := reliability_questions(record, "rel"):
        probes["text_reliability"] = queries(pairs, ())
    if image_questions:
        probes["image_reliability"] = queries(image_questions, edit.images)
    if image_questions and record.image_rephrase:
        own = record.image_rephrase_question
        pairs = [(own, image_questions[0][1])] if own else image_questions
        probes["image_rephrase"] = queries(pairs, context.find_images(record.image_rephrase))
    images_shown = context.find_images(record.one_hop_img) if record.one_hop_img else edit.images
    return Case(name, edit, {**probes, **portability(record.port_new, images_shown, context)})


def images(record: Record) -> Iterator[str]:
    """List the image names of a record.

    Args:
        record: A record of the file.

    Returns:
        Every name that is not empty, as written in the file.
    """
    named = (record.image, record.image_rephrase, record.one_hop_img, record.m_loc)
    return (one for one in named if one)


def anomalies(record: Record) -> Iterator[str]:
    """List the anomalies of a record for `errata data verify`. None is an error.

    Args:
        record: A record of the file.

    Yields:
        A short description of each.
    """
    if not record.pred:
        yield "pred is empty"
    if any(getattr(record, f"{s}_{n}_ans") for s in ("rel", "m_rel") for n in "12"):
        yield "answers are spelled rel_1_ans"
    if any(getattr(record, f"{s}_ans_{n}") for s in ("rel", "m_rel") for n in "12"):
        yield "answers are spelled rel_ans_1"
    if not reliability_questions(record, "m_rel"):
        yield "no image reliability question"


MMKE = Benchmark(
    "mmke",
    "MMKE-Bench",
    Record,
    case,
    images,
    lambda raw, path: "knowledge_type" in raw,
    anomalies,
)
