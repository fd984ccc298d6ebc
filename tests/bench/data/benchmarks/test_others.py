"""MMKE-Bench, ADS-Edit, ComprehendEdit and KnowEdit: a record of our own for every oddity."""

import json
from collections import Counter

import msgspec
import pytest

from errata.bench.data.benchmarks import ads_edit, comprehendedit, knowedit, mmke
from errata.bench.data.benchmarks.table import detect, open_cases
from errata.bench.data.reading.benchmark import ReadOptions
from errata.functional.errors import InvalidInputError

COMMON = {
    "rephrase": "Describe it?",
    "loc": "nq question: who",
    "loc_ans": "Ann",
    "m_loc": "loc/z.jpg",
    "m_loc_q": "What is it?",
    "m_loc_a": "a cat",
}


@pytest.fixture
def write(tmp_path):
    def written(*records, name="eval.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records))
        return path

    return written


def read(path, **options):
    tally = Counter()
    return list(
        open_cases(path, ReadOptions(missing_images="placeholder", **options), tally)
    ), tally


def shown(query):
    return [image.name for image in query.images]


# ------------------------------------------------------------------ MMKE-Bench
HOP = [{"port_type": "1-hop", "Q&A": {"Question": "hop?", "Answer": "yes"}}]
ENTITY = {
    **COMMON,
    "knowledge_type": "entity_level",
    "src": "Describe.",
    "pred": "Old.",
    "alt": "New.",
    "image": "entity/x.jpg",
    "image_rephrase": "entity/y.jpg",
    "port_new": HOP,
    "rel_1": "q1",
    "rel_ans_1": "a1",
    "rel_2": "q2",
    "rel_2_ans": "a2",
    "m_rel_1": "m1",
    "m_rel_1_ans": "b1",
    "m_rel_2": "m2",
    "m_rel_ans_2": "b2",
}
VISUAL = {
    **COMMON,
    "knowledge_type": "visual_knowledge",
    "src": "Describe.",
    "pred": "",
    "alt": "New.",
    "image": "visual/x.jpg",
    "image_rephrase": "visual/y.jpg",
    "one_hop_img": "visual/h.jpg",
    "image_rephrase_question": "mr",
    "rel": "q",
    "rel_ans": "a",
    "m_rel": "m",
    "m_rel_ans": "b",
    "port_new": HOP,
}


def test_mmke_reliability_is_asked_with_and_without_the_image_in_both_spellings(write):
    (case,), _ = read(write(ENTITY))
    probes = case.probes
    assert [(q.prompt, q.target) for q in probes["text_reliability"]] == [
        ("q1", "a1"),
        ("q2", "a2"),
    ]
    assert [(q.prompt, q.target, *shown(q)) for q in probes["image_reliability"]] == [
        ("m1", "b1", "entity/x.jpg"),
        ("m2", "b2", "entity/x.jpg"),
    ]
    assert [(q.prompt, *shown(q)) for q in probes["image_rephrase"]] == [
        ("m1", "entity/y.jpg"),
        ("m2", "entity/y.jpg"),
    ]
    assert shown(probes["text_reliability"][0]) == []
    assert shown(probes["portability_1hop"][0]) == ["entity/x.jpg"]


def test_mmke_visual_has_its_own_questions_and_portability_image(write):
    (case,), _ = read(write(VISUAL))
    assert [q.prompt for q in case.probes["text_reliability"]] == ["q"]
    (other,) = case.probes["image_rephrase"]
    assert (other.prompt, other.target, *shown(other)) == ("mr", "b", "visual/y.jpg")
    assert shown(case.probes["portability_1hop"][0]) == ["visual/h.jpg"]


def test_mmke_without_second_image_or_hops(write):
    record = {k: v for k, v in ENTITY.items() if k not in ("image_rephrase", "port_new")}
    (case,), _ = read(write(record))
    assert {"image_rephrase", "portability_1hop"}.isdisjoint(case.probes)
    found, tally = read(write(record, ENTITY), hop=1)
    assert len(found) == tally["skipped: no 1-hop question"] == 1


def test_mmke_oddities(write):
    assert detect(write(ENTITY)).name == detect(write(VISUAL)).name == "mmke"
    odd = set(mmke.anomalies(msgspec.convert(ENTITY, mmke.Record)))
    assert odd == {"answers are spelled rel_1_ans", "answers are spelled rel_ans_1"}
    assert set(mmke.anomalies(msgspec.convert(VISUAL, mmke.Record))) == {"pred is empty"}


# ------------------------------------------------------------------ ADS-Edit
FRAMES = [f"frames/{n}.jpg" for n in range(5)]
VIEWS = {"CAM_FRONT": "../nuscenes/samples/f.jpg", "CAM_BACK": "../nuscenes/samples/b.jpg"}
SCENE = {**COMMON, "data_type": "perception", "source": "lingoqa", "src": "What?", "alt": "Stop."}


@pytest.mark.parametrize(
    ("kind", "image", "names"),
    [
        ("video", FRAMES, FRAMES),
        ("multi-image", VIEWS, ["nuscenes/samples/f.jpg", "nuscenes/samples/b.jpg"]),
        ("single-image", "test_3391.json", ["test_3391.json"]),
    ],
)
def test_ads_edit_images_change_type_with_the_scene(write, kind, image, names):
    record = {**SCENE, "image_type": kind, "image": image, "image_rephrase": image}
    path = write(record)
    assert detect(path).name == "ads-edit"
    (case,), _ = read(path)
    plain = [name.removeprefix("../") for name in shown(case.edit)]
    assert plain == names
    assert case.edit.video == (kind == "video")
    (other,) = case.probes["image_rephrase"]
    assert other.images != ()
    assert other.video == case.edit.video
    assert case.probes["image_locality"][0].video is False


def test_ads_edit_without_second_image_has_no_image_generality(write):
    (case,), _ = read(write({**SCENE, "image_type": "video", "image": FRAMES}))
    assert "image_rephrase" not in case.probes


def test_ads_edit_refuses_names_that_climb_after_their_start(write):
    path = write({**SCENE, "image_type": "video", "image": ["../nuscenes/../../etc/passwd"]})
    with pytest.raises(InvalidInputError, match="record 0: .*relative path"):
        read(path)


def test_ads_edit_unknown_type_and_oddities(write):
    with pytest.raises(InvalidInputError, match="image_type must be one of .*; got 'audio'"):
        read(write({**SCENE, "image_type": "audio", "image": "x"}))
    single = {**SCENE, "image_type": "single-image", "image": "a.json"}
    odd = set(ads_edit.anomalies(msgspec.convert(single, ads_edit.Record)))
    assert odd == {"single-image: image is a string", "image is named .json"}
    many = {**SCENE, "image_type": "multi-image", "image": VIEWS}
    assert "image is named ../" in set(ads_edit.anomalies(msgspec.convert(many, ads_edit.Record)))


# ------------------------------------------------------------------ ComprehendEdit
TASK = {
    "question": "How many?",
    "rephrase": "What number?",
    "answer": "3",
    "source": "TallyQA",
    "Category": "Counting",
    "image": "TallyQA/VG_100K/1.jpg",
    "pid": 7,
    "locality_prompt": "who is he",
    "locality_ground_truth": "Ann",
    "multimodal_locality_image": "val2014/2.jpg",
    "multimodal_locality_prompt": "What sport?",
    "multimodal_locality_ground_truth": "golf",
    "img_topk": [8, 9],
    "txt_topk": [9],
    "img_last_topk": [9, 8],
    "txt_last_topk": [],
    "ori_rt_img_topk": [3],
}


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("GQA", "Question: How many? Short answer:"),
        ("TextVQA", "Question: How many? Short answer:"),
        ("TallyQA", "Question: How many? Answer with a number. Short answer:"),
        (
            "VSR",
            "Question: Is this description true or false? Description: How many? Short answer:",
        ),
        ("MathVista", "How many? Short answer:"),
        ("new", "How many?"),
    ],
)
def test_comprehendedit_prompts_by_source(write, source, prompt):
    (case,), _ = read(write({**TASK, "source": source}))
    assert case.edit.prompt == prompt
    assert case.probes["rephrase"][0].prompt == prompt.replace("How many?", "What number?")


