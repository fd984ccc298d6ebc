"""What WISE's side memories do: masks, gates, sequences, merges, and their kind of delta."""

from __future__ import annotations

import functools

import msgspec
import pytest
import torch
from PIL import Image

from errata import adapters
from errata.bench.storage.checkpoint import SequenceCheckpoint, load_checkpoint, save_checkpoint
from errata.editors import configure, make_editor
from errata.editors.wise import WiseConfig
from errata.editors.wise.config import PRESETS
from errata.editors.wise.editor import wise_editor
from errata.editors.wise.training import sample_mask
from errata.functional import Delta, Model, Query, bind, merge, remove, scale
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import (
    InvalidInputError,
    InvalidSettingsError,
    UnknownSiteError,
    UnsupportedKindError,
)
from errata.functional.gradients.losses import nll
from errata.functional.header import validate_header
from errata.functional.kinds.masked.bitmask import pack_bits, unpack_bits

QUICK = WiseConfig(
    layer=1,
    mask_ratio=0.5,
    num_steps=3,
    lr=0.2,
    alpha=0.5,
    beta=2.0,
    gamma=1.0,
    num_unrelated=1,
    act_ratio=0.999,
)


def quick(**settings) -> WiseConfig:
    return msgspec.structs.replace(QUICK, **settings)


@functools.cache
def tiny(name: str) -> Model:
    return adapters.from_module(*adapters.tiny_model(name))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked(model: Model) -> list[Query]:
    shown = [(Image.new("RGB", (32, 32), (s, 255 - s, 40)),) for s in (10, 120, 230)]
    shown = shown if model.card.takes_images else [(), (), ()]
    words = [("who is it?", "bo"), ("where does it live now?", "in a town"), ("what?", "owl")]
    return [Query(prompt, target, images) for (prompt, target), images in zip(words, shown)]


def embedded(model: Model, queries: list[Query], edit: torch.Tensor | None = None):
    return model.embed(model.params, model.preprocess(queries), edit_index=edit)


def logits(model: Model, queries: list[Query], edit: torch.Tensor | None = None) -> torch.Tensor:
    return model.decode(model.params, embedded(model, queries, edit))


def losses(model: Model, queries: list[Query]) -> torch.Tensor:
    batch = embedded(model, queries)
    return nll(model.decode(model.params, batch), batch.labels)


def one_by_one(model: Model, config: WiseConfig, queries: list[Query]) -> Delta:
    editor = make_editor(config)
    state = editor.init(model, seeded())
    for query in queries:
        delta, state = editor.edit(model, state, [query])
    return delta


def routes(model: Model, delta: Delta, queries: list[Query]) -> list[int]:
    """Which memory each row takes: what is kept from the prompt for later tokens."""
    edited = bind(model, delta)
    count = model.card.num_layers
    _, past = edited.decode(edited.params, embedded(edited, queries), stop=count, return_cache=True)
    return next(
        v
        for k, v in past.routing.items()
        if k.startswith(f"{delta.header.entries[0].name}.masked.0.")
    ).tolist()


# ------------------------------------------------------------------ masks and what is unrelated


@pytest.mark.parametrize(("size", "ratio"), [((7, 9), 0.2), ((600, 3), 0.5), ((1, 5), 1.0)])
def test_a_mask_has_its_ratio_exactly(size, ratio):
    mask = sample_mask(size, ratio, seeded()).view(size)
    assert int(mask.sum()) == round(ratio * size[0] * size[1])
    assert mask.sum(1).max() - mask.sum(1).min() <= 1
    assert torch.equal(unpack_bits(pack_bits(mask.flatten()), mask.numel()), mask.flatten())


def test_an_edit_does_not_depend_on_its_company():
    model, editor = tiny("llava"), make_editor(QUICK)
    queries, state = asked(model), editor.init(model, seeded())
    forth = unstack(editor.edit_each(model, state, queries))
    back = unstack(editor.edit_each(model, state, queries[::-1]))[::-1]
    for one, two in zip(forth, back):
        assert one.header == two.header
        name = one.header.entries[0].name
        assert torch.equal(one.tensors[f"{name}.mask"], two.tensors[f"{name}.mask"])
        torch.testing.assert_close(one.tensors, two.tensors, rtol=1e-4, atol=1e-5)
    assert len({bytes(d.tensors[f"{d.header.entries[0].name}.mask"].numpy()) for d in forth}) == 3


