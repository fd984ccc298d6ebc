"""MMEdit and VLKEB: fields to probes, templates, and a record for every oddity of the files."""

import json
from collections import Counter

import msgspec
import pytest

from errata.bench.data.benchmarks import mmedit, vlkeb
from errata.bench.data.benchmarks.table import detect, open_cases
from errata.bench.data.reading.benchmark import TEMPLATES, ReadOptions
from errata.bench.data.reading.cleaning import clean_rephrase
from errata.functional.errors import InvalidInputError

VQA = {
    "src": "How many balls are there?",
    "pred": "no",
    "rephrase": "What is the number of balls?",
    "alt": "2",
    "image": "val2014/COCO_1.jpg",
    "image_rephrase": "val2014_image_rephrase/1.png",
    "loc": "nq question: who wrote it",
    "loc_ans": "Ann",
    "m_loc": "val2014/COCO_2.jpg",
    "m_loc_q": "What sport is this?",
    "m_loc_a": "motocross",
}
ENTITY = {
    **VQA,
    "src": "What city is this?",
    "pred": "Laredo,_Texas",
    "alt": "Kankakee",
    "image": "m.01/a.jpg",
    "image_rephrase": "m.01/b.jpg",
    "m_loc": "m.02/c.jpg",
    "loc": "who is it",
}
DRAW = ReadOptions(missing_images="placeholder")


@pytest.fixture
def write(tmp_path):
    def written(*records, name="vqa_eval.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records))
        return path

    return written


def read(path, **options):
    tally = Counter()
    found = list(open_cases(path, msgspec.structs.replace(DRAW, **options), tally))
    return found, tally


def test_a_record_becomes_the_papers_probes(write):
    (case,), _ = read(write(VQA))
    assert case.id == "vqa_eval/00000"
    assert (case.edit.prompt, case.edit.target) == ("How many balls are there?", "2")
    asked = {
        name: (one.prompt, one.target, [image.name for image in one.images])
        for name, (one,) in case.probes.items()
    }
    assert asked == {
        "rephrase": ("What is the number of balls?", "2", ["val2014/COCO_1.jpg"]),
        "image_rephrase": (VQA["src"], "2", ["val2014_image_rephrase/1.png"]),
        "text_locality": ("nq question: who wrote it", "Ann", []),
        "image_locality": ("What sport is this?", "motocross", ["val2014/COCO_2.jpg"]),
    }


@pytest.mark.parametrize(
    ("template", "edit", "rephrase", "text", "image"),
    [
        ("raw", "{}", "{}", "{}", "{}"),
        ("easyedit", "{}", "{}", "{}", "Question: {} Short answer:"),
        ("unike", "{}", "{}", "{}", "Question: {} Short answer: "),
        ("vlkeb", "{}", "{}", "{}", "{}"),
        ("liveedit", "{} The answer is:", "{} The answer is:", "{}?", "{} The answer is:"),
    ],
)
def test_templates_write_what_the_peers_write(write, template, edit, rephrase, text, image):
    (case,), _ = read(write(VQA), template=template)
    assert case.edit.prompt == edit.format(VQA["src"])
    assert case.probes["rephrase"][0].prompt == rephrase.format(VQA["rephrase"])
    assert case.probes["image_rephrase"][0].prompt == edit.format(VQA["src"])
    assert case.probes["text_locality"][0].prompt == text.format(VQA["loc"])
    assert case.probes["image_locality"][0].prompt == image.format(VQA["m_loc_q"])


def test_liveedit_leaves_captions_and_entities_alone(write):
    caption = {**VQA, "src": "a photo of", "alt": "A dog."}
    for record in (caption, ENTITY):
        (case,), _ = read(write(record), template="liveedit")
        assert case.edit.prompt == record["src"]
        assert case.probes["text_locality"][0].prompt == record["loc"] + "?"


def test_an_unknown_template_is_refused(write):
    with pytest.raises(InvalidInputError, match=f"one of {', '.join(TEMPLATES)}; got 'mine'"):
        read(write(VQA), template="mine")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (VQA, "mmedit-vqa"),
        ({**VQA, "src": "a photo of"}, "mmedit-caption"),
        (ENTITY, "vlkeb"),
        ({"questions": ["q"], "answers": ["a"]}, "nq-locality"),
        (
            {"question_id": 1, "question": "q", "answer": ["a"] * 10, "image": "x.jpg"},
            "okvqa-locality",
        ),
    ],
)
def test_benchmarks_are_told_by_their_records(write, record, name):
    assert detect(write(record)).name == name


def test_a_file_of_no_benchmark_is_refused_with_its_fields(write):
    with pytest.raises(
        InvalidInputError, match="no benchmark known here .*its first record has foo, bar"
    ):
        detect(write({"foo": 1, "bar": 2}))
    with pytest.raises(InvalidInputError, match="it has none"):
        detect(write())


