"""bind: the laws of editing, on a hand-made model that is awkward in every way real ones are."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from errata.functional import BaseModel, Delta, EditRecord, Header
from errata.functional.binding.bound_model import bind
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import (
    BaseMismatchError,
    InvalidInputError,
    ShapeError,
    UnknownSiteError,
)
from errata.functional.forward.batches import take_rows
from errata.functional.gradients.losses import nll
from errata.functional.hashing import hash_parameter
from errata.functional.kinds.schema import Dense, LowRank

DENSE = {
    "linear": ["layers.1.down.weight"],
    "transposed": ["layers.0.up.weight", "layers.2.attn.o.weight"],
    "biases": ["layers.2.down.bias", "layers.0.attn.q.bias", "layers.2.down.weight"],
    "norm": ["layers.1.norm.weight", "layers.2.up.weight"],
    "tied": ["tokens.weight"],
    "projector": ["projector.weight", "projector.bias"],
    "places": ["places.weight"],
    "everything": ["projector.weight", "layers.0.norm.weight", "layers.2.attn.v.weight"],
}
LOWRANK = {
    "linear": ["layers.1.down.weight", "layers.2.attn.v.weight"],
    "transposed": ["layers.0.up.weight"],
    "tied": ["head.weight"],
    "projector": ["projector.weight"],
}


def base_of(model, names):
    card = model.card
    touched = {n: hash_parameter(model.params[card.tied.get(n, n)]) for n in names}
    return BaseModel(
        id=card.id, family=card.family, config_hash=card.config_hash, parameter_hashes=touched
    )


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(model, names, edits=0, size=0.1, seed=0):
    shapes = {n: tuple(model.params[n].shape) for n in names}
    entries = tuple(Dense(name=n, checkpoint_name=n, shape=s) for n, s in shapes.items())
    lead = (edits,) if edits else ()
    tensors = {n: size * randn(*lead, *s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())}
    return Delta(_header(model, names, entries, edits), tensors)


def lowrank(model, names, edits=0, rank=3, form="act", seed=0):
    card, entries, tensors = model.card, [], {}
    lead = (edits,) if edits else ()
    for i, name in enumerate(names):
        path = name.removesuffix(".weight")
        out, width = card.linear_shapes[path]
        flip = path in card.transposed
        entries.append(
            LowRank(
                name=name,
                checkpoint_name=name,
                shape=(width, out) if flip else (out, width),
                rank=rank,
                transposed=flip,
            )
        )
        tensors[f"{name}.A"] = 0.5 * randn(*lead, rank, width, seed=seed + 2 * i)
        tensors[f"{name}.B"] = 0.5 * randn(*lead, out, rank, seed=seed + 2 * i + 1)
    return Delta(_header(model, names, tuple(entries), edits, form), tensors)


def _header(model, names, entries, edits, form="act"):
    records = tuple(EditRecord(id=str(n)) for n in range(max(edits, 1)))
    return Header(
        base=base_of(model, names), entries=entries, arithmetic=form, edits=records, stack=edits
    )


def logits(model, queries, edit=None):
    inputs = model.preprocess(queries)
    return model.decode(model.params, model.embed(model.params, inputs, edit_index=edit))


def by_hand(model, delta, queries):
    """The definition: parameters with the changes added, in the base's own functions.

    A low-rank change of a tied head, added to outputs, leaves the embedding as it is.
    """
    params, embed_params = dict(model.params), dict(model.params)
    for entry in delta.header.entries:
        name = model.card.tied.get(entry.name, entry.name)
        if isinstance(entry, Dense):
            change = delta.tensors[name]
        else:
            change = delta.tensors[f"{entry.name}.B"] @ delta.tensors[f"{entry.name}.A"]
            change = change.mT if entry.transposed else change
        params[name] = params[name] + change
        if name == entry.name or isinstance(entry, Dense) or delta.header.arithmetic == "weight":
            embed_params[name] = params[name]
    return model.decode(params, model.embed(embed_params, model.preprocess(queries)))


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_binding_nothing_is_the_identity(toy, queries):
    nothing = Delta(Header(base=base_of(toy, [])), {})
    assert torch.equal(logits(bind(toy, nothing), queries), logits(toy, queries))


@pytest.mark.parametrize("names", DENSE.values(), ids=DENSE)
def test_dense_is_the_parameter_plus_the_change(toy, queries, names):
    delta = dense(toy, names)
    got = logits(bind(toy, delta), queries)
    assert torch.equal(got, by_hand(toy, delta, queries))
    assert not torch.allclose(got, logits(toy, queries), atol=1e-3)


@pytest.mark.parametrize("form", ["act", "act_fp32", "weight"])
@pytest.mark.parametrize("names", LOWRANK.values(), ids=LOWRANK)
def test_lowrank_is_the_parameter_plus_the_product(toy, queries, names, form):
    delta = lowrank(toy, names, form=form)
    got = logits(bind(toy, delta), queries)
    close(got, by_hand(toy, delta, queries))
    assert not torch.allclose(got, logits(toy, queries), atol=1e-3)


@pytest.mark.parametrize("form", ["act", "act_fp32", "weight"])
def test_bf16_forms_are_what_the_header_says(toy_bf16, queries, form):
    """Each form's arithmetic, spelled out at one linear map."""
    name = "layers.2.down"
    delta = lowrank(toy_bf16, [f"{name}.weight"], form=form)
    down, up = delta.tensors[f"{name}.weight.A"], delta.tensors[f"{name}.weight.B"]
    batch = toy_bf16.embed(toy_bf16.params, toy_bf16.preprocess(queries))
    seen = {}

    def watch(x, y):
        seen["x"], seen["y"] = x, y
        return y

    toy_bf16.decode(toy_bf16.params, batch, {name: watch})
    x, y = seen["x"], seen["y"]
    weight, bias = toy_bf16.params[f"{name}.weight"], toy_bf16.params[f"{name}.bias"]
    wants = {
        "act": y + F.linear(F.linear(x, down.bfloat16()), up.bfloat16()),
        "act_fp32": (y + F.linear(F.linear(x.float(), down), up)).bfloat16(),
        "weight": F.linear(x, weight + (up @ down).bfloat16(), bias),
    }
    bound = bind(toy_bf16, delta)
    bound.decode(bound.params, batch, {name: watch})
    assert seen["y"].dtype == torch.bfloat16
    share = {name: (seen["y"] == made).float().mean().item() for name, made in wants.items()}
    # Products in fp32 may differ in their last bit from call to call, and so may their rounding.
    assert share.pop(form) > 0.995
    assert max(share.values()) < 0.98, "no other form gives this"


