"""Files of format 1, written by the first version: one per kind, and stacked ones."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from errata.functional import load_delta, save_delta
from errata.functional.deltas import format1
from errata.functional.deltas.inspection import METADATA_KEY, inspect_delta
from errata.functional.deltas.safetensors_header import canonical_json
from errata.functional.errors import DeltaFileError
from errata.functional.kinds.table import KINDS

FOLDER = Path(__file__).with_name("format1")
FILES = sorted(FOLDER.glob("*.safetensors"))
NAME = "model.language_model.layers.9.mlp.down_proj.weight"
COMMON = {
    "name": NAME,
    "checkpoint_name": NAME.replace("model.language_model", "language_model.model"),
}
EXPERTS = {
    "shape": (4, 6),
    "num_experts": 2,
    "rank": 2,
    "hidden_size": 4,
    "num_query_tokens": 2,
    "feature_dim": 4,
    "num_heads": 2,
    "num_sentinel_tokens": 2,
    "num_text_sentinel_tokens": 1,
    "edit_slots": (0, 1),
}
SCOPE = {
    "shape": (7, 4),
    "sizes": {
        "hidden_size": 4,
        "dim": 4,
        "num_heads": 2,
        "num_classifier_layers": 1,
        "num_counterfactual_layers": 2,
        "ffn_dim": 3,
        "key_dim": 2,
        "num_image_queries": 1,
    },
    "max_answer_tokens": 2,
    "max_prompt_tokens": 3,
}
WANTED = {
    "dense": {"shape": (4, 6)},
    "lowrank": {"shape": (4, 6), "rank": 3, "edit_ranks": (1, 2), "transposed": True},
    "lowrank-stacked": {"shape": (4, 6), "rank": 2, "edit_ranks": (), "transposed": False},
    "codebook": {
        "shape": (4, 6),
        "num_keys": 2,
        "edit_slots": (0, 1),
        "replacement": "prompt",
        "transposed": False,
    },
    "masked": {
        "shape": (4, 6),
        "num_values": (3, 3),
        "edit_slots": (1, 0),
        "gate_statistic": "easyedit",
        "activation": "relu",
        "transposed": False,
    },
    "experts": {**EXPERTS, "routing_input": "query_and_vision", "top_k": 1},
    "experts-query": {**EXPERTS, "routing_input": "query", "top_k": 0},
    "prompt": {
        "shape": (7, 4),
        "facts": ("fact <image> é\n", "b"),
        "num_facts": 2,
        "edit_slots": (0, 1),
        "question_template": "Q: {question}",
        "encoder": "hashed:8",
        "key_size": 8,
        "image_key_size": 4,
        "min_similarity": 0.25,
        "min_image_similarity": 0.5,
        "max_facts": 2,
        "num_demonstrations": 1,
        "demonstration_key": "fact",
        "demonstration_order": "nearest-first",
        "reserved_tokens": 5,
        "num_images": 1,
        "image_bytes": 16,
        "num_stored_demonstrations": 2,
        "demonstration_bytes": 9,
        "num_demonstration_images": 1,
        "demonstration_image_bytes": 7,
    },
    "scope": {**SCOPE, "num_slots": 2, "edit_slots": (0, 1), "gate": "soft", "threshold": 0.25},
    "scope-stacked": {
        **SCOPE,
        "num_slots": 1,
        "edit_slots": (0, 0),
        "gate": "hard",
        "threshold": 0.5,
    },
}
ORDER = {  # format 1's names of tensors of equal shapes, in the order of format 2's
    "experts": "vision_keys query_keys down up norm asked.norm asked.rows asked.value asked.bias "
    "seen.query seen.shift seen.key seen.value seen.bias query.norm query.rows query.value "
    "query.bias sentinel sentinel_text",
    "prompt": "questions pictures shown sizes demos ends demo_keys demo_shown demo_shown_ends "
    "demo_shows",
    "scope": "keys replies scenes prompts answers shrink bias roles looks look see read norms ask "
    "match near out classify.norms classify.attend classify.join classify.up classify.down "
    "say.norms say.attend say.join say.up say.down",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_stored_file_reads_as_the_same_delta(path, tmp_path):
    delta = load_delta(path)
    header = delta.header
    assert header.format == 2
    assert header.base.config_hash == "0" * 64
    assert header.base.parameter_hashes == {NAME: "1" * 64}
    assert header.settings == {"rate": 1e-4, "end": True, "layers": [1, 2, None], "note": "é"}
    (entry,) = header.entries
    fields = msgspec.to_builtins(entry)
    assert not any(fields.pop(name, ()) for name in ("shared_slots", "shared_ranks"))
    assert fields == {
        **msgspec.to_builtins(COMMON),
        **msgspec.to_builtins(WANTED[path.stem]),
        "type": path.stem.partition("-")[0],
    }
    anew = tmp_path / "anew.safetensors"
    save_delta(anew, delta)
    again = load_delta(anew)
    assert again.header == header
    assert again.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(again.tensors[name], x) for name, x in delta.tensors.items())
    assert inspect_delta(anew).stored is None
    assert json.loads(description(anew))["format"] == 2
    assert json.loads(description(path))["format"] == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_tensor_keeps_its_bytes_under_its_new_name(path):
    delta, stored = load_delta(path), safetensors.torch.load_file(path)
    kind = path.stem.partition("-")[0]
    order = ORDER[kind].split() if kind in ORDER else [n[len(NAME) + 1 :] for n in delta.tensors]
    old = [f"{NAME}.{part}" if part else NAME for part in order]
    assert len(old) == len(delta.tensors) == len(stored)
    for name, x in zip(old, delta.tensors.values()):
        assert torch.equal(stored[name], x), name


def test_arithmetic_and_order_are_read():
    assert load_delta(FOLDER / "lowrank.safetensors").header.arithmetic == "weight"
    assert load_delta(FOLDER / "lowrank.safetensors").header.order_dependent
    assert load_delta(FOLDER / "dense.safetensors").header.arithmetic == "act_fp32"
    assert load_delta(FOLDER / "scope-stacked.safetensors").header.stack == 2


def test_every_kind_has_a_stored_file_and_a_table():
    kinds = {entry.__struct_config__.tag for entry in KINDS}
    assert kinds == set(format1.KEYS)
    assert kinds == {path.stem.partition("-")[0] for path in FILES}


def description(path: Path) -> str:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()[METADATA_KEY]


def rewritten(path: Path, folder: Path, change) -> Path:
    """A copy of a stored file with a changed description, its digest left alone."""
    body = json.loads(description(path))
    change(body)
    out = folder / path.name
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, out, {METADATA_KEY: canonical_json(body)})
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(recursive=False), "does not match its digest"),
        (lambda body: body.update(arithmetic="act"), "has no arithmetic"),
        (lambda body: body["entries"][0].update(edit_ranks=[1, 2]), "has no edit_ranks"),
        (lambda body: body["base"].update(config_hash=""), "has no config_hash"),
        (lambda body: body["entries"][0].pop("checkpoint"), "checkpoint_name"),
        (lambda body: body["entries"][0].update(type="neurons"), "neurons"),
        (lambda body: body.update(entries=[3]), "does not fit"),
        (lambda body: body.update(entries={}), "does not fit"),
        (lambda body: body.update(base=[]), "does not fit"),
        (lambda body: body.update(format=True), "of format"),
        (lambda body: body.update(format=1.0), "of format"),
        (lambda body: body.update(format=3), "reads formats 1 and 2"),
    ],
)
def test_a_broken_file_of_format_1_is_refused(change, message, tmp_path):
    path = rewritten(FOLDER / "lowrank.safetensors", tmp_path, change)
    with pytest.raises(DeltaFileError, match=message):
        load_delta(path)


def test_a_file_of_format_2_has_no_old_keys(tmp_path):
    path = rewritten(FOLDER / "lowrank.safetensors", tmp_path, lambda body: body.update(format=2))
    with pytest.raises(DeltaFileError, match="does not fit"):
        load_delta(path)


def test_changed_bytes_of_a_file_of_format_1_are_noticed(tmp_path):
    raw = bytearray((FOLDER / "scope.safetensors").read_bytes())
    raw[-1] ^= 1
    path = tmp_path / "changed.safetensors"
    path.write_bytes(raw)
    with pytest.raises(DeltaFileError, match="does not match its digest"):
        load_delta(path)
