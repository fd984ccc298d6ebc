"""Delta files: round trips, reproducible bytes, refusals, atomic writing, bounded reading."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
import safetensors
import safetensors.torch
import torch

from errata.bench.robustness.samples import sample
from errata.functional import BaseModel, Delta, Header, load_delta, save_delta
from errata.functional.deltas.inspection import METADATA_KEY, inspect_delta
from errata.functional.deltas.safetensors_header import MAX_HEADER, MAX_VALUES, canonical_json
from errata.functional.deltas.serialization import digest
from errata.functional.deltas.stacking import stack
from errata.functional.errors import DeltaFileError, InvalidInputError
from errata.functional.kinds.schema import Dense, LowRank

ROOT = Path(__file__).parents[3]


def same(a: Delta, b: Delta) -> bool:
    return a.header == b.header and all(
        a.tensors[name].dtype == b.tensors[name].dtype
        and torch.equal(a.tensors[name], b.tensors[name])
        for name in a.tensors.keys() | b.tensors.keys()
    )


@pytest.mark.parametrize("seed", range(8))
def test_load_gives_back_what_was_saved(tmp_path, seed):
    delta = sample(seed)
    content = save_delta(tmp_path / "edit.safetensors", delta)
    got = load_delta(tmp_path / "edit.safetensors")
    assert same(got, delta)
    assert content == digest(got) == inspect_delta(tmp_path / "edit.safetensors").digest


def test_same_delta_same_bytes_whatever_the_order_and_the_strides(tmp_path):
    delta = sample(3)
    backwards = dict(reversed(list(delta.tensors.items())))
    strided = {name: x.t().contiguous().t() if x.ndim == 2 else x for name, x in backwards.items()}
    settings = dict(reversed(list(delta.header.settings.items())))
    other = Delta(msgspec.structs.replace(delta.header, settings=settings), strided)
    save_delta(tmp_path / "a", delta)
    save_delta(tmp_path / "b", other)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_same_bytes_in_another_process(tmp_path):
    save_delta(tmp_path / "a", sample(5))
    code = "import sys; from errata.bench.robustness.samples import sample; from errata.functional import save_delta; "  # noqa: E501
    code += "save_delta(sys.argv[1], sample(5))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_safetensors_library_reads_it_and_would_write_the_same_bytes(tmp_path):
    path = tmp_path / "edit.safetensors"
    save_delta(path, sample(1))
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert set(metadata) == {METADATA_KEY}
    safetensors.torch.save_file(tensors, tmp_path / "again", metadata)
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_the_description_is_what_python_calls_sorted_json(tmp_path):
    save_delta(tmp_path / "x", sample(2))
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        text = file.metadata()[METADATA_KEY]
    want = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert text == want


def test_the_digest_can_be_computed_from_the_format_page_alone(tmp_path):
    path = tmp_path / "x"
    save_delta(path, sample(4))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + size])
    body = json.loads(table.pop("__metadata__")["errata"])
    claimed, body["digest"] = body["digest"], ""
    state = hashlib.sha256((canonical_json(body) + "\n").encode())
    for name in sorted(table):
        start, stop = table[name]["data_offsets"]
        state.update(
            (canonical_json([name, table[name]["dtype"], table[name]["shape"]]) + "\n").encode()
        )
        state.update(raw[8 + size + start : 8 + size + stop])
    assert state.hexdigest() == claimed


def test_writing_to_a_loaded_tensor_never_reaches_the_file(tmp_path):
    save_delta(tmp_path / "x", sample(0))
    before = (tmp_path / "x").read_bytes()
    for tensor in load_delta(tmp_path / "x").tensors.values():
        tensor.zero_()
    assert (tmp_path / "x").read_bytes() == before
    assert same(load_delta(tmp_path / "x"), sample(0))


def test_an_empty_delta_is_a_file_too(tmp_path):
    empty = Delta(Header(base=BaseModel(id="a/model")), {})
    save_delta(tmp_path / "x", empty)
    assert same(load_delta(tmp_path / "x"), empty)


def test_every_bit_of_the_data_is_covered_by_the_digest(tmp_path):
    save_delta(tmp_path / "x", sample(0))
    raw = bytearray((tmp_path / "x").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(DeltaFileError, match="does not match its digest"):
        load_delta(tmp_path / "x")
    load_delta(tmp_path / "x", verify=False)


@pytest.mark.parametrize(
    ("change", "tensors", "fault"),
    [
        (
            {"entries": (Dense(name="../w", checkpoint_name="w", shape=(2,)),)},
            None,
            "dotted parameter name",
        ),
        (
            {"entries": (Dense(name="w", checkpoint_name="w", shape=(3,)),)},
            None,
            r"shape \[3\], has \[2\]",
        ),
        ({}, {}, "'w' is missing"),
        ({}, {"w": torch.ones(2), "v": torch.ones(2)}, "'v' belongs to no entry"),
        ({}, {"w": torch.tensor([1.0, float("nan")])}, "must be finite"),
        ({}, {"w": torch.ones(2, dtype=torch.int64)}, "is I64"),
        ({}, {"w": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        (
            {"settings": {"file": "/home/someone/net.safetensors"}},
            None,
            "settings.file must not hold",
        ),
        ({"settings": {"rate": float("nan")}}, None, "settings"),
        ({"settings": {"fn": print}}, None, "settings"),
        ({"base": BaseModel(id="/data/models/llava")}, None, "base.id must be a name"),
        ({"stack": 3}, None, "stack must be 0 or the number of edits"),
        ({"format": 1}, None, "the format must be 2"),
        ({"editor": "a\x00b"}, None, "editor must be printable"),
    ],
)
def test_save_refuses_what_load_would_refuse_and_leaves_the_old_file(
    tmp_path, change, tensors, fault
):
    header = Header(
        base=BaseModel(id="a/model"), entries=(Dense(name="w", checkpoint_name="w", shape=(2,)),)
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    bad = Delta(
        msgspec.structs.replace(header, **change),
        {"w": torch.ones(2)} if tensors is None else tensors,
    )
    with pytest.raises(DeltaFileError, match=fault) as error:
        save_delta(path, bad)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_all_faults_are_listed_at_once(tmp_path):
    entries = (
        Dense(name="a/b", checkpoint_name="w", shape=()),
        LowRank(name="v", checkpoint_name="v", shape=(2, 3), rank=2, edit_ranks=(1, 2)),
    )
    with pytest.raises(DeltaFileError) as error:
        save_delta(
            tmp_path / "x", Delta(Header(base=BaseModel(id="m"), entries=entries, stack=7), {})
        )
    assert all(
        part in str(error.value) for part in ("a/b", "positive sizes", "edit_ranks", "stack")
    )


@pytest.mark.parametrize("make", ["missing", "folder", "pipe", "empty", "pickle", "torch"])
def test_what_is_no_delta_is_refused_by_name(tmp_path, make):
    path = tmp_path / "x.pt"
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "empty":
        path.touch()
    elif make == "pickle":
        path.write_bytes(b"\x80\x04cposix\nsystem\nX\x05\x00\x00\x00falseR.")
    elif make == "torch":
        torch.save({"w": torch.ones(2)}, path)
    with pytest.raises((InvalidInputError, DeltaFileError), match="x.pt"):
        load_delta(path)


def test_no_write_permission_and_no_folder_are_one_sentence(tmp_path):
    with pytest.raises(InvalidInputError, match="No such file or directory"):
        save_delta(tmp_path / "nowhere" / "x", sample(0))
    (tmp_path / "taken").mkdir()
    with pytest.raises(InvalidInputError, match="must be a file or not exist yet"):
        save_delta(tmp_path / "taken", sample(0))
    assert os.listdir(tmp_path) == ["taken"]


def test_full_disk_is_a_clear_error_and_the_old_file_stays(tmp_path):
    path = tmp_path / "x"
    save_delta(path, sample(0))
    before = path.read_bytes()
    big = Delta(
        Header(
            base=BaseModel(id="a/model"),
            entries=(Dense(name="w", checkpoint_name="w", shape=(1 << 20,)),),
        ),
        {"w": torch.ones(1 << 20)},
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(InvalidInputError, match=os.strerror(errno.EFBIG)):
            save_delta(path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x"]


def test_device_without_space_names_the_reason(tmp_path, monkeypatch):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InvalidInputError, match=r"x could not be written \(No space left on device\)"
    ):
        save_delta(tmp_path / "x", sample(0))
    assert os.listdir(tmp_path) == []


def test_killed_while_saving_leaves_the_old_or_the_new(tmp_path):
    """A few kills; `python -m errata.bench.robustness.crash_writes` does it 50 times, fold and
    export too."""
    path = tmp_path / "x.safetensors"
    code = textwrap.dedent("""
        import sys
        from errata.bench.robustness.samples import sample
        from errata.functional import save_delta
        print("ready", flush=True)
        number = 0
        while True:
            save_delta(sys.argv[1], sample(number % 2))
            number += 1
    """)
    wanted = [sample(0), sample(1)]
    for pause in (0.0, 0.02, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        with child:
            child.stdout.readline()
            signal.sigtimedwait([], pause)
            child.kill()
        if path.exists():
            assert any(same(load_delta(path), delta) for delta in wanted)


def test_a_header_too_large_or_of_too_many_values_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1))
    with pytest.raises(DeltaFileError, match="at most"):
        load_delta(path)
    bomb = b'{"a":' + b"[" + b"0," * MAX_VALUES + b"0]}"
    path.write_bytes(len(bomb).to_bytes(8, "little") + bomb)
    with pytest.raises(DeltaFileError, match="more than"):
        load_delta(path)
    many = Header(base=BaseModel(id="m"), settings={"x": list(range(MAX_VALUES))})
    with pytest.raises(DeltaFileError, match="cannot be saved"):
        save_delta(path, Delta(many, {}))


def test_nothing_is_unpickled_anywhere_in_the_package():
    """But for checkpoints of `.bin` and `.pth`: torch.load(weights_only=True), tensors only."""
    words = (
        "pickle.load",
        "pickle.Unpickler",
        "torch.load(",
        "from pickle",
        "import dill",
        "import joblib",
        "marshal.loads",
        "allow_pickle=True",
        "weights_only=False",
        "trust_remote_code=True",
    )
    loaders = [
        ROOT / "adapters" / "families" / "minigpt4_convert.py",
        ROOT / "adapters" / "loading" / "checkpoint_files.py",
    ]
    found = [
        f"{file.relative_to(ROOT)}: {word}"
        for floor in ("kernels", "functional", "adapters", "editors", "bench")
        for file in (ROOT / floor).rglob("*.py")
        for word in words
        if word in file.read_text() and not (file in loaders and word == "torch.load(")
    ]
    assert not found, "\n".join(found)
    for file in loaders:
        calls = re.findall(r"^[^`\n]*torch\.load\((.*)\)", file.read_text(), re.MULTILINE)
        assert calls
        assert all("weights_only=True" in call for call in calls)


def test_reading_a_header_does_not_import_torch(tmp_path):
    save_delta(tmp_path / "x", sample(0))
    code = "import sys; from errata.functional.deltas.inspection import inspect_delta; inspect_delta(sys.argv[1]); "  # noqa: E501
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], cwd=ROOT).returncode == 0
    )


def test_stacked_deltas_are_files_too(tmp_path):
    one, two = sample(3), sample(3)
    two = two._replace(tensors={name: 2 * x for name, x in two.tensors.items()})
    pile = stack([one, two])
    save_delta(tmp_path / "x", pile)
    back = load_delta(tmp_path / "x")
    assert same(back, pile)
    assert all(torch.equal(back.tensors[name][1], 2 * x) for name, x in one.tensors.items())
