"""The kind `prompt`: what is refused of a file, and what its fields mean."""

from __future__ import annotations

import msgspec
import pytest
import torch

from errata import adapters
from errata.functional import Base, Delta, EditRecord, Header, Prompt, Query, bind, io
from errata.functional.errors import BadInput, DeltaFault
from errata.functional.fingerprint import fingerprint
from errata.functional.header import faults
from errata.functional.prompts import asked, filled


@pytest.fixture(scope="module")
def model():
    return adapters.adapt(*adapters.tiny("gpt2"))


def memory(model, demos=b"who? bo. ", ends=(5, 9), **fields) -> Delta:
    """One fact and two demonstrations, all keys alike."""
    tokens = f"{model.card.tokens}.weight"
    entry = Prompt(
        **{
            "name": tokens, "checkpoint": tokens, "shape": tuple(model.params[tokens].shape),
            "facts": ("it is bo. ",), "num_facts": 1, "owners": (0,), "encoder": "hashed:16",
            "width": 16, "k": 2, "num_demos": 2, "demo_bytes": len(demos), **fields,
        }
    )  # fmt: skip
    header = Header(
        base=Base(id=model.card.id, touched={tokens: fingerprint(model.params[tokens])}),
        entries=(entry,),
        edits=(EditRecord(id="a"),),
    )
    tensors = {
        "questions": torch.full((1, entry.width), 0.25),
        "demos": torch.frombuffer(bytearray(demos), dtype=torch.uint8),
        "ends": torch.tensor(ends),
        "demo_keys": torch.full((2, entry.width), 0.25),
    }
    return Delta(header, {f"{tokens}.{part}": tensor for part, tensor in tensors.items()})


def test_a_file_of_another_hand_is_applied_as_the_format_says(model, tmp_path):
    io.save(tmp_path / "x.safetensors", memory(model))
    bound = bind(model, io.load(tmp_path / "x.safetensors"))
    assert asked(bound, [Query("who?")])[0].prompt == "bo. who? it is bo. who?"


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
    with pytest.raises(DeltaFault, match=says):
        bind(model, memory(model, **wrong))


def test_everything_wrong_with_an_entry_is_listed(model):
    good = memory(model).header
    entry = msgspec.structs.replace(
        good.entries[0], facts=("a", "b"), ask="?", least=2.0, owners=(3,), encoder="a\nb"
    )
    found = " ".join(faults(msgspec.structs.replace(good, entries=(entry,))))
    for said in ("must be 1 facts, are 2", "`ask` must hold", "least and least_look must lie",
                 "owners must be facts from 0 to 0", "encoder must be printable"):  # fmt: skip
        assert said in found
    paths = msgspec.structs.replace(good.entries[0], encoder="sentence:/home/me/model")
    assert "no path" in " ".join(faults(msgspec.structs.replace(good, entries=(paths,))))


def test_an_encoder_of_another_width_is_refused(model):
    delta = memory(model)
    entry = msgspec.structs.replace(delta.header.entries[0], encoder="hashed:32")
    other = Delta(msgspec.structs.replace(delta.header, entries=(entry,)), delta.tensors)
    with pytest.raises(BadInput, match="must give keys of width 16"):
        bind(model, other).read([Query("who?")])


def test_memories_bound_one_on_another_both_speak(model):
    one = memory(model)
    other = memory(model, facts=("it is kim. ",), k=0)
    bound = bind(bind(model, one), other)
    assert asked(bound, [Query("who?")])[0].prompt.count("it is") == 2
    put = asked(bound, [Query("who?")])[0]
    assert torch.equal(bound.read([Query("who?")]).ids, model.read([put]).ids)


def test_places_in_a_template_are_filled_once():
    assert filled("{a} {b} {c}", {"a": "{b}", "b": "{a}"}) == "{b} {a} {c}"
