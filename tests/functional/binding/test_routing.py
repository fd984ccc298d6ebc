"""Routing is returned, never written: hooks decide once per row, and the decision travels."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from errata import adapters
from errata.editors import make_editor
from errata.functional import Model, Query, bind
from errata.functional.binding.edited_forward import HookPlan, edited_functions
from errata.functional.kinds.common.patch import RoutedHook
from tests.editors.methods import CASES

ROUTED = ["wise", "liveedit", "serac"]
QUERIES = [Query("who is it?", "bo"), Query("where does it live, then?", "rome")]


def edited(model: Model, method: str) -> Model:
    editor = make_editor(CASES[method])
    state = editor.init(model, torch.Generator().manual_seed(0))
    return bind(model, editor.edit(model, state, QUERIES)[0])


@pytest.mark.parametrize("method", ROUTED)
@pytest.mark.parametrize("stop", [None, 2])
def test_a_read_only_batch_decodes_and_stays_as_it_is(method, stop):
    model = adapters.from_module(*adapters.tiny_model("llama"))
    bound = edited(model, method)
    batch = bound.embed(bound.params, bound.preprocess(QUERIES))
    names = set(batch.routing)
    sealed = batch._replace(routing=MappingProxyType(dict(batch.routing)))
    with torch.no_grad():
        result, cache = bound.decode(bound.params, sealed, stop=stop, return_cache=True)
        wanted = bound.decode(bound.params, batch, stop=stop)
    assert set(sealed.routing) == names
    assert set(cache.routing) > names
    if stop is None:
        assert torch.equal(result, wanted)
    else:
        assert torch.equal(result.hidden_states, wanted.hidden_states)
        assert set(result.routing) == set(cache.routing)


def test_a_decision_is_made_once_and_used_by_later_tokens():
    model = adapters.from_module(*adapters.tiny_model("llama"))
    path, calls = f"{model.card.layers}.1", []

    def decide(batch, x, y):
        calls.append("decide")
        return {"row": torch.arange(batch.num_rows), "two": torch.ones(batch.num_rows, 3)}

    def apply(batch, x, y, decision):
        calls.append("apply")
        assert decision["two"].shape == (batch.num_rows, 3)
        return y + decision["row"].view(-1, *[1] * (y.dim() - 1)).to(y)

    plan = HookPlan(hooks=[("name", {path: RoutedHook(decide, apply)})])
    bound = model._replace(**edited_functions(model, plan))
    batch = bound.embed(bound.params, bound.preprocess(QUERIES))
    logits, cache = bound.decode(bound.params, batch, return_cache=True)
    assert set(cache.routing) == {f"name.{path}.row", f"name.{path}.two"}
    step = bound.embed_next(bound.params, torch.ones(2, 1, dtype=torch.long), cache)
    bound.decode(bound.params, step, kv_cache=cache)
    assert calls == ["decide", "apply", "apply"]
    assert batch.routing == {}
    swapped = batch._replace(routing={k: v.flip(0) for k, v in cache.routing.items()})
    assert not torch.equal(bound.decode(bound.params, swapped), logits)


def test_decisions_work_under_vmap():
    model = adapters.from_module(*adapters.tiny_model("llama"))
    path = f"{model.card.layers}.0"
    hook = RoutedHook(
        lambda batch, x, y: {"mean": y.reshape(*batch.attention_mask.shape, -1).mean((1, 2))},
        lambda batch, x, y, decision: y + decision["mean"].sum(),
    )
    bound = model._replace(**edited_functions(model, HookPlan(hooks=[("n", {path: hook})])))
    batch = bound.embed(bound.params, bound.preprocess(QUERIES[:1]))

    def run(shift):
        moved = batch._replace(hidden_states=batch.hidden_states + shift)
        return bound.decode(bound.params, moved)

    shifts = torch.tensor([0.0, 0.1, 0.2])
    looped = torch.stack([run(shift) for shift in shifts])
    torch.testing.assert_close(torch.vmap(run)(shifts), looped, rtol=1e-4, atol=1e-5)
