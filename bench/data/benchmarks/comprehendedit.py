"""ComprehendEdit: eight task categories, and what an edit does to its neighbours (KGI, KPI).

`ComprehendEdit_{train,test}.json` and `ComprehendEdit_ori_right.json`, each one line. There is no
second image, so image generality is absent (the authors' trainer repeats reliability there). Their
loader also scores text locality against its own question (`ComprehendEdit.py:117`); we read
`locality_ground_truth`. Prompts depend on the source dataset, whatever the template option says.

With `ReadOptions.num_neighbors = k` every edit of the test file is also asked its k nearest and
farthest neighbours by image and by text, as probes `kgi_image_near`, ..., `kpi_text_far`: KGI
over neighbours the model got wrong (gold answers), KPI over those it got right, from
`ComprehendEdit_ori_right.json` beside the file (its own answers, in the field
`ReadOptions.neighbor_answers`). Their `exact` under teacher forcing is what
`metrics.neighbor_match` counts, which divides by N k.
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
"""What each source's question is wrapped in (ComprehendEdit README and dataset code)."""


class Record(msgspec.Struct, frozen=True):
    """One question, its answer as the edit's target, and the numbers of its neighbours."""

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
    """A question in the words of its source; as it stands for a source we do not know."""
    return PROMPTS.get(record.source.lower(), "{}").replace("{}", question)


def case(record: Record, name: str, context: RecordContext) -> Case:
    """A record as a case."""
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
    """Records of a file by `pid`, or by place where there is none; what neighbours are named by."""
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
    """Every image name of a record."""
    return (one for one in (record.image, record.multimodal_locality_image) if one)


def anomalies(record: Record) -> Iterator[str]:
    """What `errata data verify` counts."""
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
