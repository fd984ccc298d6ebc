"""The pool of experts grows in place, and no state sees what another one adds."""

from __future__ import annotations

import threading

import pytest
import torch

from errata import adapters
from errata.editors.liveedit.config import LiveEditConfig
from errata.editors.liveedit.editor import liveedit_editor
from errata.editors.liveedit.networks import ExpertPool
from errata.editors.liveedit.pool import append_experts, new_buffer
from errata.functional import Query


def experts(*values: float) -> ExpertPool:
    rows = torch.tensor(values)[:, None]
    return ExpertPool(*(rows * (part + 1) for part in range(len(ExpertPool._fields))))


def test_two_branches_of_one_state_do_not_disturb_each_other():
    root = append_experts(new_buffer(experts(1.0)), 1, experts(2.0))
    first = append_experts(root, 2, experts(3.0))
    second = append_experts(root, 2, experts(4.0))
    assert first.experts.down is root.experts.down  # the free rows were taken without a copy
    assert second.experts.down is not root.experts.down
    assert first.experts.down[:3, 0].tolist() == experts(1.0, 2.0, 3.0).down[:, 0].tolist()
    assert second.experts.down[:3, 0].tolist() == experts(1.0, 2.0, 4.0).down[:, 0].tolist()


def test_appending_copies_seldom():
    buffer, copies = new_buffer(experts(0.0)), 0
    for number in range(1, 1000):
        before = buffer.experts.down.data_ptr()
        buffer = append_experts(buffer, number, experts(float(number)))
        copies += buffer.experts.down.data_ptr() != before
    assert copies <= 11
    assert (
        buffer.experts.up[:1000, 0].tolist() == experts(*map(float, range(1000))).up[:, 0].tolist()
    )


def test_threads_take_different_rows():
    root = append_experts(new_buffer(experts(1.0)), 1, experts(2.0))
    done = {}

    def run(value: float) -> None:
        done[value] = append_experts(root, 2, experts(value))

    threads = [threading.Thread(target=run, args=(float(k),)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value, buffer in done.items():
        assert buffer.experts.down[2].tolist() == experts(value).down[0].tolist()
        assert buffer.experts.down[:2].tolist() == experts(1.0, 2.0).down.tolist()


@pytest.mark.parametrize("count", [1, 12])
def test_an_older_state_edits_as_if_no_other_had(count):
    model = adapters.from_module(*adapters.tiny_model("llama"))
    editor = liveedit_editor(LiveEditConfig(untrained=True, feature_dim=8, num_heads=2))
    state = editor.init(model, torch.Generator().manual_seed(0))
    for number in range(count):
        delta, state = editor.edit(model, state, [Query(f"who is number {number}?", "bo")])
    kept = {name: tensor.clone() for name, tensor in delta.tensors.items()}
    one, _ = editor.edit(model, state, [Query("where?", "rome")])
    two, _ = editor.edit(model, state, [Query("when?", "now")])
    again, _ = editor.edit(model, state, [Query("where?", "rome")])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in delta.tensors.items())
    assert all(torch.equal(tensor, one.tensors[name]) for name, tensor in again.tensors.items())
    assert any(not torch.equal(tensor, one.tensors[name]) for name, tensor in two.tensors.items())
