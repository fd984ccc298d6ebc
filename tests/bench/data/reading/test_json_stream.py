"""Records out of files: every outer shape of the benchmarks, and every way a file is broken."""

import json
import subprocess
import sys
import tracemalloc

import pytest

from errata.bench.data.reading.json_stream import records
from errata.functional.errors import InvalidInputError


@pytest.fixture
def write(tmp_path):
    def written(content, name="file.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


ROWS = [{"a": "x"}, {"a": "ü – “y”"}, {"a": '{["nested\\\\'}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4),
        json.dumps(ROWS, ensure_ascii=False),
        "\ufeff" + json.dumps(ROWS),
        "\n".join(map(json.dumps, ROWS)),
        "\r\n \r\n" + "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n",
        json.dumps({"a": [row["a"] for row in ROWS]}),
    ],
    ids=["one line", "indented", "not ascii", "bom", "json lines", "crlf lines", "columns"],
)
def test_every_outer_shape(write, text):
    assert list(records(write(text))) == ROWS


def test_empty_list(write):
    assert list(records(write(" [ ] \n"))) == []


def test_one_object_is_one_record(write):
    assert list(records(write('{"src": "x", "n": 1}'))) == [{"src": "x", "n": 1}]


def test_records_longer_than_a_chunk(write):
    long = [{"a": "x" * 3_000_000}, {"a": "y"}]
    assert list(records(write(json.dumps(long)))) == long


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"a": 1}, {"a": ', "record 1: not JSON"),
        ('[{"a": 1}', "the end of the file"),
        ('[{"a": 1} {"a": 2}]', "a comma or the end of the list must follow; got {"),
        ('[{"a": 1}, 7]', "record 1: must be an object in braces, got '7'"),
        ('[{"a": 1}] [', "text after the end"),
        ("7", "must hold a JSON list or objects; it starts with '7'"),
        ("", "it starts with ''"),
        ('[{"a": NaN}]', "finite, got NaN"),
        ('[{"a": "\\x"}]', "not JSON"),
        (b'[{"a": "\xff"}]', "must be UTF-8; byte 0xff"),
        ('{"q": ["a", "b"], "a": ["c"]}', "columns must have one length"),
        ('{"a": 1}\n[2]', "every line must be an object, got '\\['"),
        ('[{"a":' + "[" * 100_000, "nested too deep"),
    ],
)
def test_broken_files_are_named_with_their_place(write, content, words):
    path = write(content)
    with pytest.raises(InvalidInputError, match=words) as caught:
        list(records(path))
    assert str(path) in str(caught.value)


def test_records_before_the_break_are_had(write):
    stream = records(write('[{"a": 1},\n{"a": 2},\n{"a": '))
    assert [next(stream), next(stream)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(InvalidInputError, match="line 3, record 2"):
        next(stream)


def test_a_folder_or_nothing_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(InvalidInputError, match="there is no such file"):
            list(records(path))


def test_garbage_without_an_end_is_not_read_whole(write):
    path = write('[{"a": "' + "x" * 30_000_000)
    tracemalloc.start()
    with pytest.raises(InvalidInputError, match="not JSON"):
        list(records(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 110_000_000  # a window of at most 2 x 16 M characters, and its copy


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_fifty_thousand_records_stay_in_little_memory(tmp_path):
    path = tmp_path / "vqa_eval.json"
    record = {
        "src": "How many tennis balls are in the picture?",
        "pred": "no",
        "alt": "2",
        "rephrase": "What is the number of tennis balls?",
        "image": "val2014/a.jpg",
        "image_rephrase": "val2014_image_rephrase/a.png",
        "loc": "nq question: who",
        "loc_ans": "x",
        "m_loc": "val2014/b.jpg",
        "m_loc_q": "What sport?",
        "m_loc_a": "motocross",
    }
    one = json.dumps(record, indent=4)
    with path.open("w") as file:
        file.write("[" + one)
        for _ in range(49_999):
            file.write(",\n" + one)
        file.write("]")
    program = (
        "import re, sys\n"
        "from errata.bench.data.reading.benchmark import ReadOptions; from "
        "errata.bench.data.benchmarks.table import open_cases\n"
        "count = sum(1 for _ in open_cases(sys.argv[1], "
        "ReadOptions(missing_images='placeholder')))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(count, peak, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    count, kilobytes, torch = out
    assert (count, torch) == ("50000", "False")
    assert int(kilobytes) < 200_000  # of the whole process; measured: 30,000