@pytest.mark.parametrize(
    ("change", "oddity"),
    [
        ({"rephrase": '"What?'}, "rephrase starts with a quote"),
        ({"rephrase": 'What?"'}, "rephrase ends with a quote"),
        ({"rephrase": '"What?'}, "rephrase has a quote at one end only"),
        ({"rephrase": "I'm sorry, but I cannot see it."}, "rephrase is a refusal"),
        ({"rephrase": "Rewritten question: What?"}, "rephrase has a lead-in"),
        ({"rephrase": "What?\nWhich?"}, "rephrase has several lines"),
        ({"rephrase": '"how many balls are there?"'}, "rephrase equals the prompt"),
        ({"rephrase": "Tell the number."}, "rephrase has no question mark"),
        ({"alt": "No.", "pred": "no"}, "alt equals pred after normalizing"),
        ({"alt": "1:50"}, None),
        ({"alt": "1,132"}, "alt is a number"),
        ({"alt": " A dog. "}, "alt has white space at an end"),
        ({"alt": "a\nb"}, "alt has several lines"),
        ({"alt": "The_Dark_Knight_(film)"}, "alt has underscores"),
        ({"alt": "The_Dark_Knight_(film)"}, "alt has parentheses"),
        ({"alt": '"female_illusionist"'}, "alt is quoted"),
        ({"alt": "balls"}, "alt occurs in the prompt"),
        ({"pred": "Laredo,_Texas"}, "pred has underscores"),
        ({"loc_ans": "Žižek"}, "loc_ans is not ASCII"),
        ({"loc_ans": "x" * 1024}, "loc_ans is longer than 100 characters"),
        ({"loc_ans": "a\nb"}, "loc_ans has several lines"),
        ({"m_loc_a": "itâ€™s dusk"}, "m_loc_a looks like mojibake"),
        ({}, "loc starts with 'nq question: '"),
        ({}, "loc ends without a question mark"),
        ({}, "image_rephrase is .png, image is .jpg"),
    ],
)
def test_every_oddity_of_the_files_loads_and_is_counted(write, change, oddity):
    record = {**VQA, **change}
    (case,), tally = read(write(record))
    assert case.edit.target == record["alt"]  # raw, as the file has it
    assert case.probes["rephrase"][0].prompt == record["rephrase"]
    assert tally == {"records": 1}
    found = list(mmedit.anomalies(msgspec.convert(record, mmedit.Record)))
    assert oddity is None or oddity in found
    plain = list(mmedit.anomalies(msgspec.convert({**VQA, "alt": "two"}, mmedit.Record)))
    assert oddity is None or not change or oddity not in plain


def test_cleaning_is_asked_for_and_counted(write):
    path = write(
        {**VQA, "rephrase": '"What?'},
        {**VQA, "rephrase": "I'm sorry, I cannot."},
        {**VQA, "m_loc_a": "itâ€™s dusk"},
        {**VQA, "alt": " A dog.\n"},
    )
    found, tally = read(path, clean_rephrases=True, fix_encoding=True, strip_whitespace=True)
    assert found[0].probes["rephrase"][0].prompt == "What?"
    assert "rephrase" not in found[1].probes
    assert found[2].probes["image_locality"][0].target == "it’s dusk"
    assert found[3].edit.target == "A dog."
    assert tally["rephrase cleaned"] == 1
    assert tally["rephrase dropped: no question"] == 1
    assert tally["mojibake repaired"] == 1


@pytest.mark.parametrize(
    ("words", "clean"),
    [
        ('Which ball?"', "Which ball?"),
        ("1. Which ball?\n2. What ball?", "1. Which ball?"),
        ('"How many?" can be rewritten as: "What number?"', "What number?"),
        ("As an AI language model, I cannot.", ""),
        ("Which ball?", "Which ball?"),
    ],
)
def test_clean_rephrase(words, clean):
    assert clean_rephrase(words) == clean


def test_missing_fields_leave_their_probe_out_never_a_copy(write):
    record = {key: VQA[key] for key in ("src", "alt", "image")}
    (case,), _ = read(write(record))
    assert case.probes == {}
    (case,), _ = read(write({**VQA, "image_rephrase": "", "loc_ans": "", "m_loc": ""}))
    assert set(case.probes) == {"rephrase"}


def test_empty_targets_are_skipped_with_a_reason(write):
    found, tally = read(write(VQA, {**VQA, "alt": " "}, VQA))
    assert [case.id for case in found] == ["vqa_eval/00000", "vqa_eval/00002"]
    assert tally == {"records": 3, "skipped: the target is empty": 1}


@pytest.mark.parametrize(
    ("bad", "words", "reason"),
    [
        ({"alt": 2}, "Expected `str`, got `int` - at `$.alt`", "a field has the wrong type"),
        ({"src": None}, "Expected `str`, got `null`", "a field has the wrong type"),
        ({"image": "../../etc/passwd"}, "must be a relative path", "an image name leaves its root"),
        ({"alt": "\ud800"}, "lone surrogate", "a field cannot be used"),
    ],
)
def test_faulty_records_are_one_clear_error_or_a_counted_skip(write, bad, words, reason):
    path = write(VQA, {**VQA, **bad}, VQA)
    with pytest.raises(InvalidInputError) as caught:
        read(path)
    assert "record 1" in str(caught.value)
    assert words in str(caught.value)
    found, tally = read(path, invalid_records="skip")
    assert len(found) == 2
    assert tally[f"skipped: {reason}"] == 1


