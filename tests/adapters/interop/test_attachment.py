"""A plain Hugging Face model under a delta computes what `bind` computes, and is left as it was."""

from __future__ import annotations

import msgspec
import pytest
import torch

from errata.adapters import from_module
from errata.adapters.families.table import tiny_families
from errata.adapters.interop.attachment import attach
from errata.adapters.zoo.tiny import tiny_model
from errata.functional import Delta, EditRecord, Header, bind, load_delta, save_delta
from errata.functional.deltas.records import base_identity
from errata.functional.deltas.stacking import stack
from errata.functional.errors import (
    BaseMismatchError,
    InvalidInputError,
    ShapeError,
    UnknownSiteError,
    UnsupportedKindError,
)
from errata.functional.kinds.schema import Dense, LowRank
from tests.adapters.zoo_of_families.deltas import case, logits, lowrank
from tests.adapters.zoo_of_families.models import roughen

FORMS = ("act", "act_fp32", "weight")
DTYPES = (torch.float32, torch.bfloat16)
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def state(module):
    """Every parameter by identity and version, and how many hooks each part has."""
    held = {name: (id(p), p._version) for name, p in module.named_parameters()}
    return held, [len(part._forward_hooks) for part in module.modules()]


@pytest.mark.parametrize("name", tiny_families())
@each_form
def test_attach_is_bind_on_every_family(name, form, tmp_path):
    module, model, inputs, kwargs = case(name)
    delta = lowrank(model, form)
    save_delta(tmp_path / "x", delta)
    untouched = logits(module, kwargs)
    before = state(module)  # Hugging Face hooks some parts at the first forward
    edited = bind(model, load_delta(tmp_path / "x"))
    want = edited.decode(edited.params, edited.embed(edited.params, inputs), logit_positions="all")
    with attach(module, load_delta(tmp_path / "x")):
        got = logits(module, kwargs)
    assert torch.equal(got[inputs.attention_mask], want[inputs.attention_mask])
    assert not torch.equal(got[inputs.attention_mask], untouched[inputs.attention_mask])
    assert state(module) == before
    assert torch.equal(logits(module, kwargs), untouched)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
@each_form
@each_dtype
def test_a_loaded_delta_gives_the_logits_of_the_saved_one(name, form, dtype, tmp_path):
    module, model, _, kwargs = case(name, dtype)
    delta = lowrank(model, form)
    save_delta(tmp_path / "x", delta)
    with attach(module, delta):
        want = logits(module, kwargs)
    with attach(module, load_delta(tmp_path / "x")):
        assert torch.equal(logits(module, kwargs), want)


def test_generate_runs_edited_and_detach_leaves_it_as_it_was():
    module, model, _, kwargs = case("llava")
    rows = {key: value for key, value in kwargs.items() if key != "labels"}
    plain = module.generate(**rows, max_new_tokens=4, do_sample=False)
    attached = attach(module, lowrank(model))
    edited = module.generate(**rows, max_new_tokens=4, do_sample=False)
    attached.detach()
    attached.detach()
    assert not torch.equal(edited, plain)
    assert torch.equal(module.generate(**rows, max_new_tokens=4, do_sample=False), plain)


def test_a_dense_change_of_a_tied_weight_acts_on_all_its_uses():
    module, model, inputs, kwargs = case("gpt2")
    name = "transformer.wte.weight"
    base = model.params[name]
    entry = Dense(name=name, checkpoint_name=name, shape=tuple(base.shape))
    delta = Delta(
        Header(base=base_identity(model, [name]), entries=(entry,)),
        {name: 0.1 * torch.randn_like(base)},
    )
    edited = bind(model, delta)
    want = edited.decode(edited.params, edited.embed(edited.params, inputs), logit_positions="all")
    with attach(module, delta):
        assert module.lm_head.weight is module.transformer.wte.weight
        assert torch.equal(
            logits(module, kwargs)[inputs.attention_mask], want[inputs.attention_mask]
        )
    assert module.lm_head.weight is module.transformer.wte.weight


def test_deltas_attach_one_on_another():
    module, model, _, kwargs = case("llava")
    one, two = lowrank(model, "weight", seed=1), lowrank(model, "act", seed=2)
    plain = logits(module, kwargs)
    before = state(module)
    with attach(module, one):
        once = logits(module, kwargs)
        with attach(module, two):
            assert not torch.equal(logits(module, kwargs), once)
        assert torch.equal(logits(module, kwargs), once)
    assert state(module) == before
    assert torch.equal(logits(module, kwargs), plain)


