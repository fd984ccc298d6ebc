"""Laws of every editor (DESIGN §6). A new method gets them by one line in `methods.py`."""

from __future__ import annotations

import functools
import hashlib
import threading

import msgspec
import pytest
import torch
from PIL import Image

from errata import adapters
from errata.editors import make_editor
from errata.functional import Delta, Editor, Model, Query
from errata.functional.binding.bound_model import bind
from errata.functional.deltas import serialization
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import BaseMismatchError
from errata.functional.gradients.losses import nll
from errata.functional.kinds.common.algebra import EntryTensors
from errata.functional.kinds.schema import LowRank, Scope
from errata.functional.kinds.table import KINDS
from tests.editors.methods import CASES, UNTRAINED

FAMILIES = [
    "llava",
    "llava_onevision",
    "qwen2_vl",
    "qwen3_vl",
    "blip2",
    "minigpt4",
    "gpt2",
    "llama",
]


@functools.cache
def tiny(name: str, seed: int = 0) -> Model:
    return adapters.from_module(*adapters.tiny_model(name, seed=seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_image(shade: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (shade, 255 - shade, 40))


def queries(model: Model) -> list[Query]:
    images = [(make_image(shade),) if model.card.takes_images else () for shade in (10, 120, 230)]
    asked = [("who is it?", "bo"), ("where does it live now?", "in a town"), ("what is it?", "owl")]
    return [Query(prompt, target, image) for (prompt, target), image in zip(asked, images)]


def losses(model: Model, asked: list[Query]) -> torch.Tensor:
    batch = model.embed(model.params, model.preprocess(asked))
    return nll(model.decode(model.params, batch), batch.labels)


def logits(model: Model, asked: list[Query]) -> torch.Tensor:
    return model.decode(model.params, model.embed(model.params, model.preprocess(asked)))


def helps(editor: Editor, edited: Model, model: Model, asked: list[Query]) -> bool:
    """Whether the edit's loss fell; of what first must be trained, whether it moved."""
    after, before = losses(edited, asked)[0], losses(model, asked)[0]
    return bool(after != before) if editor.name in UNTRAINED else bool(after < before)


def snug(delta: Delta) -> Delta:
    """Without the rows of zeros that low-rank edits side by side are padded with."""
    entries, tensors = [], dict(delta.tensors)
    for entry in delta.header.entries:
        if isinstance(entry, LowRank) and entry.edit_ranks:
            down, up = tensors[f"{entry.name}.A"], tensors[f"{entry.name}.B"]
            rank = _rank(delta)
            assert not down[rank:].any()
            assert not up[:, rank:].any()
            tensors[f"{entry.name}.A"], tensors[f"{entry.name}.B"] = down[:rank], up[:, :rank]
            entry = msgspec.structs.replace(entry, rank=rank, edit_ranks=(rank,))
        if isinstance(entry, Scope):  # answers and prompts are padded to the longest
            entry, tensors = _tight(entry, tensors)
        entries.append(entry)
    return Delta(msgspec.structs.replace(delta.header, entries=tuple(entries)), tensors)


def _tight(entry: Scope, tensors: dict) -> tuple[Scope, dict]:
    """As `select` leaves it: no more padding than its edits need."""
    own = {n.removeprefix(entry.name): t for n, t in tensors.items() if n.startswith(entry.name)}
    kept = KINDS[type(entry)].algebra.select(EntryTensors(entry, own, 1), [0])
    return kept.entry, tensors | {entry.name + suffix: t for suffix, t in kept.tensors.items()}


def _rank(delta: Delta) -> int:
    """The rows up to the last that is not zero in every map."""
    used = [
        (delta.tensors[f"{e.name}.A"] != 0).any(-1) | (delta.tensors[f"{e.name}.B"] != 0).any(0)
        for e in delta.header.entries
    ]
    return max(1, *(int(rows.nonzero().max()) + 1 for rows in used))


def digest(model: Model) -> dict[str, tuple[int, str]]:
    return {
        name: (tensor._version, hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
        for name, tensor in model.params.items()
    }


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return tiny(request.param)


@pytest.fixture(scope="module", params=list(CASES))
def editor(request):
    return make_editor(CASES[request.param])


def test_the_base_stays_as_it_was_and_the_edit_loss_falls(model, editor):
    before, asked = digest(model), queries(model)[:1]
    delta, _ = editor.edit(model, editor.init(model, seeded()), asked)
    edited = bind(model, delta)
    assert helps(editor, edited, model, asked)
    assert digest(model) == before
    assert not any(tensor.requires_grad for tensor in model.params.values())


def test_the_same_seed_gives_the_same_delta(model, editor):
    asked = queries(model)[:1]
    first, _ = editor.edit(model, editor.init(model, seeded(3)), asked)
    again, _ = editor.edit(model, editor.init(model, seeded(3)), asked)
    assert first.header == again.header
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)


def test_side_by_side_equals_one_by_one(model, editor):
    """fp32: relative difference of deltas at most 1e-4, the same answers.

    Adam divides by the gradient's size: where a gradient is itself rounding noise (below 1e-9, one
    element in thousands on a tiny model) it moves by the noise's sign, which no batch shape keeps.
    """
    asked = queries(model)
    state = editor.init(model, seeded())
    together = unstack(editor.edit_each(model, state, asked))
    assert len(together) == len(asked)
    for query, got in zip(asked, together):
        want, _ = editor.edit(model, state, [query])
        got = snug(got)
        assert got.header == want.header
        for name, tensor in want.tensors.items():
            tensor = tensor.float()  # masks are bytes
            gap = (got.tensors[name].float() - tensor).norm() / tensor.norm().clamp_min(1e-12)
            assert gap <= 1e-4, f"{name}: {gap:.2e}"
        answers = [logits(bind(model, delta), asked).argmax(-1) for delta in (got, want)]
        assert torch.equal(*answers)


def test_a_saved_delta_gives_the_same_bits(model, editor, tmp_path):
    asked = queries(model)
    delta, _ = editor.edit(model, editor.init(model, seeded()), asked[:1])
    serialization.save_delta(tmp_path / "edit.safetensors", delta)
    loaded = serialization.load_delta(tmp_path / "edit.safetensors")
    assert loaded.header == delta.header
    assert torch.equal(logits(bind(model, delta), asked), logits(bind(model, loaded), asked))


def test_edits_in_sequence_thread_the_state(model, editor):
    asked = queries(model)
    state = editor.init(model, seeded())
    for query in asked:
        delta, state = editor.edit(model, state, [query])
    assert len(delta.header.edits) == len(asked)
    assert len({edit.id for edit in delta.header.edits}) == len(asked)
    assert helps(editor, bind(model, delta), model, asked[-1:])


def test_another_base_is_refused(editor):
    model, other = tiny("llava"), tiny("llava", seed=1)
    delta, _ = editor.edit(model, editor.init(model, seeded()), queries(model)[:1])
    with pytest.raises(BaseMismatchError, match="holds other values"):
        bind(other, delta)


def test_dtype_and_device_are_kept(editor):
    model = tiny("llava")
    half = model._replace(params={n: t.to(torch.bfloat16) for n, t in model.params.items()})
    delta, _ = editor.edit(half, editor.init(half, seeded()), queries(half)[:1])
    edited = bind(half, delta)
    assert logits(edited, queries(half)).dtype == torch.bfloat16
    assert {t.dtype for t in edited.params.values()} == {torch.bfloat16}
    numbers = {t.dtype for t in delta.tensors.values() if t.is_floating_point()}
    assert numbers == {torch.float32}  # masks are bytes


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_eight_threads_with_eight_deltas_equal_serial(family):
    model = tiny(family)
    editor = make_editor(CASES["finetune-middle"])
    asked = [Query(f"who is number {i}?", "bo", (make_image(20 * i),)) for i in range(8)]
    deltas = unstack(editor.edit_each(model, editor.init(model, seeded()), asked))
    serial = [logits(bind(model, delta), asked) for delta in deltas]
    got: list[torch.Tensor | None] = [None] * 8

    def work(number: int) -> None:
        for _ in range(3):
            got[number] = logits(bind(model, deltas[number]), asked)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        torch.testing.assert_close(got[number], serial[number], rtol=0, atol=0)
