"""`errata data verify`: everything in one pass, for people and for machines."""

import json

import msgspec
import pytest
from PIL import Image

from errata.bench.cli.main import main
from errata.bench.data.verification import FileReport, format_report, verify
from errata.functional.errors import InvalidInputError

VQA = {
    "src": "How many?",
    "pred": "no",
    "rephrase": "What number?",
    "alt": "2",
    "image": "val2014/a.png",
    "image_rephrase": "val2014/b.png",
    "loc": "nq question: who",
    "loc_ans": "Ann",
    "m_loc": "val2014/c.png",
    "m_loc_q": "Sport?",
    "m_loc_a": "golf",
}


@pytest.fixture
def home(tmp_path):
    (tmp_path / "images/val2014").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (3, 3)).save(tmp_path / f"images/val2014/{name}.png")
    return tmp_path


def put(home, name, content):
    path = home / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_good_folder(home, capsys):
    put(home, "vqa_eval.json", [VQA, {**VQA, "src": "Which?"}])
    (report,) = verify(home)
    assert report.usable
    assert (report.records, report.cases, report.images, report.num_missing) == (2, 2, 3, 0)
    assert report.probes == dict.fromkeys(
        ["rephrase", "image_rephrase", "text_locality", "image_locality"], 2
    )
    assert report.notes == ["the published file has 2,093 records"]
    assert main(["data", "verify", str(home)]) == 0
    assert "MMEdit E-VQA: 2 records" in capsys.readouterr().out


def test_everything_wrong_at_once(home, capsys):
    put(
        home,
        "a.json",
        [
            VQA,
            VQA,
            {**VQA, "alt": "3"},
            {**VQA, "alt": ""},
            {**VQA, "alt": 4},
            {**VQA, "src": "x", "image": "../../etc/passwd"},
            {**VQA, "src": "y", "image": "gone.jpg"},
            {**VQA, "src": "z", "image": "val2014/c.png"},
        ],
    )
    put(home, "b.json", [{**VQA, "src": "another"}])
    put(home, "broken.json", '[{"src": ')
    put(home, "other.json", [{"foo": 1}])
    one, two, broken, other = verify(home)
    assert one.skipped == {"the target is empty": 1}
    assert one.num_faults == 2
    assert "record 4: Expected `str`, got `int`" in one.faults[0]
    assert "record 5: an image name must be a relative path" in one.faults[1]
    assert one.missing == ["gone.jpg"]
    assert one.anomalies["same image and prompt as an earlier record"] == 2
    assert one.anomalies["same image and prompt, another target"] == 1
    assert one.anomalies["m_loc is an edit's image elsewhere"] == 5
    assert two.notes == ["1 edit images are also in a.json"]
    assert "record 0: not JSON" in broken.faults[0]
    assert "no benchmark known here" in other.faults[0]
    assert [report.usable for report in (one, two, broken, other)] == [False, True, False, False]
    assert "not read" in format_report(broken)
    assert main(["data", "verify", str(home), "--json"]) == 1
    read = msgspec.json.decode(capsys.readouterr().out, type=list[FileReport])
    assert read == [one, two, broken, other]


def test_a_file_cut_short_reports_what_came_before(home):
    put(home, "a.json", json.dumps([VQA, VQA])[:-30])
    (report,) = verify(home / "a.json")
    assert (report.records, report.num_faults) == (1, 1)


def test_decoding_finds_broken_images(home):
    put(home, "a.json", [VQA])
    (home / "images/val2014/b.png").write_bytes(b"no image")
    assert verify(home)[0].usable
    (report,) = verify(home, decode=True)
    assert not report.usable
    assert "b.png' must be an image" in report.broken[0]


def test_nothing_to_check(tmp_path, capsys):
    with pytest.raises(InvalidInputError, match="must be an annotation file or a folder with some"):
        verify(tmp_path)
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "neither" in capsys.readouterr().err
