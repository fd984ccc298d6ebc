"""Files of trained weights and of trainings."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from errata.editors.common.checkpoint import (
    WEIGHTS,
    load_checkpoint,
    save_checkpoint,
    signed_text,
)
from errata.functional.errors import InvalidInputError


def test_tensors_come_back_in_their_strides(tmp_path):
    """A product of a transposed tensor rounds differently: a resumed training would differ."""
    tree = {"map": torch.randn(8, 8).mT, "row": torch.randn(4)}
    save_checkpoint(tmp_path / "w", tree, {"editor": "x"})
    fresh = {"map": torch.zeros(8, 8).mT, "row": torch.zeros(4)}
    got = load_checkpoint(tmp_path / "w", fresh, {"editor": "x"})
    assert torch.equal(got["map"], tree["map"])
    assert got["map"].stride() == (1, 8)
    x = torch.randn(3, 8)
    assert torch.equal(x @ got["map"], x @ tree["map"])


def metadata(path) -> dict[str, str]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def test_the_format_is_written_and_another_is_refused(tmp_path):
    save_checkpoint(tmp_path / "w", {"a": torch.ones(2)}, {"editor": "x"})
    about = json.loads(metadata(tmp_path / "w")["errata.weights"])
    assert about.pop("digest")
    assert about == {"editor": "x", "format": 2}
    tensors = load_file(tmp_path / "w")
    save_file(tensors, tmp_path / "v", {"errata.weights": signed_text({"editor": "x"}, tensors)})
    with pytest.raises(InvalidInputError, match="its format is None, must be 2"):
        load_checkpoint(tmp_path / "v", {"a": torch.ones(2)}, {"editor": "x"})


def test_changed_values_are_noticed(tmp_path):
    save_checkpoint(tmp_path / "w", {"a": torch.ones(2)}, {"editor": "x"})
    raw = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(InvalidInputError, match="does not match its digest"):
        load_checkpoint(tmp_path / "w", {"a": torch.ones(2)}, {"editor": "x"})


def test_weights_of_the_first_version_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w", {"errata.state": '{"editor":"x"}'})
    with pytest.raises(InvalidInputError, match="made by errata before 0.1.*train it again"):
        load_checkpoint(tmp_path / "w", {"a": torch.ones(2)}, {"editor": "x"})


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_weights_are_of_this_format(path):
    assert json.loads(metadata(path)["errata.weights"])["format"] == 2