def _stacked(model, kind, names, edits):
    return (dense if kind is DENSE else lowrank)(model, names, edits=edits)


STACKED = [
    *[pytest.param(DENSE, names, id=f"dense-{key}") for key, names in DENSE.items()],
    *[pytest.param(LOWRANK, names, id=f"lowrank-{key}") for key, names in LOWRANK.items()],
]


@pytest.mark.parametrize(
    "edit",
    [[0, 1, 2, 3, 4], [2, 0, -1, 0, 1], [1, 1, 1, 1, 1], [-1] * 5],
    ids=["in order", "any order", "one for all", "base"],
)
@pytest.mark.parametrize(("kind", "names"), STACKED)
def test_edits_side_by_side_are_the_same_one_by_one(toy, queries, kind, names, edit):
    delta = _stacked(toy, kind, names, edits=5)
    got = logits(bind(toy, delta), queries, edit=torch.tensor(edit))
    alone = [toy if e < 0 else bind(toy, unstack(delta)[e]) for e in edit]
    want = torch.cat([logits(m, queries)[b : b + 1] for b, m in enumerate(alone)])
    close(got, want)


@pytest.mark.parametrize(("kind", "names"), STACKED)
def test_rows_of_edits_can_be_cut_thinned_and_resumed(toy, queries, kind, names):
    bound = bind(toy, _stacked(toy, kind, names, edits=3))
    edit = torch.tensor([2, 0, 1, -1, 2])
    inputs = toy.preprocess(queries)
    batch = bound.embed(bound.params, inputs, edit_index=edit)
    whole = bound.decode(bound.params, batch)
    deep = bound.decode(bound.params, batch, stop=2)
    assert torch.equal(deep.edit_index, edit)
    close(bound.decode(bound.params, deep), whole)
    close(bound.decode(bound.params, bound.select_scored(bound.params, deep)), whole)
    close(bound.decode(bound.params, take_rows(batch, slice(1, 3))), whole[1:3])