@pytest.mark.parametrize("beside", [(), ("image", "question")])
def test_what_is_unrelated_is_packaged_or_yours(beside):
    """D15: the peers train on the very question that locality is measured by."""
    model, query = tiny("llava"), asked(tiny("llava"))[0]
    seen: list[Query] = []

    def read(queries, **options):
        seen.extend(queries)
        return model.preprocess(queries, **options)

    watched = model._replace(preprocess=read)
    config = quick(
        unrelated_texts=("who is it?", "is it late?"),
        unrelated_questions=("what size?",),
        own_negatives=beside,
    )
    make_editor(config).edit(watched, make_editor(config).init(model, seeded()), [query])
    found = {(one.prompt, bool(one.images)) for one in seen}
    more = {("what size?", True), ("who is it?", False)} if beside else set()
    assert found == {("who is it?", True), ("is it late?", False)} | more
    seen.clear()
    editor = wise_editor(QUICK, unrelated_queries=[Query("a map", "", query.images)])
    editor.edit(watched, editor.init(model, seeded()), [query])
    assert {one.prompt for one in seen} == {"who is it?", "a map"}
    editor = make_editor(quick(unrelated_texts=("who is it?",)))
    with pytest.raises(InvalidSettingsError, match="other ones than the edit's"):
        editor.edit(model, editor.init(model, seeded()), [query])


# ------------------------------------------------------------------ training


def test_values_stay_within_their_clamp_and_edits_stop():
    model = tiny("llava")
    delta = one_by_one(model, quick(norm_constraint=1e-3, lr=5.0), asked(model)[:1])
    values = delta.tensors[f"{delta.header.entries[0].name}.values"]
    assert float(values.abs().max()) == pytest.approx(1e-3)
    stopped = one_by_one(model, quick(stop_loss=1e3, stop_improvement=1e3), asked(model)[:1])
    short = one_by_one(model, quick(num_steps=1), asked(model)[:1])
    for name in short.tensors:
        assert torch.equal(stopped.tensors[name], short.tensors[name])


@pytest.mark.parametrize(("site", "layer"), [("mlp.down", 1), ("mlp.up", -1)])
def test_earlier_edits_of_a_memory_can_be_trained_along(site, layer):
    model = tiny("llava")
    queries = asked(model)
    config = quick(site=site, layer=layer, num_steps=12, act_ratio=0.1, optimizer="adam", lr=0.02)
    without = bind(model, one_by_one(model, config, queries))
    along = bind(model, one_by_one(model, msgspec.structs.replace(config, num_replayed=2), queries))
    assert losses(along, queries[:2]).mean() < losses(without, queries[:2]).mean()


