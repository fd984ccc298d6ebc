"""Training: it lowers the loss, stops when it should, and resumes to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

from errata import adapters
from errata.editors.common import checkpoint
from errata.editors.mend.config import MendConfig
from errata.editors.mend.editor import mend_trainable
from errata.editors.training.batches import PrefixDataset
from errata.editors.training.config import TrainingConfig
from errata.editors.training.loop import train
from errata.functional import Case, Query
from errata.functional.binding.bound_model import bind
from errata.functional.errors import InvalidInputError
from errata.functional.gradients.losses import kl, nll

MEND = MendConfig(untrained=True, sites=("layers.-1.mlp",), rank=4, edit_lr=-1e-2)
SHORT = TrainingConfig(
    num_steps=6,
    batch_size=2,
    gradient_accumulation_steps=2,
    lr=1e-2,
    num_validation_cases=2,
    eval_every=2,
    save_every=1,
    max_grad_norm=10.0,
)


def tiny():
    return adapters.from_module(*adapters.tiny_model("llava"))


def cases(count: int = 8) -> list[Case]:
    made = []
    for number in range(count):
        image = Image.new("RGB", (32, 32), (20 * number, 90, 200))
        other = Image.new("RGB", (32, 32), (20 * number, 95, 190))
        made.append(
            Case(
                f"case {number}",
                Query("who is it?", f"b{number}", (image,)),
                {
                    "rephrase": (
                        Query("who may it be?", f"b{number}", (image,)),
                        Query("and the name?", f"b{number}", (image,)),
                    ),
                    "image_rephrase": (Query("who is it?", f"b{number}", (other,)),),
                    "text_locality": (Query("is water wet?", "yes"),),
                    "image_locality": (Query("what colour is it?", "owl", (other,)),),
                },
            )
        )
    return made


def leaves(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_training_lowers_the_loss_of_cases_it_never_saw():
    model, seen = tiny(), []
    config = msgspec.structs.replace(SHORT, num_steps=30, batch_size=4, eval_every=1)
    before = {name: tensor._version for name, tensor in model.params.items()}
    done = train(model, mend_trainable(MEND), cases(10), config, progress=seen.append)
    held = [now.validation_loss for now in seen]
    assert done.validation_loss == min(held) < held[0]
    assert [now.step for now in seen] == list(range(1, done.num_steps + 1))
    assert all(now.cases_per_second > 0 for now in seen)
    assert before == {name: tensor._version for name, tensor in model.params.items()}


def test_a_lesson_is_each_case_edited_alone():
    model, config = tiny(), msgspec.structs.replace(SHORT, questions_per_probe=2)
    learner = mend_trainable(MEND)
    state = learner.editor.init(model, torch.Generator().manual_seed(0))
    some = cases(3)
    dataset = PrefixDataset(model, learner.sites(model), config, False, None)
    total, terms = learner.loss(model, *_studied(learner, model, state, dataset.batch(some, None)))
    want = dict.fromkeys(config.loss_weights, 0.0)
    for case in some:
        delta, _ = learner.editor.edit(model, state, [case.edit])
        edited = bind(model, delta)
        for name in want:
            batch = model.embed(model.params, model.preprocess(case.probes[name]))
            after = edited.decode(edited.params, batch)
            if name.endswith("locality"):
                value = kl(model.decode(model.params, batch), after, batch.labels)
            else:
                value = nll(after, batch.labels)
            want[name] += float(value.mean()) / len(some)
    for name, value in want.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert float(total) == pytest.approx(
        sum(config.loss_weights[name] * value for name, value in want.items()), rel=1e-3
    )


def _studied(learner, model, state, training_batch):
    return learner.prepare(model, state, training_batch, False)


def test_prefixes_are_computed_once_and_kept_within_bounds(tmp_path):
    model, reads = tiny(), []

    def read(queries: Sequence[Query], **options):
        reads.append(len(queries))
        return model.preprocess(queries, **options)

    counted = model._replace(preprocess=read)
    sites = mend_trainable(MEND).sites(model)
    some = cases(3)
    dataset = PrefixDataset(counted, sites, SHORT, False, None)
    first = dataset.batch(some, None)
    again = dataset.batch(some, None)
    assert len(reads) == 3
    assert same(first.questions, again.questions)

    bounded = msgspec.structs.replace(SHORT, prefix_cache_bytes=1, prefix_disk_bytes=1 << 20)
    on_disk = PrefixDataset(counted, sites, bounded, False, tmp_path)
    on_disk.batch(some, None)
    assert len(reads) == 6
    kept = PrefixDataset(counted, sites, bounded, False, tmp_path).batch(some, None)
    assert len(reads) == 6
    mine, theirs = (
        checkpoint.named_tensors(kept.questions),
        checkpoint.named_tensors(first.questions),
    )
    assert sorted(mine) == sorted(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(kept.base_logits, first.base_logits)

    full = msgspec.structs.replace(SHORT, prefix_cache_bytes=1, prefix_disk_bytes=1)
    PrefixDataset(counted, sites, full, False, tmp_path / "full").batch(some, None)
    assert not list((tmp_path / "full" / "prefixes").iterdir())


def test_it_stops_when_held_out_cases_no_longer_gain():
    config = msgspec.structs.replace(
        SHORT,
        num_steps=50,
        lr=1e-12,
        eval_every=1,
        early_stopping_patience=3,
        gradient_accumulation_steps=1,
    )
    # the moments still move, so the first validations may differ; then nothing does
    done = train(tiny(), mend_trainable(MEND), cases(), config)
    assert done.stopped_early
    assert done.num_steps < 50


def test_a_resumed_training_is_the_undisturbed_one(tmp_path):
    model = tiny()
    whole = train(model, mend_trainable(MEND), cases(), SHORT)

    class Killed(Exception):
        pass

    def kill(now):
        if now.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(model, mend_trainable(MEND), cases(), SHORT, checkpoint_dir=tmp_path, progress=kill)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    seen = []
    resumed = train(
        tiny(), mend_trainable(MEND), cases(), SHORT, checkpoint_dir=tmp_path, progress=seen.append
    )
    assert [now.step for now in seen] == [4, 5, 6]
    assert same(resumed.state, whole.state)
    assert resumed.validation_loss == whole.validation_loss


def test_sigkill_loses_nothing(tmp_path):
    """A process killed mid-training, gone on with by another: the bits of one undisturbed."""
    folder = tmp_path / "run"
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_loop import *\n"
        "config = msgspec.structs.replace(SHORT, num_steps=400, eval_every=50, "
        "early_stopping_patience=99)\n"
        f"train(tiny(), mend_trainable(MEND), cases(), config, checkpoint_dir={str(folder)!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script])
    for _ in range(1200):
        if (folder / "checkpoint.safetensors").is_file() or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    path = folder / "checkpoint.safetensors"
    done = int(checkpoint.open_checkpoint(path)[1]["step"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = msgspec.structs.replace(
            SHORT, num_steps=400, eval_every=50, early_stopping_patience=99
        )
        seen = []

        class Enough(Exception):
            pass

        def until(step):
            def look(now):
                seen.append(now.step)
                if now.step == step:
                    raise Enough

            return look

        with pytest.raises(Enough):
            train(
                tiny(),
                mend_trainable(MEND),
                cases(),
                config,
                checkpoint_dir=folder,
                progress=until(done + 3),
            )
        assert seen == [done + 1, done + 2, done + 3]
        other = tmp_path / "undisturbed"
        with pytest.raises(Enough):
            train(
                tiny(),
                mend_trainable(MEND),
                cases(),
                config,
                checkpoint_dir=other,
                progress=until(done + 3),
            )
    finally:
        torch.set_num_threads(threads)
    mine = checkpoint.open_checkpoint(path)[1]
    theirs = checkpoint.open_checkpoint(other / "checkpoint.safetensors")[1]
    assert sorted(mine) == sorted(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    model = tiny()
    config = msgspec.structs.replace(SHORT, num_steps=1, gradient_accumulation_steps=1)
    train(model, mend_trainable(MEND), cases(), config, checkpoint_dir=tmp_path)
    other = msgspec.structs.replace(config, lr=1e-3)
    with pytest.raises(InvalidInputError, match="config is"):
        train(model, mend_trainable(MEND), cases(), other, checkpoint_dir=tmp_path)


def test_cases_that_do_not_suit_are_refused():
    lacking = [case._replace(probes={"rephrase": case.probes["rephrase"]}) for case in cases(3)]
    with pytest.raises(InvalidInputError, match="(?s)leave fewer.*no 'image_rephrase'"):
        train(tiny(), mend_trainable(MEND), lacking, SHORT)
    with pytest.raises(InvalidInputError, match="lr_by_group must name some of networks, edit_lrs"):
        train(
            tiny(),
            mend_trainable(MEND),
            cases(),
            msgspec.structs.replace(SHORT, lr_by_group={"net": 1.0}),
        )