def test_a_stacked_change_below_the_decoder_must_know_the_edits(toy, queries):
    bound = bind(toy, dense(toy, ["projector.weight"], edits=2))
    with pytest.raises(InvalidInputError, match="edit_index="):
        logits(bound, queries)


def test_deltas_bind_one_on_another(toy, queries):
    first, second = dense(toy, DENSE["biases"]), lowrank(toy, LOWRANK["linear"])
    stacked = lowrank(toy, LOWRANK["transposed"], edits=2)
    bound = bind(bind(bind(toy, first), second), stacked)
    assert [d.header for d in bound.deltas] == [first.header, second.header, stacked.header]
    got = logits(bound, queries, edit=torch.tensor([1, 0, 1, 0, -1]))
    twice = bind(bind(toy, second), first)
    close(got[4:], logits(twice, queries)[4:])
    for e in (0, 1):
        one = logits(bind(twice, unstack(stacked)[e]), queries)
        rows = [[1, 3], [0, 2]][e]
        close(got[rows], one[rows])


def test_a_second_change_of_one_parameter_adds_up(toy, queries):
    a, b = dense(toy, ["layers.1.down.weight"]), dense(toy, ["layers.1.down.weight"], seed=9)
    both = {n: a.tensors[n] + b.tensors[n] for n in a.tensors}
    close(
        logits(bind(bind(toy, a), b), queries), logits(bind(toy, a._replace(tensors=both)), queries)
    )


def test_the_callers_rewrites_come_after_the_deltas(toy, queries):
    bound = bind(toy, lowrank(toy, ["layers.2.down.weight"]))
    batch = bound.embed(bound.params, bound.preprocess(queries))
    got = bound.decode(bound.params, batch, {"layers.2.down": lambda x, y: y * 0 + 1})
    want = toy.decode(toy.params, batch, {"layers.2.down": lambda x, y: y * 0 + 1})
    assert torch.equal(got, want)


def test_the_base_stays_as_it_is(toy, queries):
    before = {name: (t, t._version, t.clone()) for name, t in toy.params.items()}
    for kind, names in [(DENSE, DENSE["everything"]), (LOWRANK, LOWRANK["linear"])]:
        for edits in (0, 5):
            bound = bind(toy, _stacked(toy, kind, names, edits))
            logits(bound, queries, edit=torch.arange(5))
            shared = [n for n in toy.params if bound.params[n] is toy.params[n]]
            assert len(shared) >= len(toy.params) - len(names)
    for name, (tensor, version, value) in before.items():
        assert toy.params[name] is tensor
        assert tensor._version == version
        assert torch.equal(tensor, value)
        assert not tensor.requires_grad


@pytest.mark.parametrize("kind", [DENSE, LOWRANK], ids=["dense", "lowrank"])
def test_gradients_reach_the_delta_and_equal_the_weights_own(toy, queries, kind):
    names = ["layers.0.down.weight", "layers.2.up.weight"]
    delta = _stacked(toy, kind, names, edits=5)
    batch = toy.embed(toy.params, toy.preprocess(queries))._replace(
        edit_index=torch.tensor([3, 1, 0, 1, -1])
    )

    def loss(tensors):
        bound = bind(toy, delta._replace(tensors=tensors), check=False)
        return nll(bound.decode(bound.params, batch), batch.labels).sum()

    got = grad(loss)(dict(delta.tensors))
    for e in range(5):
        rows = (batch.edit_index == e).nonzero()[:, 0]
        one, part = unstack(delta)[e], take_rows(batch, rows)

        def alone(tensors, one=one, part=part):
            bound = bind(toy, one._replace(tensors=tensors), check=False)
            return nll(bound.decode(bound.params, part), part.labels).sum()

        want = grad(alone)(dict(one.tensors)) if len(rows) else {}
        for name in delta.tensors:
            close(got[name][e], want.get(name, torch.zeros_like(got[name][e])))
    assert all(not t.requires_grad for t in toy.params.values())