def test_comprehendedit_locality_is_the_answer_and_image_generality_is_absent(write):
    (case,), _ = read(write(TASK))
    assert case.probes["text_locality"][0].target == "Ann"  # not the question, as the authors have
    assert case.probes["image_locality"][0].target == "golf"
    assert "image_rephrase" not in case.probes
    assert read(write({**TASK, "answer": 3}))[0][0].edit.target == "3"


def test_comprehendedit_neighbours(write, tmp_path):
    others = [{**TASK, "pid": n, "question": f"q{n}", "answer": f"a{n}"} for n in (8, 9)]
    right = [{**TASK, "pid": 3, "question": "q3", "answer": "a3", "ori_pred_blip2": "own"}]
    write(*right, name="ComprehendEdit_ori_right.json")
    path = write(TASK, *others, name="ComprehendEdit_test.json")
    found, _ = read(path, num_neighbors=1, neighbor_answers="ori_pred_blip2")
    asked = {
        name: [(q.prompt.split()[1], q.target) for q in queries]
        for name, queries in found[0].probes.items()
        if name[:3] in ("kgi", "kpi")
    }
    assert asked == {
        "kgi_image_near": [("q8", "a8")],
        "kgi_text_near": [("q9", "a9")],
        "kgi_image_far": [("q8", "a8")],
        "kpi_image_near": [("q3", "own")],
    }