def test_with_all_edits_at_hand_one_after_another_is_all_at_once():
    """A memory is then trained anew on each edit: where it started from does not tell."""
    model, config = tiny("qwen2_vl"), quick(num_replayed=2)
    queries, editor = asked(model), make_editor(config)
    once, _ = editor.edit(model, editor.init(model, seeded()), queries)
    turns = one_by_one(model, config, queries)
    assert turns.header == once.header
    for name, tensor in once.tensors.items():
        torch.testing.assert_close(turns.tensors[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [{"save_freq": 1}, {"save_freq": 5, "num_replayed": 4}, {}])
def test_the_same_question_again_takes_the_place_of_its_edit(config):
    model = tiny("llava")
    first, other = asked(model)[:2]
    again, config = first._replace(target="owl"), quick(**config)
    delta = one_by_one(model, config, [first, other, again])
    edited, old = bind(model, delta), bind(model, one_by_one(model, config, [first, other]))
    assert losses(edited, [again]) < losses(old, [again])
    if config.save_freq < 9:  # else the memory has been trained for it, and is trained on
        assert losses(edited, [first]) > losses(old, [first])
    assert len(delta.header.edits) == 3
    assert delta.header.entries[0].edit_slots[0] == -1
    if config.save_freq == 1:  # as if the first had never been, to the bit
        want = one_by_one(model, config, [other, again])
        assert all(torch.equal(delta.tensors[name], x) for name, x in want.tensors.items())
    at_once = make_editor(config).edit(
        model, make_editor(config).init(model, seeded()), [first, other, again]
    )
    assert at_once[0].header.entries[0].edit_slots[0] == -1
    assert losses(bind(model, at_once[0]), [again]) < losses(old, [again])


def test_sites_and_activations_that_are_not_there_are_refused():
    model = tiny("llava")
    with pytest.raises(UnknownSiteError, match=r"layers\.1\.mlp\.none"):
        make_editor(quick(site="mlp.none")).init(model, seeded())
    odd = model._replace(card=msgspec.structs.replace(model.card, activation="swoosh"))
    with pytest.raises(InvalidSettingsError, match="swoosh"):
        make_editor(QUICK).init(odd, seeded())
    assert tiny("blip2").card.activation == "relu"  # D17: EasyEdit's yaml says silu
    delta = one_by_one(tiny("blip2"), QUICK, asked(tiny("blip2"))[:1])
    assert delta.header.entries[0].activation == "relu"


def test_presets_are_the_published_ones():
    for name, layer in {"blip2": 23, "minigpt4": 23, "qwen2-vl": 23, "qwen3-vl": 30}.items():
        config = PRESETS[f"easyedit-{name}"]
        assert (config.layer, config.num_steps, config.act_ratio) == (layer, 10, 0.4)
        assert (config.lr, config.norm_constraint, config.mask_ratio, config.density) == (
            1.0,
            1.0,
            0.2,
            0.53,
        )
        assert (config.alpha, config.beta, config.gamma) == (5.0, 20.0, 10.0)
        assert (config.save_freq, config.merge_freq, config.merge_alg) == (500, 1000, "ties")
    assert PRESETS["easyedit-blip2"].site == "mlp.up"  # fc1
    assert PRESETS["easyedit-blip2"].mode == PRESETS["easyedit-minigpt4"].mode == "merge"
    assert configure("wise", "micro", num_steps=3) != PRESETS["micro"]


# ------------------------------------------------------------------ sequences and merges


@pytest.mark.parametrize(
    ("mode", "counts"),
    [("retrieve", [1, 1, 2, 1, 2, 2, 3, 2]), ("merge", [1, 1, 2, 1, 2, 2, 3, 1])],
)
def test_memories_fill_and_merge(mode, counts):
    model = tiny("gpt2")
    config = quick(num_steps=1, save_freq=2, merge_freq=4, mode=mode)
    editor = make_editor(config)
    state, seen = editor.init(model, seeded()), []
    for number in range(8):
        delta, state = editor.edit(model, state, [Query(f"who is number {number}?", "bo")])
        entry = delta.header.entries[0]
        seen.append(len(entry.num_values))
        assert not validate_header(delta.header)
        assert len(entry.edit_slots) == number + 1
    assert seen == counts
    assert entry.edit_slots == ((0,) * 4 + (1,) * 4 if mode == "retrieve" else (0,) * 8)
    size = entry.shape[0] * entry.shape[1]
    assert size // 2 < entry.num_values[0] < size  # two masks of one half, or four, laid together
    five = [Query(f"a{number}?", "b") for number in range(5)]
    together, _ = editor.edit(model, editor.init(model, seeded()), five)
    assert len(together.header.entries[0].num_values) == 2


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "slerp", "linear", "sign"])
def test_every_way_to_merge_gives_a_model(method):
    model = tiny("llava")
    config = quick(save_freq=1, merge_freq=2, merge_alg=method)
    delta = one_by_one(model, config, asked(model)[:2])
    assert len(delta.header.entries[0].num_values) == 1
    assert logits(bind(model, delta), asked(model)).isfinite().all()
    again = one_by_one(model, config, asked(model)[:2])
    assert all(torch.equal(delta.tensors[n], again.tensors[n]) for n in delta.tensors)


def test_edits_alone_in_their_memories_are_taken_out_exactly():
    model = tiny("llava")
    queries, config = asked(model), quick(save_freq=1, merge_freq=9)
    singles = [one_by_one(model, config, [query]) for query in queries]
    three = merge(*singles)
    assert three.header.entries[0].edit_slots == (0, 1, 2)
    without, pair = remove(three, [1]), merge(singles[0], singles[2])
    assert without.header == pair.header
    assert all(torch.equal(without.tensors[n], pair.tensors[n]) for n in pair.tensors)
    assert not remove(singles[0], [0]).header.entries
    sequence = one_by_one(model, config, queries)
    for name, tensor in three.tensors.items():
        torch.testing.assert_close(sequence.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    shared = one_by_one(model, quick(save_freq=2, merge_freq=9), queries)
    assert len(remove(shared, [2]).header.edits) == 2
    with pytest.raises(UnsupportedKindError, match="trained into the same values"):
        remove(shared, [0])
    with pytest.raises(UnsupportedKindError, match="threshold"):
        scale(shared, 0.5)
    other = one_by_one(model, quick(gate_statistic="last"), queries[:1])
    with pytest.raises(InvalidInputError, match="another gate_statistic"):
        merge(singles[0], other)


def test_a_sequence_goes_on_from_its_checkpoint(tmp_path):
    model = tiny("llava")
    queries = asked(model)
    editor = make_editor(quick(save_freq=2, merge_freq=4, num_replayed=1))
    delta, state = editor.edit(model, editor.init(model, seeded()), queries[:1])
    save_checkpoint(tmp_path / "mark", "wise", SequenceCheckpoint(1, state, delta))
    mark = load_checkpoint(tmp_path / "mark", "wise", state, torch.device("cpu"))
    assert mark is not None
    want, _ = editor.edit(model, state, queries[1:])
    got, _ = editor.edit(model, mark.state, queries[1:])
    assert got.header == want.header
    assert all(torch.equal(got.tensors[name], want.tensors[name]) for name in want.tensors)