@pytest.mark.parametrize("kind", [DENSE, LOWRANK], ids=["dense", "lowrank"])
def test_vmap_over_unstacked_deltas_is_the_loop(toy, queries, kind):
    names = ["layers.1.down.weight", "layers.0.up.weight"]
    stacked = _stacked(toy, kind, names, edits=4)
    layout = unstack(stacked)[0]
    batch = toy.embed(toy.params, toy.preprocess(queries))

    def run(tensors):
        bound = bind(toy, Delta(layout.header, tensors), check=False)
        return bound.decode(bound.params, batch)

    got = vmap(run)(dict(stacked.tensors))
    want = torch.stack([run(dict(one.tensors)) for one in unstack(stacked)])
    close(got, want)


def test_vmap_over_rows_of_a_stacked_delta_is_the_batch(toy, queries):
    delta = dense(toy, ["layers.1.down.weight", "layers.2.down.bias"], edits=5)
    bound = bind(toy, delta)
    batch = toy.embed(toy.params, toy.preprocess(queries))._replace(
        edit_index=torch.tensor([4, 0, -1, 2, 2])
    )

    def run(tensors):
        fields, extras = tensors
        one = batch._replace(
            **{n: t[None] for n, t in fields.items()},
            layer_inputs={n: t[None] for n, t in extras.items()},
        )
        return bound.decode(bound.params, one)[0]

    fields = {
        n: getattr(batch, n)
        for n in (
            "hidden_states",
            "attention_mask",
            "position_ids",
            "labels",
            "logit_positions",
            "edit_index",
        )
    }
    close(vmap(run)((fields, dict(batch.layer_inputs))), bound.decode(bound.params, batch))


def test_threads_with_a_delta_each_say_what_each_says_alone(toy, queries):
    deltas = [lowrank(toy, LOWRANK["linear"], seed=n) for n in range(8)]
    want = [logits(bind(toy, delta), queries) for delta in deltas]
    got: dict[int, torch.Tensor] = {}

    def work(n):
        got[n] = logits(bind(toy, deltas[n]), queries)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(8):
        close(got[n], want[n], 1e-6)


def test_another_base_is_refused_naming_what_differs(toy, toy_bf16):
    delta = dense(toy, ["layers.1.down.weight", "layers.0.attn.q.bias"])
    with pytest.raises(
        BaseMismatchError, match=r"layers\.1\.down\.weight.*layers\.0\.attn\.q\.bias"
    ):
        bind(toy_bf16, delta)
    base = msgspec.structs.replace(delta.header.base, family="llava", config_hash="d" * 64)
    header = msgspec.structs.replace(delta.header, base=base)
    with pytest.raises(BaseMismatchError, match=r"'llava'.*configuration"):
        bind(toy, delta._replace(header=header))


def test_the_same_base_is_known_again_after_binding(toy):
    first = dense(toy, ["layers.1.down.weight"])
    bound = bind(toy, first)
    assert bind(bound, first).deltas == (first, first)
    on_top = dense(bound, ["layers.1.down.weight"])  # made for the edited model
    assert bind(bound, on_top).deltas == (first, on_top)
    with pytest.raises(BaseMismatchError):
        bind(toy, on_top)


def test_unknown_parameters_and_bad_shapes_are_all_named(toy):
    good = dense(toy, ["layers.1.down.weight", "layers.1.up.weight"])
    base = msgspec.structs.replace(good.header.base, parameter_hashes={})
    strange = (
        Dense(name="layers.1.dawn.weight", checkpoint_name="x", shape=(2, 2)),
        Dense(name="layers.1.up.weight", checkpoint_name="x", shape=(2, 2)),
    )
    header = msgspec.structs.replace(good.header, base=base, entries=strange)
    tensors = {entry.name: torch.zeros(2, 2) for entry in strange}
    with pytest.raises(UnknownSiteError, match=r"dawn.*layers\.1\.up.*\[16, 24\].*near.*down"):
        bind(toy, Delta(header, tensors))
    with pytest.raises(ShapeError, match=r"layers\.1\.down\.weight must be \[16, 24\]"):
        bind(toy, good._replace(tensors={n: t[:3] for n, t in good.tensors.items()}))
    with pytest.raises(ShapeError, match=r"down\.weight is missing.*up\.weight is missing"):
        bind(toy, good._replace(tensors={}))
