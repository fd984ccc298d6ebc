"""How LiveEdit is trained, and what its shipped states do."""

from __future__ import annotations

import msgspec
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

from errata import adapters
from errata.bench.data.world import cases as world
from errata.bench.data.world.text_cases import text_cases
from errata.editors.common.checkpoint import WEIGHTS
from errata.editors.liveedit.config import PRESETS
from errata.editors.liveedit.editor import liveedit_editor, liveedit_trainable
from errata.editors.liveedit.losses import (
    RoutingScores,
    hard_gate_loss,
    margin_loss,
    soft_gate_loss,
)
from errata.editors.training.batches import PrefixDataset
from errata.editors.training.config import TrainingConfig
from errata.editors.training.loop import train
from errata.functional import Case, Model, Query, generate
from errata.functional.binding.bound_model import bind
from errata.functional.gradients.losses import nll
from tests.editors.test_liveedit import SMALL, seeded, tiny


def test_routing_losses_are_what_they_say():
    like = RoutingScores(
        vision=torch.tensor([[3.0, -1.0], [0.5, -2.0]]),
        sentinel=torch.tensor([1.0, 0.0]),
        query=torch.tensor([[2.0, -1.0], [-3.0, 0.5]]),
    )
    own, reach = torch.tensor([0, 0]), torch.tensor([True, False])
    e = [torch.tensor(x).exp() for x in (3.0, -1.0, 1.0)]
    assert hard_gate_loss(like, own, reach)[0] == pytest.approx(float(-(e[0] / sum(e)).log()))
    e = [torch.tensor(x).exp() for x in (0.5, -2.0, 0.0)]
    assert hard_gate_loss(like, own, reach)[1] == pytest.approx(float(-(e[2] / sum(e)).log()))
    one = torch.nn.functional.softplus
    got = margin_loss(like, own, reach)
    assert got[0] == pytest.approx(float(6 * one(torch.tensor(-2.0)) + one(torch.tensor(-2.0))))
    both = torch.tensor([0.5, -2.0]).logsumexp(0)
    assert got[1] == pytest.approx(float(one(both)))
    kin = torch.ones(2, 2, dtype=torch.bool)
    got = soft_gate_loss(like.query, own, reach, kin)
    q = like.query
    want = -q[0].log_softmax(0)[0] - q[0, 0].sigmoid().log() - (-q[0, 1]).sigmoid().log()
    assert got[0] == pytest.approx(float(want))
    assert got[1] == pytest.approx(float(-(-q[1]).sigmoid().log().mean()))


SHORT = TrainingConfig(
    num_steps=4,
    batch_size=3,
    lr=1e-2,
    num_validation_cases=2,
    eval_every=2,
    save_every=1,
    loss_weights={
        "edit": 1.0,
        "rephrase": 1.0,
        "image_rephrase": 1.0,
        "text_locality": 1.0,
        "image_locality": 1.0,
    },
)


def cases(count: int = 8) -> list[Case]:
    made = []
    for number in range(count):
        image = Image.new("RGB", (32, 32), (20 * number, 90, 200))
        other = Image.new("RGB", (32, 32), (20 * number, 95, 190))
        shown = () if number == 1 else (image,)  # one of them has no image
        target = f"b{number}"
        probes = {
            "rephrase": (Query("who may it be?", target, shown),),
            "image_rephrase": (Query("who is it?", target, (other,) if shown else ()),),
            "text_locality": (Query("is water wet?", "yes"),),
            "image_locality": (Query("what colour is it?", "owl", (other,)),),
        }
        made.append(Case(f"case {number}", Query("who is it?", target, shown), probes))
    return made


def test_training_lowers_the_loss_and_resumes_to_the_same_bits(tmp_path):
    model, losses = tiny("llava"), []
    config = msgspec.structs.replace(SHORT, num_steps=30)
    train(
        model,
        liveedit_trainable(SMALL),
        cases(),
        config,
        progress=lambda now: losses.append(now.loss),
    )
    assert sum(losses[-5:]) < sum(losses[:5])

    whole = train(model, liveedit_trainable(SMALL), cases(), SHORT)

    class Killed(Exception):
        pass

    def kill(now):
        if now.step == 2:
            raise Killed

    with pytest.raises(Killed):
        train(
            model, liveedit_trainable(SMALL), cases(), SHORT, checkpoint_dir=tmp_path, progress=kill
        )
    resumed = train(
        tiny("llava"), liveedit_trainable(SMALL), cases(), SHORT, checkpoint_dir=tmp_path
    )
    flat = [pytree.tree_leaves(one.state.networks) for one in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    assert resumed.validation_loss == whole.validation_loss


def test_training_runs_what_inference_runs():
    """The edited layer once: a batch's reliability is the bound model's, own expert alone."""
    model = tiny("llava")
    learner = liveedit_trainable(SMALL)
    state = learner.editor.init(model, seeded())
    config = msgspec.structs.replace(SHORT, loss_weights={"edit": 1.0, "image_locality": 1.0})
    dataset = PrefixDataset(model, learner.sites(model), config, learner.append_eos, None)
    some = cases(1)
    training_batch = dataset.batch(some, None)
    with torch.no_grad():
        _, terms = learner.loss(model, state, training_batch)
    delta, _ = learner.editor.edit(model, state, [some[0].edit])
    bound = bind(model, delta)
    batch = model.embed(model.params, model.preprocess([some[0].edit], append_eos=True))
    with torch.no_grad():
        want = nll(bound.decode(bound.params, batch), batch.labels)[0]
    assert float(terms["edit"]) == pytest.approx(float(want), rel=1e-5)


SHIPPED = sorted(file.stem.partition("-")[2] for file in WEIGHTS.glob("liveedit-*.safetensors"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_state_edits_generalises_and_keeps_to_itself(name):
    """Unseen cases, one of them without an image, in one pool."""
    model = adapters.load_micro(name)
    editor = liveedit_editor(PRESETS["micro"])
    some = [*world.cases(4, seed=5), *text_cases(1, seed=5)]
    queries = [case.edit for case in some]
    delta, _ = editor.edit(model, editor.init(model, seeded()), queries)
    edited = bind(model, delta)

    def losses(bound: Model, queries: list[Query]) -> torch.Tensor:
        batch = model.embed(model.params, model.preprocess(queries))
        with torch.no_grad():
            return nll(bound.decode(bound.params, batch), batch.labels)

    for group in (queries, [case.probes["rephrase"][0] for case in some]):
        assert losses(model, group).mean() > 1.5
        assert losses(edited, group).mean() < 0.5
    strangers = [query for case in some for query in case.probes["image_locality"]]
    gap = losses(edited, strangers) - losses(model, strangers)
    assert gap.abs().mean() < 0.05
    assert generate(edited, [queries[0]], 8)[0].strip() == queries[0].target
