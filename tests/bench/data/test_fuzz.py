"""Mutated annotation files: a case, a counted skip or one `InvalidInputError`, never another
exception."""

import copy
import json
import random

import pytest

from errata.bench.data.benchmarks.table import BENCHMARKS
from errata.bench.data.reading.benchmark import ReadOptions, cases
from errata.functional.errors import InvalidInputError

SEEDS = {
    "mmedit-vqa": {
        "src": "q?",
        "alt": "a",
        "image": "i.jpg",
        "rephrase": "r?",
        "image_rephrase": "j.png",
        "loc": "l",
        "loc_ans": "m",
        "m_loc": "k.jpg",
        "m_loc_q": "q",
        "m_loc_a": "a",
        "pred": "p",
    },
    "vlkeb": {
        "src": "q?",
        "alt": "a",
        "image": "m.01/i.jpg",
        "port_new": [{"port_edit_q": "e", "port_edit_a": "f", "port_q": "g", "port_a": "h"}],
    },
    "mmke": {
        "knowledge_type": "entity_level",
        "src": "q",
        "alt": "a",
        "image": "e/x.jpg",
        "rel_1": "q",
        "rel_ans_1": "a",
        "m_rel_1": "m",
        "m_rel_1_ans": "b",
        "image_rephrase": "y.jpg",
        "port_new": [{"port_type": "1-hop", "Q&A": {"Question": "q", "Answer": "a"}}],
    },
    "ads-edit": {
        "image_type": "multi-image",
        "src": "q",
        "alt": "a",
        "rephrase": "r",
        "image": {"CAM": "../nuscenes/x.jpg"},
        "image_rephrase": ["a.jpg", "b.jpg"],
    },
    "comprehendedit": {
        "question": "q",
        "answer": "a",
        "image": "i.jpg",
        "source": "GQA",
        "Category": "c",
        "pid": 1,
        "img_topk": [1],
    },
    "knowedit": {
        "prompt": "p",
        "target_new": "t",
        "ground_truth": [["a"], ["b"]],
        "context": ["c"],
        "locality": {"R": [{"prompt": "x", "ground_truth": ["y"]}]},
        "portability": {"Z": [{"prompt": "x", "ground_truth": "y"}]},
    },
}
VALUES = [
    None,
    1,
    1.5,
    True,
    [],
    {},
    "",
    ["x"],
    {"x": 1},
    [None],
    [{"prompt": 1}],
    "../../etc",
    "\ud800",
    "/abs",
    "a\0b",
    10**400,
    "x" * 5000,
    {"Q&A": None},
    [{"Q&A": 3}],
    [{"port_q": None}],
]
BYTES = [
    b"null",
    b"[",
    b"]",
    b"{",
    b'"',
    b"\\",
    b",",
    b"\xff",
    b"\x00",
    b"NaN",
    b"9" * 400,
    b"1e999",
]


def places(value):
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys) if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutated(draw, record):
    if draw.random() < 0.5:
        changed = [copy.deepcopy(record)]
        for _ in range(draw.randint(1, 3)):
            if found := list(places(changed)):
                holder, key = draw.choice(found)
                holder[key] = copy.deepcopy(draw.choice(VALUES))
        return json.dumps(changed).encode()
    data = bytearray(json.dumps([record, record]).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        kind = draw.randrange(4)
        if kind == 0:
            data[at:at] = draw.choice(BYTES)
        elif kind == 1:
            del data[at : at + draw.randint(1, 9)]
        elif kind == 2:
            data[at] ^= 1 << draw.randrange(8)
        else:
            data = data[: at + 1]
        data = data or bytearray(b" ")
    return bytes(data)


@pytest.mark.parametrize("name", SEEDS)
def test_only_cases_skips_and_bad_input(tmp_path, name):
    draw = random.Random(name)
    path = tmp_path / "mutated.json"
    read, refusals = 0, []
    for _ in range(150):
        path.write_bytes(mutated(draw, SEEDS[name]))
        options = ReadOptions(
            missing_images=draw.choice(["placeholder", "none", "skip", "error"]),
            invalid_records=draw.choice(["error", "skip"]),
            clean_rephrases=draw.random() < 0.5,
            strip_whitespace=draw.random() < 0.5,
            fix_encoding=draw.random() < 0.5,
            num_neighbors=draw.randrange(2),
            hop=draw.randrange(2),
        )
        try:
            for case in cases(BENCHMARKS[name], path, options):
                assert case.edit.target.strip()
            read += 1
        except InvalidInputError as fault:
            refusals.append(str(fault))
    assert all(str(path) in words for words in refusals)
    assert min(read, len(refusals)) > 10  # both ends of the door were tried
