"""An annotation file through a whole run: stand-in images, a tiny BLIP-2, FT, every scorer."""

import json

import pytest

from errata.bench.cli import main
from errata.bench.ledger import read_rows
from errata.functional.metrics import SCORERS

PROBES = ["reliability", "rephrase", "image_rephrase", "text_locality", "image_locality"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    records = [
        {
            "src": f"What is number {n}?", "pred": "no", "alt": answer, "rephrase": "Which one?",
            "image": f"val2014/{n}.jpg", "image_rephrase": f"val2014_image_rephrase/{n}.png",
            "loc": "nq question: who wrote it", "loc_ans": "a person", "m_loc": "val2014/9.jpg",
            "m_loc_q": "What sport is this?", "m_loc_a": "motocross",
        }
        for n, answer in enumerate(["a red ball", "12"])
    ]  # fmt: skip
    (home / "vqa_eval.json").write_text(json.dumps(records))
    (home / "run.toml").write_text(f"""
        out = "{home / "out"}"
        scorers = {json.dumps(list(SCORERS))}
        deltas = false
        cases = {{ source = "file", path = "{home / "vqa_eval.json"}", on_missing = "draw" }}
        models = [{{ id = "tiny/blip2" }}]
        editors = [{{ type = "finetune", lr = 0.01, num_steps = 30 }}]
    """)
    assert main(["run", str(home / "run.toml")]) == 0
    assert (home / "out/report.html").is_file()
    return read_rows(home / "out")


def test_every_probe_of_every_record_under_every_scorer(rows):
    found = [(row.case, row.probe, row.scorer) for row in rows]
    assert sorted(found) == sorted(
        (f"vqa_eval/0000{n}", probe, scorer)
        for n in range(2) for probe in PROBES for scorer in SCORERS
    )  # fmt: skip


def test_scorers_agree_on_success_and_differ_on_locality(rows):
    scores = {(row.case, row.probe, row.scorer): row.score for row in rows}
    for n in range(2):
        case = f"vqa_eval/0000{n}"
        for probe in PROBES:
            mine = {scorer: scores[case, probe, scorer] for scorer in SCORERS}
            assert mine["errata"] == mine["liveedit"] == mine["ice"]
            assert mine["easyedit"] == mine["vlkeb"] == mine["mmke"]
            if "locality" not in probe:
                assert len(set(mine.values())) == 1
    # ten ranks over a whole row can not be the share of one rank over an answer
    image = [scores["vqa_eval/00000", "image_locality", one] for one in ("errata", "easyedit")]
    assert image[0] != image[1]


def test_the_edit_takes_and_agreement_is_with_the_base(rows):
    edits = [row for row in rows if row.probe == "reliability"]
    assert all(row.score > row.base for row in edits)
    for row in rows:
        if row.scorer == "errata" and "locality" in row.probe:
            assert (row.score == 1.0) == (row.before.text == row.after.text)
