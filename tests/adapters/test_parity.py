"""The peers' own tensors: real E-VQA records as LiveEdit and EasyEdit read them, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from errata.adapters import from_module
from errata.functional import IGNORE_INDEX, Query

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"the peers' golden vectors are not here (looked in {GOLDEN})"
)


def unpatched(rows: torch.Tensor, grid: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """An image [3 H W] from Qwen's rows of patches (its first frame)."""
    _, high, wide = grid.tolist()
    rows = rows.view(high // merge, wide // merge, merge, merge, 3, -1, patch, patch)[
        :, :, :, :, :, 0
    ]
    return rows.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, high * patch, wide * patch)


def as_bytes(pixels: torch.Tensor, mean: list[float], std: list[float]) -> Image.Image:
    values = (pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255
    rounded = values.round().clamp(0, 255)
    assert (values - rounded).abs().max() < 1e-3, "the peer's pixels are bytes, normalised"
    return Image.fromarray(rounded.to(torch.uint8).permute(1, 2, 0).numpy())


def golden(name: str, folder: str):
    from errata.adapters.loading.load import load_parts

    notes = json.loads((GOLDEN / f"{name}.json").read_text())
    module, processor, _ = load_parts(GOLDEN / "models" / folder)
    return notes["queries"], load_file(GOLDEN / f"{name}.safetensors"), module, processor


@needs_golden
def test_liveedit_on_blip2_byte_for_byte():
    """Fifteen E-VQA rows as LiveEdit's own code turned them into tensors."""
    rows, want, module, processor = golden("mmedit_inputs_blip2", "blip2-micro")
    found = from_module(module, processor, template="liveedit")
    images = processor.image_processor
    for row in rows:
        name = row["key"]
        pixels = want.get(f"{name}.pixel_values")
        seen = () if pixels is None else (as_bytes(pixels[0], images.image_mean, images.image_std),)
        inputs = found.preprocess([Query(row["prompt"], row["target"], seen)])
        scored_there = want[f"{name}.mask"][0].bool()
        assert torch.equal(
            inputs.input_ids[0][~inputs.image_mask[0]], want[f"{name}.input_ids"][0]
        ), name
        assert torch.equal(inputs.labels[0], want[f"{name}.labels"][0][scored_there]), name
        assert int(inputs.image_mask.sum()) == (row["vt_range"] or [0, 0])[1]
        if seen:
            torch.testing.assert_close(
                inputs.vision_inputs["pixel_values"], pixels, rtol=0, atol=1e-6
            )
        with torch.no_grad():
            logits = found.decode(found.params, found.embed(found.params, inputs))
        # the peer's first label sits on the prompt's last position, as ours; its last is masked
        tail = want[f"{name}.logits_tail_pre"][0][: len(inputs.labels[0])]
        torch.testing.assert_close(logits[0], tail, rtol=1e-5, atol=1e-5)


@needs_golden
def test_easyedit_on_qwen2_vl_byte_for_byte():
    """Thirty E-VQA rows, fifteen with an in-context prefix, as EasyEdit's own code read them."""
    rows, want, module, processor = golden("easyedit_inputs_qwen2-vl", "qwen2-vl-micro")
    found = from_module(module, processor, template="easyedit")
    images = processor.image_processor
    for row in rows:
        name = row["key"]
        base = name.replace(".ike", "")  # the prefixed rows show the same images
        pixels, grid = (
            want.get(f"{base}.in.{part}") for part in ("pixel_values", "image_grid_thw")
        )
        seen = ()
        if pixels is not None:
            shown = unpatched(pixels, grid[0], images.patch_size, images.merge_size)
            seen = (as_bytes(shown, images.image_mean, images.image_std),)
        inputs = found.preprocess([Query(row["prompt"], row["target"], seen)])
        labels = want[f"{name}.labels"][0]
        assert torch.equal(inputs.input_ids[0], want[f"{name}.in.input_ids"][0]), name
        assert torch.equal(inputs.labels[0], labels[labels != IGNORE_INDEX]), name
        assert torch.equal(
            inputs.logit_positions[0] + 1, (labels != IGNORE_INDEX).nonzero()[:, 0]
        ), name
        assert torch.equal(
            inputs.vision_inputs["mm_token_type_ids"], want[f"{name}.in.mm_token_type_ids"]
        )
        if seen:
            assert torch.equal(inputs.vision_inputs["image_grid_thw"], grid)
            torch.testing.assert_close(
                inputs.vision_inputs["pixel_values"], pixels, rtol=0, atol=1e-6
            )
        with torch.no_grad():
            logits = found.decode(found.params, found.embed(found.params, inputs))
        tail = want[f"{name}.logits_tail_pre"][0]
        torch.testing.assert_close(logits[0], tail[: len(logits[0])], rtol=1e-5, atol=1e-5)
