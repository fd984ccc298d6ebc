"""The kind `prompt`: what is refused of a file, and what its fields mean."""

from __future__ import annotations

import msgspec
import pytest
import torch

from errata import adapters
from errata.functional import BaseModel, Delta, EditRecord, Header, Query, bind
from errata.functional.deltas import serialization
from errata.functional.errors import DeltaFileError, InvalidInputError
from errata.functional.hashing import hash_parameter
from errata.functional.header import validate_header
from errata.functional.kinds.prompt.apply import expand_prompts
from errata.functional.kinds.prompt.memory import fill_template
from errata.functional.kinds.schema import Prompt


@pytest.fixture(scope="module")
def model():
    return adapters.from_module(*adapters.tiny_model("gpt2"))


def memory(model, demos=b"who? bo. ", ends=(5, 9), **fields) -> Delta:
    """One fact and two demonstrations, all keys alike."""
    tokens = f"{model.card.token_embedding}.weight"
    entry = Prompt(
        **{
            "name": tokens,
            "checkpoint_name": tokens,
            "shape": tuple(model.params[tokens].shape),
            "facts": ("it is bo. ",),
            "num_facts": 1,
            "edit_slots": (0,),
            "encoder": "hashed:16",
            "key_size": 16,
            "num_demonstrations": 2,
            "num_stored_demonstrations": 2,
            "demonstration_bytes": len(demos),
            **fields,
        }
    )
    header = Header(
        base=BaseModel(
            id=model.card.id, parameter_hashes={tokens: hash_parameter(model.params[tokens])}
        ),
        entries=(entry,),
        edits=(EditRecord(id="a"),),
    )
    tensors = {
        "question_keys": torch.full((1, entry.key_size), 0.25),
        "demonstrations": torch.frombuffer(bytearray(demos), dtype=torch.uint8),
        "demonstration_ends": torch.tensor(ends),
        "demonstration_keys": torch.full((2, entry.key_size), 0.25),
    }
    return Delta(header, {f"{tokens}.{part}": tensor for part, tensor in tensors.items()})


def test_a_file_of_another_hand_is_applied_as_the_format_says(model, tmp_path):
    serialization.save_delta(tmp_path / "x.safetensors", memory(model))
    bound = bind(model, serialization.load_delta(tmp_path / "x.safetensors"))
    assert expand_prompts(bound, [Query("who?")])[0].prompt == "bo. who? it is bo. who?"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ends": (9, 5)}, "the ends of demonstrations must rise up to 9"),
        ({"ends": (5, 8)}, "the ends of demonstrations must rise up to 9"),
        ({"ends": (-1, 9)}, "the ends of demonstrations must rise up to 9"),
        ({"demos": b"who? \xff\xfe. "}, "must be UTF-8 text"),
    ],
)
def test_demonstrations_that_are_none_are_refused(model, wrong, says):
    with pytest.raises(DeltaFileError, match=says):
        bind(model, memory(model, **wrong))


def test_everything_wrong_with_an_entry_is_listed(model):
    good = memory(model).header
    entry = msgspec.structs.replace(
        good.entries[0],
        facts=("a", "b"),
        question_template="?",
        min_similarity=2.0,
        edit_slots=(3,),
        encoder="a\nb",
    )
    found = " ".join(validate_header(msgspec.structs.replace(good, entries=(entry,))))
    for said in (
        "must be 1 facts, are 2",
        "`question_template` must hold",
        "min_similarity and min_image_similarity must lie",
        "edit_slots must be facts from 0 to 0",
        "encoder must be printable",
    ):
        assert said in found
    paths = msgspec.structs.replace(good.entries[0], encoder="sentence:/home/me/model")
    assert "no path" in " ".join(validate_header(msgspec.structs.replace(good, entries=(paths,))))


def test_an_encoder_of_another_width_is_refused(model):
    delta = memory(model)
    entry = msgspec.structs.replace(delta.header.entries[0], encoder="hashed:32")
    other = Delta(msgspec.structs.replace(delta.header, entries=(entry,)), delta.tensors)
    with pytest.raises(InvalidInputError, match="must give keys of width 16"):
        bind(model, other).preprocess([Query("who?")])


def test_memories_bound_one_on_another_both_speak(model):
    one = memory(model)
    other = memory(model, facts=("it is kim. ",), num_demonstrations=0)
    bound = bind(bind(model, one), other)
    assert expand_prompts(bound, [Query("who?")])[0].prompt.count("it is") == 2
    put = expand_prompts(bound, [Query("who?")])[0]
    assert torch.equal(
        bound.preprocess([Query("who?")]).input_ids, model.preprocess([put]).input_ids
    )


def test_places_in_a_template_are_filled_once():
    assert fill_template("{a} {b} {c}", {"a": "{b}", "b": "{a}"}) == "{b} {a} {c}"
