"""An annotation file through a whole run: stand-in images, a tiny BLIP-2, FT, every scorer."""

import json

import pytest

from errata.bench.cli.main import main
from errata.bench.storage.results_log import read_rows
from errata.functional.metrics.conventions import SCORERS

PROBES = ["reliability", "rephrase", "image_rephrase", "text_locality", "image_locality"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    records = [
        {
            "src": f"What is number {n}?",
            "pred": "no",
            "alt": answer,
            "rephrase": "Which one?",
            "image": f"val2014/{n}.jpg",
            "image_rephrase": f"val2014_image_rephrase/{n}.png",
            "loc": "nq question: who wrote it",
            "loc_ans": "a person",
            "m_loc": "val2014/9.jpg",
            "m_loc_q": "What sport is this?",
            "m_loc_a": "motocross",
        }
        for n, answer in enumerate(["a red ball", "12"])
    ]
    (home / "vqa_eval.json").write_text(json.dumps(records))
    (home / "run.toml").write_text(f"""
        output_dir = "{home / "out"}"
        scorers = {json.dumps(list(SCORERS))}
        save_deltas = false
        models = [{{ id = "tiny/blip2" }}]
        editors = [{{ type = "finetune", lr = 0.01, num_steps = 30 }}]
        [cases]
        source = "file"
        path = "{home / "vqa_eval.json"}"
        missing_images = "placeholder"
    """)
    assert main(["run", str(home / "run.toml")]) == 0
    assert (home / "out/report.html").is_file()
    return read_rows(home / "out")


def test_every_probe_of_every_record_under_every_scorer(rows):
    found = [(row.case, row.probe, row.scorer) for row in rows]
    assert sorted(found) == sorted(
        (f"vqa_eval/0000{n}", probe, scorer)
        for n in range(2)
        for probe in PROBES
        for scorer in SCORERS
    )


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
    # ten ranks over a whole row cannot be the share of one rank over an answer
    image = [scores["vqa_eval/00000", "image_locality", one] for one in ("errata", "easyedit")]
    assert image[0] != image[1]


def test_the_edit_takes_and_agreement_is_with_the_base(rows):
    edits = [row for row in rows if row.probe == "reliability"]
    assert all(row.score > row.base for row in edits)
    for row in rows:
        if row.scorer == "errata" and "locality" in row.probe:
            assert (row.score == 1.0) == (row.before.text == row.after.text)


# ------------------------------------------------------------------ MMKE-Bench
COMMON = {
    "src": "Describe the person in the picture.",
    "pred": "",
    "alt": "a tall red owl",
    "rephrase": "Who is it?",
    "loc": "nq question: who wrote it",
    "loc_ans": "a person",
    "m_loc": "loc/z.jpg",
    "m_loc_q": "What is it?",
    "m_loc_a": "a cat",
    "port_new": [{"port_type": "1-hop", "Q&A": {"Question": "Where?", "Answer": "in a town"}}],
}
MMKE = [
    {
        **COMMON,
        "knowledge_type": "entity_level",
        "image": "entity/x.jpg",
        "image_rephrase": "entity/y.jpg",
        "rel_1": "What is it?",
        "rel_ans_1": "an owl",
        "rel_2": "Which?",
        "rel_2_ans": "red",
        "m_rel_1": "Who?",
        "m_rel_1_ans": "an owl",
        "m_rel_2": "And?",
        "m_rel_ans_2": "red",
    },
    {
        **COMMON,
        "knowledge_type": "visual_knowledge",
        "alt": "an old far house",
        "image": "visual/x.jpg",
        "image_rephrase": "visual/y.jpg",
        "one_hop_img": "visual/h.jpg",
        "image_rephrase_question": "And here?",
        "rel": "Is it old?",
        "rel_ans": "old",
        "m_rel": "And this?",
        "m_rel_ans": "a house",
    },
]


def test_mmke_records_run_from_the_file_to_the_report(tmp_path):
    (tmp_path / "entity_eval.json").write_text(json.dumps(MMKE))
    (tmp_path / "run.toml").write_text(f"""
        output_dir = "{tmp_path / "out"}"
        scorers = ["mmke"]
        max_new_tokens = 4
        ppl_r_tokens = 4
        save_deltas = false
        models = [{{ id = "tiny/llava" }}]
        editors = [{{ type = "lora", num_steps = 12 }}]
        [cases]
        source = "file"
        path = "{tmp_path / "entity_eval.json"}"
        missing_images = "placeholder"
    """)
    assert main(["run", str(tmp_path / "run.toml")]) == 0
    rows = read_rows(tmp_path / "out")
    once = {"reliability", "rephrase", "text_locality", "image_locality", "portability_1hop"}
    twice = {"text_reliability", "image_reliability", "image_rephrase"}
    assert sorted((row.case[-1], row.probe, row.index) for row in rows) == sorted(
        [("0", probe, 0) for probe in once | twice]
        + [("0", probe, 1) for probe in twice]
        + [("1", probe, 0) for probe in once | twice]
    )
    for row in rows:
        assert row.before.generation is not None is not row.after.generation
        assert (row.generation_unchanged is not None) == ("locality" in row.probe)
        assert row.kl >= 0
        assert row.ppl_r is None or row.probe == "reliability"
    edits = [row for row in rows if row.probe == "reliability"]
    assert all(row.score > row.base and row.kl > 0.1 for row in edits)
    (leg,) = json.loads((tmp_path / "out/summary.json").read_text())["legs"]
    probes = leg["editors"][0]["probes"]
    assert set(probes) == once | twice
    assert {"score", "generation_match", "kl"} <= probes["image_locality"].keys()
    assert probes["reliability"]["ppl"]["mean"] < probes["reliability"]["ppl_before"]["mean"]
    assert (tmp_path / "out/report.html").is_file()