def test_a_missing_field_is_named(write):
    record = {key: value for key, value in VQA.items() if key != "alt"}
    path = write(VQA, record)
    with pytest.raises(InvalidInputError, match="record 1: .*missing required field `alt`"):
        read(path)
    assert read(path, invalid_records="skip")[1]["skipped: a field is missing"] == 1


@pytest.mark.parametrize("how", ["error", "skip", "none", "placeholder"])
def test_missing_images_do_as_asked(write, how):
    path = write(VQA)
    if how == "error":
        with pytest.raises(
            InvalidInputError, match="record 0: image 'val2014/COCO_1.jpg' is in none of"
        ):
            read(path, missing_images=how)
        return
    found, tally = read(path, missing_images=how)
    if how == "skip":
        assert found == []
        assert tally["skipped: an image is missing"] == 1
    elif how == "none":
        assert found[0].edit.images == ()
        assert tally["asked without its missing image"] == 3
    else:
        assert len(found[0].edit.images) == 1


def test_start_and_limit_keep_ids(write):
    found, tally = read(write(*[VQA] * 5), start=1, limit=3)
    assert [case.id[-1] for case in found] == ["1", "2", "3"]
    assert tally["records"] == 3


def test_unknown_fields_are_no_fault(write):
    assert len(read(write({**VQA, "type_self": 3, "original_gr": ["x"]}))[0]) == 1


# ------------------------------------------------------------------ VLKEB
HOPS = [
    {"port_type": f"{n}-hop", "Q&A": {"Question": f"q{n}", "Answer": f"a{n}"}} for n in (1, 2, 2, 4)
]
ONEHOP = [{"port_edit_q": "t?", "port_edit_a": "CT", "port_q": "zone?", "port_a": "CT"}]


def test_both_portability_schemas(write):
    found, _ = read(write({**ENTITY, "port_new": HOPS}, {**ENTITY, "port_new": ONEHOP}, ENTITY))
    hops = {k: [q.target for q in v] for k, v in found[0].probes.items() if "port" in k}
    assert hops == {
        "portability_1hop": ["a1"],
        "portability_2hop": ["a2", "a2"],
        "portability_4hop": ["a4"],
    }
    (one,) = found[1].probes["portability_1hop"]
    assert (one.prompt, one.target, one.images) == ("zone?", "CT", found[1].edit.images)
    assert not any("port" in name for name in found[2].probes)


def test_a_hop_keeps_only_records_that_have_it_and_says_how_many_it_dropped(write):
    path = write({**ENTITY, "port_new": HOPS}, {**ENTITY, "port_new": ONEHOP}, ENTITY)
    found, tally = read(path, hop=2)
    assert [case.id[-1] for case in found] == ["0"]
    assert tally["skipped: no 2-hop question"] == 2


def test_an_unknown_portability_schema_is_refused(write):
    with pytest.raises(InvalidInputError, match="must hold 'Q&A' or 'port_q'"):
        read(write({**ENTITY, "port_new": [{"question": "x"}]}))


def test_second_edit_of_the_one_hop_protocol():
    record = msgspec.convert({**ENTITY, "port_new": ONEHOP}, vlkeb.Record)
    query = vlkeb.second_edit(record)
    assert (query.prompt, query.target, query.images) == ("t?", "CT", ())
    with pytest.raises(InvalidInputError, match="must hold port_edit_q"):
        vlkeb.second_edit(msgspec.convert(ENTITY, vlkeb.Record))


def test_locality_files_become_cases(write):
    (nq,), _ = read(write({"questions": "nq question: who", "answers": "x"}))
    assert (nq.edit.prompt, nq.edit.images) == ("nq question: who", ())
    record = {
        "question_id": 1,
        "question": "q",
        "image": "x.jpg",
        "answer": ["a", "b", "b", "", "", "", "c"],
    }
    (okvqa,), _ = read(write(record))
    assert okvqa.edit.target == "b"  # the majority among answers that are not empty


def test_edit_one_hop_is_two_edits_and_then_the_question(write):
    path = write({**ENTITY, "port_new": ONEHOP}, {**ENTITY, "port_new": ONEHOP})
    found = list(open_cases(path, DRAW, benchmark="vlkeb-edit-onehop"))
    assert [case.id for case in found] == [
        "vqa_eval/00000",
        "vqa_eval/00000+hop",
        "vqa_eval/00001",
        "vqa_eval/00001+hop",
    ]
    first, second = found[:2]
    assert "portability_1hop" not in first.probes
    assert (second.edit.prompt, second.edit.images) == ("t?", ())
    (asked,) = second.probes["portability_1hop"]
    assert (asked.prompt, asked.images) == ("zone?", first.edit.images)
    with pytest.raises(InvalidInputError, match="record 0: port_new must hold port_edit_q"):
        list(open_cases(write(ENTITY), DRAW, benchmark="vlkeb-edit-onehop"))
