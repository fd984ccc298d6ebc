"""ComprehendEdit: eight task categories, and the effect of an edit on its neighbors (KGI, KPI).

`ComprehendEdit_{train,test}.json` and `ComprehendEdit_ori_right.json` have one line each. There is
no second image, so image generality is absent (the authors' trainer repeats reliability instead).
Their loader also scores text locality against its own question (`ComprehendEdit.py:117`). We read
`locality_ground_truth`. The template option does not affect the edit's prompts: they depend on the
source dataset.

`ReadOptions.num_neighbors = k` adds probes of each edit's k nearest and k farthest neighbors by
image and by text, named `kgi_image_near`, ..., `kpi_text_far`. KGI uses neighbors that the model
answered wrongly, with the gold answers. KPI uses neighbors that it answered correctly, from
`ComprehendEdit_ori_right.json` in the same folder, with the answers in the field
`ReadOptions.neighbor_answers`. `metrics.neighbor_match` counts their `exact` under teacher forcing
and divides by N k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from errata.bench.data.reading.benchmark import Benchmark, RecordContext, SkipRecord
from errata.bench.data.reading.json_stream import records
from errata.functional.queries import Case, Query

__all__ = ["COMPREHENDEDIT", "PROMPTS", "Record", "anomalies", "case"]

PROMPTS: Mapping[str, str] = {
    "gqa": "Question: {} Short answer:",
    "textvqa": "Question: {} Short answer:",
    "tallyqa": "Question: {} Answer with a number. Short answer:",
    "vsr": "Question: Is this description true or false? Description: {} Short answer:",
    "mathvista": "{} Short answer:",
}
"""Source dataset to its prompt (from ComprehendEdit's README and dataset code)."""


class Record(msgspec.Struct, frozen=True):
    """One question, whose answer is the edit's target, and the numbers of its neighbors."""

    question: str
    answer: str | int | float
    image: str
    rephrase: str = ""
    source: str = ""
    Category: str = ""
    pid: int = -1
    locality_prompt: str = ""
    locality_ground_truth: str | list[str] = ""
    multimodal_locality_image: str = ""
    multimodal_locality_prompt: str = ""
    multimodal_locality_ground_truth: str | list[str] = ""
    img_topk: list[int] = []
    txt_topk: list[int] = []
    img_last_topk: list[int] = []
    txt_last_topk: list[int] = []
    ori_rt_img_topk: list[int] = []
    ori_rt_txt_topk: list[int] = []
    ori_rt_img_last_topk: list[int] = []
    ori_rt_txt_last_topk: list[int] = []


def source_prompt(record: Record, question: str) -> str:
    """Wrap a question in the prompt of its source dataset.

    Args:
        record: The record, whose `source` names the dataset.
        question: The question.

    Returns:
        The prompt. The question itself if the source has no entry in `PROMPTS`.
    """
    return PROMPTS.get(record.source.lower(), "{}").replace("{}", question)


def case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert a record to a case.

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
    answer = str(record.answer)
    if not answer.strip():
        raise SkipRecord("the target is empty")
    edit = Query(
        source_prompt(record, context.clean_text(record.question)),
        context.clean_text(answer),
        context.find_images(record.image),
    )
    probes: dict[str, tuple[Query, ...]] = {}
    if rephrased := context.rephrased_prompt(record.rephrase):
        probes["rephrase"] = (edit._replace(prompt=source_prompt(record, rephrased)),)
    if record.locality_prompt and (truth := _first_answer(record.locality_ground_truth)):
        words = context.wrap_prompt("text_loc", record.locality_prompt)
        probes["text_locality"] = (Query(words, context.clean_text(truth)),)
    truth = _first_answer(record.multimodal_locality_ground_truth)
    if record.multimodal_locality_prompt and truth and record.multimodal_locality_image:
        words = context.wrap_prompt("image_loc", record.multimodal_locality_prompt)
        images = context.find_images(record.multimodal_locality_image)
        probes["image_locality"] = (Query(words, context.clean_text(truth), images),)
    return Case(name, edit, {**probes, **_neighbor_probes(record, context)})


def _first_answer(answers: str | list[str]) -> str:
    return answers if isinstance(answers, str) else next((one for one in answers if one), "")


class _Neighbor(msgspec.Struct, frozen=True):
    question: str
    image: str
    source: str
    answers: Mapping[str, str]


@lru_cache(maxsize=4)
def _records_by_pid(path: Path) -> Mapping[int, _Neighbor]:
    """Map each record's `pid`, or its index if it has none, to the fields of a neighbor query."""
    found = {}
    for place, raw in enumerate(records(path)):
        answers = {k: str(v) for k, v in raw.items() if k == "answer" or k.startswith("ori_pred")}
        question, image, origin = (str(raw.get(n, "")) for n in ("question", "image", "source"))
        found[int(raw.get("pid", place))] = _Neighbor(question, image, origin, answers)
    return found


_NEIGHBOR_FIELDS = {
    "image_near": "img_topk",
    "text_near": "txt_topk",
    "image_far": "img_last_topk",
    "text_far": "txt_last_topk",
}


def _neighbor_probes(record: Record, context: RecordContext) -> dict[str, tuple[Query, ...]]:
    probes: dict[str, tuple[Query, ...]] = {}
    k = context.options.num_neighbors
    if not k:
        return probes
    right = context.path.with_name("ComprehendEdit_ori_right.json")
    for stem, prefix, file, field in (
        ("kgi", "", context.path, "answer"),
        ("kpi", "ori_rt_", right, context.options.neighbor_answers),
    ):
        for name, attribute in _NEIGHBOR_FIELDS.items():
            pids = getattr(record, prefix + attribute)
            if not pids:
                continue
            chosen = pids[-k:] if "far" in name else pids[:k]
            queries = (_neighbor_query(pid, file, field, context) for pid in chosen)
            probes[f"{stem}_{name}"] = tuple(one for one in queries if one)
    return {name: queries for name, queries in probes.items() if queries}


def _neighbor_query(pid: int, file: Path, field: str, context: RecordContext) -> Query | None:
    one = _records_by_pid(file).get(pid)
    if one is None or not one.answers.get(field, "").strip():
        context.skip_counts["neighbor not found or without an answer"] += 1
        return None
    words = PROMPTS.get(one.source.lower(), "{}").replace("{}", one.question)
    return Query(words, one.answers[field].strip(), context.find_images(one.image))


def images(record: Record) -> Iterator[str]:
    """List the image names of a record.

    Args:
        record: A record of the file.

    Returns:
        Every name that is not empty, as written in the file.
    """
    return (one for one in (record.image, record.multimodal_locality_image) if one)


def anomalies(record: Record) -> Iterator[str]:
    """List the anomalies of a record for `errata data verify`. None is an error.

    Args:
        record: A record of the file.

    Yields:
        A short description of each.
    """
    if record.source.lower() not in PROMPTS:
        yield f"source {record.source!r} has no prompt of its own"
    if not isinstance(record.answer, str):
        yield "answer is a number"
    if record.locality_ground_truth == record.locality_prompt:
        yield "locality answer is its own question"
    if not record.img_topk:
        yield "no neighbors"
    if record.pid < 0:
        yield "no pid"


COMPREHENDEDIT = Benchmark(
    "comprehendedit",
    "ComprehendEdit",
    Record,
    case,
    images,
    lambda raw, path: {"question", "answer", "Category"} <= raw.keys(),
    anomalies,
)
