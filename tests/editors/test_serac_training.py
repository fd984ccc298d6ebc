"""SERAC: its loss, training and the shipped weights."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch.utils import _pytree as pytree

from errata import adapters
from errata.bench.data.world import cases as world
from errata.editors.common import checkpoint
from errata.editors.serac.config import PRESETS
from errata.editors.serac.editor import (
    serac_editor,
)
from errata.editors.serac.training import scope_loss, serac_trainable
from errata.editors.training.config import TrainingConfig
from errata.editors.training.loop import train
from errata.functional import Case, Query, generate
from errata.functional.binding.bound_model import bind
from errata.functional.errors import InvalidInputError
from tests.editors.test_serac import HARD, SOFT, embedded, query, share_of, tiny


def test_the_similarity_loss_is_its_formula():
    gaps = torch.tensor([[0.1, 2.0], [0.4, 3.0]])
    own = torch.tensor([0, 1])
    soft, closest = scope_loss(gaps, own, 1, SOFT)
    s = torch.exp(-gaps)
    want = torch.stack([-s[0, 0].log() - (1 - s[0, 1]).log(), -(1 - s[1, 0]).log()])
    torch.testing.assert_close(soft, want)
    assert closest.tolist() == [0, 0]
    hard, _ = scope_loss(gaps, own, 1, HARD)
    edge = torch.tensor(0.5).log()
    side = torch.nn.functional.softplus
    want = torch.stack(
        [
            side(8 * (gaps[0, 0] + edge)) + side(-8 * (gaps[0, 1] + edge)),
            side(-8 * (gaps[1, 0] + edge)),
        ]
    )
    torch.testing.assert_close(hard, want)


@pytest.mark.parametrize("config", [HARD, SOFT], ids=["hard", "soft"])
def test_training_teaches_the_scope(config, tmp_path):
    model, seen = tiny(), []
    cases = []
    for number in range(8):
        asked, local = query(0, f"b{number}", 30 * number), query(1, "owl", 30 * number)
        probes = {
            "rephrase": (asked._replace(prompt="who may it be?"),),
            "image_rephrase": (query(0, f"b{number}", 30 * number + 3),),
            "text_locality": (Query("is water wet?", "yes"),),
            "image_locality": (local,),
        }
        cases.append(Case(str(number), asked, probes))
    short = TrainingConfig(
        num_steps=30,
        batch_size=4,
        lr=5e-3,
        num_validation_cases=2,
        eval_every=5,
        max_grad_norm=10.0,
    )
    done = train(model, serac_trainable(config), cases, short, progress=seen.append)
    held = [now.validation_loss for now in seen if now.validation_loss is not None]
    assert done.validation_loss is not None
    assert done.validation_loss < held[0]
    assert any("scope" in name for name in seen[0].terms)
    path = tmp_path / "serac.safetensors"
    trainable = serac_trainable(config)
    checkpoint.save_checkpoint(path, trainable.weights(done.state), trainable.compatibility(model))
    again = serac_editor(msgspec.structs.replace(config, weights=str(path)))
    state = again.init(model, torch.Generator())
    for mine, theirs in zip(
        pytree.tree_leaves(state.network), pytree.tree_leaves(done.state.network)
    ):
        assert torch.equal(mine, theirs.half().float())
    wrong = serac_editor(msgspec.structs.replace(config, weights=str(path), key_dim=8))
    with pytest.raises(InvalidInputError, match="must be"):
        wrong.init(model, torch.Generator())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_the_shipped_state_knows_the_scope(name):
    """Unseen cases: in other words and another image in scope, other facts and creatures not."""
    model = adapters.load_micro(name)
    editor = serac_editor(PRESETS["micro"])
    some = world.cases(8, seed=5)
    state = editor.init(model, torch.Generator())
    bound = bind(model, editor.edit_each(model, state, [case.edit for case in some]))

    def shares(probe: str) -> torch.Tensor:
        asked = [case.probes[probe][0] for case in some]
        return share_of(bound, embedded(model, asked)._replace(edit_index=torch.arange(8)))

    assert int((shares("rephrase") > 0.5).sum()) == 8
    assert int((shares("image_rephrase") > 0.5).sum()) >= 6
    for probe in ("text_locality", "same_entity_locality", "hard_locality", "image_locality"):
        assert int((shares(probe) > 0.5).sum()) <= 1
    asked = [case.edit._replace(target="") for case in some]
    said = generate(bound, asked, 8, edit_index=torch.arange(8))
    assert [one.strip() for one in said] == [case.edit.target for case in some]