def test_detaching_in_another_order_is_refused_and_changes_nothing():
    module, model, _, _ = case("llava")
    before = state(module)
    first = attach(module, lowrank(model, "weight", seed=1))
    second = attach(module, lowrank(model, "weight", seed=2))
    edited = state(module)
    with pytest.raises(InvalidInputError, match="reverse order"):
        first.detach()
    assert state(module) == edited
    second.detach()
    first.detach()
    assert state(module) == before


def test_an_error_inside_still_detaches():
    module, model, _, _ = case("llava")
    before = state(module)
    with pytest.raises(RuntimeError, match="inside"), attach(module, lowrank(model, "weight")):
        raise RuntimeError("inside")
    assert state(module) == before


def test_what_does_not_fit_is_refused_before_anything_is_touched():
    module, model, _, _ = case("llava")
    before = state(module)
    good = lowrank(model)
    entry = good.header.entries[0]

    def with_entry(**change):
        entries = (msgspec.structs.replace(entry, **change), *good.header.entries[1:])
        return Delta(msgspec.structs.replace(good.header, entries=entries), good.tensors)

    other = msgspec.structs.replace(good.header.base, parameter_hashes={entry.name: "0" * 64})
    with pytest.raises(BaseMismatchError, match="other values"):
        attach(module, Delta(msgspec.structs.replace(good.header, base=other), good.tensors))
    alien = msgspec.structs.replace(good.header.base, family="blip-2")
    with pytest.raises(BaseMismatchError, match="blip-2"):
        attach(module, Delta(msgspec.structs.replace(good.header, base=alien), good.tensors))
    with pytest.raises(UnknownSiteError, match="near"):
        attach(module, with_entry(name=entry.name.replace("self_attn", "attention")))
    with pytest.raises(ShapeError, match="not"):
        attach(module, with_entry(shape=(1, 2)))
    with pytest.raises(UnsupportedKindError, match="stacked"):
        attach(module, stack([good, good]))
    assert state(module) == before


def test_pipeline_runs_edited():
    from transformers import pipeline

    module, tokenizer = tiny_model("llama", num_layers=2)
    roughen(module)
    talk = pipeline("text-generation", model=module, tokenizer=tokenizer, device="cpu")
    delta = lowrank(from_module(module, tokenizer))

    def say() -> str:
        return talk("the old town", max_new_tokens=6, do_sample=False)[0]["generated_text"]

    plain = say()
    with attach(module, delta):
        assert say() != plain
    assert say() == plain


def test_trainer_evaluates_edited(tmp_path):
    from transformers import Trainer, TrainingArguments

    module, tokenizer = tiny_model("llama", num_layers=2)
    roughen(module)
    ids = tokenizer("the old town of the capital")["input_ids"]
    rows = [{"input_ids": ids, "labels": ids}]
    options = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True
    )
    trainer = Trainer(module, options, eval_dataset=rows)
    model = from_module(module, tokenizer)
    plain = trainer.evaluate()["eval_loss"]
    with attach(module, lowrank(model)):
        edited = trainer.evaluate()["eval_loss"]
    assert abs(edited - plain) > 1e-2
    assert trainer.evaluate()["eval_loss"] == plain


def test_the_rows_of_many_edits_become_one_map_in_bind_and_attach_alike():
    """More rows than a map can have rank: their product is applied, and everything stays equal."""
    module, model, inputs, kwargs = case("llava")
    name = next(path for path in model.card.linear_shapes if path.startswith(model.card.layers))
    name += ".weight"
    out, inner = model.params[name].shape
    edits, generator = 3, torch.Generator().manual_seed(0)
    rank = edits * max(out, inner)
    entry = LowRank(
        name=name,
        checkpoint_name=name,
        shape=(out, inner),
        rank=rank,
        edit_ranks=(rank // edits,) * edits,
    )
    header = Header(
        base=base_identity(model, [name]),
        arithmetic="act_fp32",
        entries=(entry,),
        edits=tuple(EditRecord(id=str(n)) for n in range(edits)),
    )
    scale = 0.3 / rank**0.5
    tensors = {
        f"{name}.A": torch.randn(rank, inner, generator=generator) * scale,
        f"{name}.B": torch.randn(out, rank, generator=generator),
    }
    delta = Delta(header, tensors)
    edited = bind(model, delta)
    got = edited.decode(edited.params, edited.embed(edited.params, inputs), logit_positions="all")
    plain = {**model.params, name: model.params[name] + tensors[f"{name}.B"] @ tensors[f"{name}.A"]}
    want = model.decode(plain, model.embed(plain, inputs), logit_positions="all")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with attach(module, delta):
        assert torch.equal(
            logits(module, kwargs)[inputs.attention_mask], got[inputs.attention_mask]
        )
