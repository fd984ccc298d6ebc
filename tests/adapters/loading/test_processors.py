"""Processors without torchvision: the frames and ids Hugging Face's own would give."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from errata.adapters import from_module, tiny_model
from errata.adapters.families.llava_onevision import onevision_frames
from errata.adapters.families.qwen2_vl import qwen2_frames
from errata.adapters.families.qwen3_vl import qwen3_frames
from errata.adapters.inputs.hf_processor import HFQueryProcessor
from errata.adapters.inputs.templates import get_template
from errata.adapters.inputs.vision_inputs import split_processor
from errata.adapters.loading.processors import build_hf_processor
from errata.functional import Query
from errata.functional.errors import InvalidInputError

GOLDEN = Path(__file__).parents[2] / "golden" / "video_frames.safetensors"
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SHAPE = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "resample": 3,
    "size": {"shortest_edge": 256, "longest_edge": 1024},
    "cap_pixels_per_frame": False,
}
CASES = {  # name -> (function, settings, frames, width, height, the stock class)
    "qwen2": (qwen2_frames, SHAPE | CLIP, 3, 50, 40, "qwen2_vl"),
    "qwen2.small": (qwen2_frames, SHAPE | CLIP, 2, 9, 13, "qwen2_vl"),
    "qwen3": (
        qwen3_frames,
        SHAPE | HALF | {"size": {"shortest_edge": 256, "longest_edge": 2048}},
        3,
        50,
        40,
        "qwen3_vl",
    ),
    "onevision": (
        onevision_frames,
        CLIP | {"size": {"height": 24, "width": 24}},
        2,
        50,
        40,
        "llava_onevision",
    ),
}
VISION_FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def frame(number: int, width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    colors = [(x * 7 + number * 31) % 256, (y * 11 + x) % 256, (x * y + 5 * number) % 256]
    return Image.fromarray(np.stack(colors, -1).astype(np.uint8))


def frames(count: int, width: int, height: int) -> list[Image.Image]:
    return [frame(number, width, height) for number in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_frames_are_those_of_hugging_face(name):
    make, settings, count, width, height, _ = CASES[name]
    got = make(frames(count, width, height), settings)
    want = load_file(GOLDEN)
    # One grey level is 1 / (255 * 0.26) = 0.015: other processors may round one differently.
    torch.testing.assert_close(got["pixel_values_videos"], want[name], rtol=0, atol=0.016)
    assert (got["pixel_values_videos"] != want[name]).float().mean() < 0.01
    if "video_grid_thw" in got:
        assert torch.equal(got["video_grid_thw"], want[f"{name}.grid"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("count", "width", "height"), [(2, 50, 40), (5, 160, 90), (4, 33, 64)])
def test_frames_are_those_of_torchvision_where_it_is(name, count, width, height):
    make, settings, *_, family = CASES[name]
    if importlib.util.find_spec("torchvision") is None:
        # Without it the stock classes cannot be built: the stored vectors above stand for them.
        assert GOLDEN.is_file()
        return
    from transformers.models.auto.video_processing_auto import (
        VIDEO_PROCESSOR_MAPPING_NAMES as names,
    )
    from transformers.models.auto.video_processing_auto import video_processor_class_from_name

    found = names[family]
    stock = video_processor_class_from_name(
        found if isinstance(found, str) else found["torchvision"]
    )
    video = np.stack([np.asarray(part) for part in frames(count, width, height)])
    want = stock(**settings)([video], return_tensors="pt", do_sample_frames=False)
    got = make(frames(count, width, height), settings)
    assert torch.equal(got["pixel_values_videos"], want["pixel_values_videos"])


def test_a_patch_row_holds_one_patch_of_two_frames():
    settings = SHAPE | CLIP | {"do_resize": False, "do_rescale": False, "do_normalize": False}
    photos = frames(2, 16, 8)
    got = qwen2_frames(photos, settings)
    assert got["video_grid_thw"].tolist() == [[1, 2, 4]]
    video = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in photos])
    # merged cells of 2 x 2 come together: the third row is the left patch of the lower line
    want = video[:, :, 4:8, 0:4].permute(1, 0, 2, 3).reshape(-1).float()
    assert torch.equal(got["pixel_values_videos"][2], want)


def test_frames_of_two_sizes_are_refused():
    with pytest.raises(InvalidInputError, match="one size, got 20 x 20, 30 x 20"):
        qwen2_frames([frame(0, 30, 20), frame(1, 20, 20)], SHAPE | CLIP)


def test_a_frame_far_from_square_is_refused():
    with pytest.raises(InvalidInputError, match="200 to 1, got 1000 x 4"):
        qwen2_frames(frames(2, 1000, 4), SHAPE | CLIP)


def test_one_frame_is_no_video_for_qwen3():
    with pytest.raises(InvalidInputError, match="at least 2 frames, got 1"):
        qwen3_frames(frames(1, 32, 32), SHAPE | HALF)


@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_our_reading_is_the_stock_processors(name, rows):
    """Ids, masks, labels and pixels of one, no and several images, alone and in one batch."""
    module, processor = tiny_model(name)
    model = from_module(module, processor)
    queries = [
        Query("what is it?", "two dogs", (frame(0, 50, 40),)),
        Query("no picture here", "red cat"),
        Query("several", "x", (frame(1, 40, 40), frame(2, 30, 60))),
    ]
    chosen = [queries[row] for row in rows]
    found = split_processor(processor, module.config)
    want = HFQueryProcessor(found, get_template("default"), model.card)(chosen)
    got = model.preprocess(chosen)
    for field in ("input_ids", "attention_mask", "image_mask", "labels", "logit_positions"):
        assert torch.equal(getattr(got, field), getattr(want, field)), field
    assert got.vision_inputs.keys() == want.vision_inputs.keys()
    for part, pixels in want.vision_inputs.items():
        assert torch.equal(got.vision_inputs[part], pixels), part
    assert got.content_ids == want.content_ids
    ends = HFQueryProcessor(found, get_template("default"), model.card)(chosen, append_eos=True)
    assert torch.equal(ends.labels, model.preprocess(chosen, append_eos=True).labels)
    assert ends.labels.shape[1] == want.labels.shape[1] + 1


def test_blip2_reads_as_its_processor_does():
    module, processor = tiny_model("blip2")
    model = from_module(module, processor)
    image = frame(0, 50, 40)
    got = model.preprocess([Query("what is it?", "dog", (image,))])
    want = processor(images=image, text="Question: what is it? Answer: dog", return_tensors="pt")
    assert torch.equal(got.input_ids, want["input_ids"])
    assert torch.equal(got.vision_inputs["pixel_values"], want["pixel_values"])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_video_tokens_are_as_many_as_features(name):
    module, processor = tiny_model(name)
    model = from_module(module, processor)
    query = Query("what moves?", "a cat", tuple(frames(3, 50, 40)), video=True)
    inputs = model.preprocess([query])
    with torch.no_grad():
        batch = model.embed(model.params, inputs)
        logits = model.decode(model.params, batch)
    assert inputs.image_mask.sum() > 0
    assert torch.isfinite(logits).all()
    still = model.preprocess([query._replace(images=tuple(frames(1, 50, 40)) * 3)])
    with torch.no_grad():
        other = model.decode(model.params, model.embed(model.params, still))
    assert not torch.equal(logits, other), "frames must reach the answer"


def test_qwen3_tells_each_step_its_time():
    module, processor = tiny_model("qwen3_vl")
    model = from_module(module, processor)
    inputs = model.preprocess([Query("when?", "now", tuple(frames(5, 32, 32)), video=True)])
    text = processor.tokenizer.decode(inputs.input_ids[0])
    # 24 frames a second, each step named after the middle of its two frames
    for time in ("<0.0 seconds>", "<0.1 seconds>", "<0.2 seconds>"):
        assert text.count(time) == 1
    assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == 3


def test_a_stock_class_that_wants_video_reads_pictures_without_torchvision(tmp_path):
    """What families found by structure get; tried on one whose reading we know."""
    module, processor = tiny_model("qwen2_vl")
    processor.save_pretrained(tmp_path)
    chat = {"chat_template": processor.chat_template}
    found = build_hf_processor(str(tmp_path), module.config, chat)
    model = from_module(module, processor)
    whole = HFQueryProcessor(
        split_processor(found, module.config), get_template("default"), model.card
    )
    query = Query("what is it?", "two dogs", (frame(0, 50, 40),))
    got, want = whole([query]), model.preprocess([query])
    assert torch.equal(got.input_ids, want.input_ids)
    assert torch.equal(got.vision_inputs["pixel_values"], want.vision_inputs["pixel_values"])
    assert type(found).__name__ == "Qwen2VLProcessor"