def test_comprehendedit_on_one_line_and_its_oddities(write):
    path = write(TASK)
    assert "\n" not in path.read_text()
    assert detect(path).name == "comprehendedit"
    record = {**TASK, "source": "x", "locality_ground_truth": "who is he", "img_topk": []}
    odd = set(comprehendedit.anomalies(msgspec.convert(record, comprehendedit.Record)))
    assert odd == {
        "source 'x' has no prompt of its own",
        "locality answer is its own question",
        "no neighbors",
    }


# ------------------------------------------------------------------ KnowEdit
FACT = {
    "subject": "Ann ",
    "prompt": "Where was Ann born?",
    "target_new": " Rome",
    "ground_truth": [["Paris", "Paname"], ["Lutetia"]],
    "rephrase_prompt": "Ann's birthplace?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "Ann's job?", "ground_truth": ["", ["poet", "writer", "poet"]]},
            {"prompt": "x", "ground_truth": []},
        ]
    },
    "portability": {
        "Reasoning": [{"prompt": "Which country?", "ground_truth": "Italy"}],
        "Logical_Generalization": [],
    },
    "context": ["Ann was born in Rome."] * 5,
}


def test_knowedit_aliases_kinds_and_no_random_draws(write):
    path = write(FACT)
    assert detect(path).name == "knowedit"
    (case,), tally = read(path)
    assert case.edit.target == " Rome"  # raw; `strip` would take the space away
    assert {name: [q.target for q in qs] for name, qs in case.probes.items()} == {
        "rephrase": [" Rome"],
        "text_locality_relation_specificity": ["poet"],
        "portability_reasoning": ["Italy"],
    }
    (asked,) = case.probes["text_locality_relation_specificity"]
    assert asked.aliases == ("writer",)
    assert case.edit.aliases == ()  # ground_truth is what was true before the edit
    assert tally["text_locality question without an answer left out"] == 1
    assert read(path)[0] == [case]


def test_knowedit_wikibio_field_names_and_missing_blocks(write):
    record = {"text": " This is a Wikipedia passage.", "labels": "He", "concept": "ann"}
    path = write(record)
    assert detect(path).name == "knowedit"
    (case,), _ = read(path)
    assert (case.edit.target, dict(case.probes)) == ("He", {})
    odd = set(knowedit.anomalies(msgspec.convert(record, knowedit.Record)))
    assert odd == {"text has white space at an end", "no locality", "no portability"}


def test_knowedit_oddities():
    odd = set(knowedit.anomalies(msgspec.convert(FACT, knowedit.Record)))
    assert odd == {
        "target has white space at an end",
        "subject has white space at an end",
        "ground_truth has several answers",
        "ground_truth is nested",
    }
    record = msgspec.structs.replace(
        msgspec.convert(FACT, knowedit.Record),
        ground_truth=" Rome",
        context=["Ann."],
        prompt="Où est né Ann?",
    )
    odd = set(knowedit.anomalies(record))
    assert {"target is a true answer already", "a context lacks the target", "not ASCII"} <= odd


def test_knowedit_empty_prompt_is_skipped(write):
    _, tally = read(write({**FACT, "prompt": ""}))
    assert tally["skipped: the prompt is empty"] == 1
