"""The files as their authors published them (../shared/data)."""

from collections import Counter
from pathlib import Path

import pytest

from errata.bench.data.benchmarks.table import open_cases
from errata.bench.data.reading.benchmark import ReadOptions
from errata.bench.data.verification import verify

DATA = Path(__file__).parents[4] / "shared" / "data"
MMEDIT, ENTITIES = DATA / "easy-edit-mm", DATA / "VLKEB"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no annotation files in ../shared/data")

FILES = [
    (MMEDIT / "vqa/vqa_eval.json", 2093, 4),
    (MMEDIT / "caption/caption_eval_edit.json", 1000, 4),
    (ENTITIES / "eval.json", 3174, 4),
    (ENTITIES / "eval_edit_onehop.json", 1278, 5),
    (MMEDIT / "locality/NQ dataset/validation.json", 4289, 0),
    (MMEDIT / "multimodal_locality/OK-VQA dataset/okvqa_loc.json", 5046, 0),
]


@pytest.mark.parametrize(("path", "count", "probes"), FILES, ids=lambda value: str(value)[-24:])
def test_every_record_loads_with_every_probe(path, count, probes):
    tally = Counter()
    ids, sizes = set(), Counter()
    for case in open_cases(path, ReadOptions(missing_images="placeholder"), tally):
        ids.add(case.id)
        sizes[len(case.probes)] += 1
    assert tally == {"records": count}
    assert sizes == {probes: count}
    assert len(ids) == count


# Counted on the files by other means, before there was a loader.
MEASURED = {
    "vqa_eval.json": {
        "rephrase starts with a quote": 562,
        "rephrase ends with a quote": 566,
        "rephrase has several lines": 13,
        "rephrase equals the prompt": 45,
        "alt equals pred after normalizing": 4,
        "alt is a number": 353,
        "same image and prompt as an earlier record": 1,
        "loc_ans is not ASCII": 45,
        "loc_ans is longer than 100 characters": 63,
        "m_loc is an edit's image elsewhere": 56,
        "loc starts with 'nq question: '": 2093,
        "loc ends without a question mark": 2093,
        "image_rephrase is .png, image is .jpg": 2093,
    },
    "caption_eval_edit.json": {
        "alt has white space at an end": 144,
        "alt has several lines": 2,
        "m_loc is an edit's image elsewhere": 28,
    },
    "eval.json": {
        "alt has underscores": 17,
        "alt has parentheses": 182,
        "loc_ans has several lines": 2,
        "rephrase has no question mark": 2,
    },
    "eval_edit_onehop.json": {"port_edit_a equals port_a": 1185, "alt occurs in port_q": 1},
}


@pytest.mark.parametrize("path", [path for path, *_ in FILES[:4]], ids=lambda path: path.name)
def test_oddities_are_counted_as_measured(path):
    (report,) = verify(path)
    measured = MEASURED[path.name]
    assert {name: report.anomalies.get(name) for name in measured} == measured
    if path.name == "vqa_eval.json":
        debris = ("rephrase is a refusal", "rephrase has a lead-in")
        assert sum(report.anomalies[name] for name in debris) == 23
    if path.name == "eval.json":
        assert report.images == 8178
