"""Reading: templates, joint tokenisation, labels, padding, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from errata.adapters import PRESETS, Template, adapt, preset, tiny
from errata.adapters.collate import assemble
from errata.adapters.read import reader
from errata.adapters.text import gap, scored
from errata.adapters.tiny import TINY, tiny_tokenizer
from errata.functional import IGNORE, Inputs, ModelCard, Query
from errata.functional.errors import BadInput, BadSettings, ModelUnsupported

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"the peers' golden vectors are not here (looked in {GOLDEN})"
)


def picture(red: int = 90, width: int = 40, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (red, 20, 200))


def model(name: str, **settings):
    return adapt(*tiny(name), **settings)


def text(name: str, inputs: Inputs, row: int = 0) -> str:
    processor = tiny(name)[1]
    ids = inputs.ids[row][inputs.mask[row] & ~inputs.image[row]]
    return getattr(processor, "tokenizer", processor).decode(ids)


# ---- labels


@pytest.mark.parametrize("name", TINY)
def test_labels_are_the_targets_tokens_and_at_points_before_them(name):
    found = model(name)
    targets = ["a red dog", "the president of the country", "7", "naïve – ‘quoted’\nline"]
    rows = [Query("what is in the city?", target) for target in targets]
    if found.card.images:
        rows = [row._replace(images=(picture(),)) for row in rows]
    inputs = found.read(rows)
    for row, target in enumerate(targets):
        labels = inputs.labels[row][inputs.labels[row] != IGNORE]
        at = inputs.at[row, : len(labels)]
        assert found.write(labels).strip() == target
        assert torch.equal(inputs.ids[row, at + 1], labels)
        assert inputs.mask[row, at + 1].all()
        assert not inputs.mask[row, int(at[-1]) + 2 :].any(), "the target ends the row"
        assert (inputs.at[row, len(labels) :] == 0).all()


@pytest.mark.parametrize("name", TINY)
def test_rows_are_padded_on_the_right_and_do_not_depend_on_each_other(name):
    found = model(name)
    rows = [Query("who?", "a cat"), Query("what is in the city of the river?", "the old town")]
    if found.card.images:
        rows.append(Query("and here?", "dog", (picture(),)))
    together = found.read(rows)
    for row, query in enumerate(rows):
        alone = found.read([query])
        length = alone.ids.shape[1]
        assert alone.mask.all()
        assert torch.equal(together.ids[row, :length], alone.ids[0])
        assert together.mask[row].tolist() == [True] * length + [False] * (
            together.ids.shape[1] - length
        )
        assert torch.equal(together.labels[row, : alone.labels.shape[1]], alone.labels[0])
        assert torch.equal(together.image[row, :length], alone.image[0])
        assert together.keys[row] == alone.keys[0]


def test_a_token_across_the_boundary_belongs_to_the_answer():
    """`ab` is one token: prompt "xa" and target "b" share it, and it is scored."""
    bpe = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="x")
    module, _ = tiny("gpt2")
    card = adapt(module, tiny_tokenizer()).card
    read = reader(tokenizer, module.config, card, Template(chat=False, gap=""))
    inputs = read([Query("xa", "b")])
    assert inputs.ids.tolist() == [[0, 3]]
    assert inputs.labels.tolist() == [[3]]
    assert inputs.at.tolist() == [[0]]


def test_a_lone_space_is_scored_whether_its_characters_are_trimmed_or_not():
    # "Q:" + " " + "7": the space a token of its own, spanning itself, or trimmed to nothing
    assert scored([(0, 2), (2, 3), (3, 4)], 2) == range(1, 3)
    assert scored([(0, 2), (2, 2), (3, 4)], 2) == range(1, 3)
    assert scored([(0, 2), (3, 3), (3, 4)], 2) == range(1, 3)


def test_special_tokens_behind_the_answer_are_not_scored():
    assert scored([(0, 1), (1, 3), (0, 0)], 1) == range(1, 2)
    assert scored([(0, 1)], 1) == range(0)


def test_the_end_token_is_scored_only_when_asked_for():
    module, processor = tiny("qwen2_vl")
    plain = adapt(module, processor).read([Query("who?", "a cat")])
    for end in (True, "<|im_end|>"):
        inputs = adapt(module, processor, template=Template(end=end)).read([Query("who?", "a cat")])
        assert processor.tokenizer.decode(inputs.labels[0][-1:]) == "<|im_end|>"
        assert torch.equal(inputs.labels[0][:-1], plain.labels[0])


def test_without_targets_nothing_is_scored():
    inputs = model("llava").read([Query("who?"), Query("what is it?", images=(picture(),))])
    assert inputs.labels.shape == (2, 0)
    assert inputs.at.shape == (2, 0)


# ---- templates


def test_a_gap_is_one_space_unless_one_is_there():
    free = Template()
    assert gap(free, "Answer:", "cat", ()) == " "
    assert gap(free, "Answer: ", "cat", ()) == ""
    assert gap(free, "assistant\n", "cat", ()) == ""
    assert gap(free, "Answer:", " cat", ()) == ""
    assert gap(free, "Q<end>", "cat", ("<end>",)) == ""
    assert gap(Template(gap=" "), "assistant\n", "cat", ()) == " "
    assert gap(Template(gap=""), "Answer:", "cat", ()) == ""


WRITTEN = {  # preset, family -> what stands in the row, pictures left out
    ("default", "llava"): "<s>USER: \nwhat is it? ASSISTANT: dog",
    ("default", "blip2"): "<s>Question: what is it? Answer: dog",
    ("default", "minigpt4"): "<s>###Human: <Img></Img> what is it?###Assistant: dog",
    ("default", "qwen2_vl"): (
        "<|im_start|>user\n<|vision_start|><|vision_end|>what is it?<|im_end|>\n"
        "<|im_start|>assistant\ndog"
    ),
    ("plain", "qwen2_vl"): "<|vision_start|><|vision_end|>what is it? dog",
    ("plain", "llava"): "<s>what is it? dog",
    ("easyedit", "blip2"): "what is it? dog",
    ("easyedit", "minigpt4"): "###Human: <Img></Img> what is it? dog",
    ("easyedit", "llava"): "<s>USER: \nwhat is it? ASSISTANT:dog",
    ("easyedit-trainer", "llava"): "<s>USER: \nwhat is it? ASSISTANT: dog",
    ("easyedit-trainer", "qwen2_vl"): (
        "<|im_start|>user\n<|vision_start|><|vision_end|>what is it?<|im_end|>\n"
        "<|im_start|>assistant\n dog"
    ),
    ("vlkeb", "llava"): "<s>what is it? dog",
    ("vlkeb", "minigpt4"): "###Human: <Img></Img> what is it? dog",
    ("mmke", "blip2"): "what is it? dog",
    ("liveedit", "blip2"): "<s>what is it? dog",
    ("liveedit", "llava"): "<s>\nwhat is it? dog",
    ("liveedit", "minigpt4"): "<s>\nwhat is it? dog",
}


@pytest.mark.parametrize(("name", "family"), WRITTEN, ids=lambda part: part)
def test_a_preset_writes_what_its_makers_write(name, family):
    inputs = model(family, template=name).read([Query("what is it?", "dog", (picture(),))])
    assert text(family, inputs) == WRITTEN[name, family]
    assert inputs.image.any()


@pytest.mark.parametrize(
    ("name", "family", "want"),
    [
        ("default", "minigpt4", "<s>###Human: what is it?###Assistant: dog"),
        ("easyedit", "minigpt4", "what is it? dog"),
        ("liveedit", "llava", "<s>what is it? dog"),
        ("vlkeb", "llava", "<s>what is it? dog"),
        ("ice", "llama", "<s>what is it? dog"),
    ],
)
def test_without_a_picture_its_wrapping_goes(name, family, want):
    inputs = model(family, template=name).read([Query("what is it?", "dog")])
    assert text(family, inputs) == want
    assert not inputs.image.any()


def test_pictures_stand_where_their_family_has_them():
    image = picture()
    for name, first in (("blip2", 0), ("llava", len("<s>USER: ") - 4)):
        inputs = model(name).read([Query("what is it?", "dog", (image,))])
        row = inputs.image[0].nonzero()[:, 0]
        assert row.tolist() == list(range(int(row[0]), int(row[0]) + len(row)))
        assert int(row[0]) == first if name == "blip2" else int(row[0]) > 0
    inputs = model("minigpt4", template="liveedit").read([Query("q", "dog", (image,))])
    assert inputs.image[0].tolist()[:6] == [False, True, True, True, True, False]  # <s>, 4 queries


def test_minigpt4_tokenises_the_wrapping_apart_from_the_question_for_easyedit():
    module, processor = tiny("minigpt4")
    inputs = adapt(module, processor, template="easyedit").read([Query("is it", "x", (picture(),))])
    apart = [
        processor.tokenizer(part, add_special_tokens=False).input_ids
        for part in ("###Human: <Img>", "</Img> ", "is it x")
    ]
    want = apart[0] + [module.config.image_token_index] * 4 + apart[1] + apart[2]
    assert inputs.ids[0].tolist() == want


def test_a_prompt_says_where_its_pictures_stand():
    images = (picture(1), picture(2))
    found = model("qwen2_vl").read([Query("First <image> then <image>: which?", "x", images)])
    said = text("qwen2_vl", found)
    mark = "<|vision_start|><|vision_end|>"
    assert f"user\nFirst {mark} then {mark}: which?<|im_end|>" in said
    blip = model("minigpt4").read([Query("First <image> then <image>?", "x", images)])
    assert "Human: First <Img></Img>  then <Img></Img> ?###" in text("minigpt4", blip)


def test_a_template_of_ones_own():
    template = Template(
        name="mine", system="Be brief.", prompt="Question: {prompt} Short answer:", gap=" "
    )
    inputs = model("qwen2_vl", template=template).read([Query("who?", "a cat")])
    assert text("qwen2_vl", inputs) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "Question: who? Short answer:<|im_end|>\n<|im_start|>assistant\n a cat"
    )


def test_an_unknown_template_is_refused_with_the_names():
    with pytest.raises(BadSettings, match=r"one of default, .*; got 'easyedti'\. Did you mean"):
        preset("easyedti", "llava")
    assert all(preset(name, "llava").name == name for name in PRESETS)


def test_a_chat_template_that_ignores_pictures_gets_them_written():
    module, processor = tiny("llava")
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] if m['content'] is string else '' }}"
        "{% endfor %}"
    )
    inputs = adapt(module, processor).read([Query("what?", "dog", (picture(),))])
    assert inputs.image.sum() == 9
    assert "what?dog" in text("llava", inputs).replace(" ", "")


# ---- what is refused


def refused(name: str, *queries: Query) -> str:
    with pytest.raises(BadInput) as error:
        model(name).read(list(queries))
    return str(error.value)


def test_every_violation_of_a_batch_is_listed(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    said = refused(
        "llava",
        Query("fine", "cat", (picture(),)),
        Query("blank", "  \n", (picture(),)),
        Query("gone", "cat", (tmp_path / "gone.png", tmp_path / "page.jpg")),
        Query("moving", "cat", (picture(),), video=True),
    )
    for part in (
        "query 2 ('blank'): the target must hold more than white space",
        "query 3 ('gone')", "gone.png", "page.jpg", "query 4 ('moving')", "takes no video",
    ):  # fmt: skip
        assert part in said
    assert "query 1" not in said


def test_a_scored_batch_needs_every_target():
    assert "query 2 ('b'): no target" in refused("llama", Query("a", "x"), Query("b"))


def test_pictures_for_a_text_model_are_refused():
    assert "takes no images, got 1: leave them out" in refused("llama", Query("a", "x", (1,)))


@pytest.mark.parametrize(
    ("name", "token"),
    [("llava", "<image>"), ("qwen2_vl", "<|image_pad|>"), ("qwen3_vl", "<|video_pad|>")],
)
def test_a_prompt_can_not_forge_pictures(name, token):
    if name == "qwen3_vl":  # its video placeholder comes with marks around it
        token = f"<|vision_start|>{token}<|vision_end|>"
    said = refused(name, Query(f"look {token} here", "x"))
    assert "one placeholder per picture, 0 in all, and has 1: take" in said
    assert "one placeholder" in refused(name, Query(f"{token} {token}", "x", (picture(),)))


def test_a_row_longer_than_the_context_is_refused():
    said = refused("llava", Query("x " * 600, "cat"), Query("short", "cat"))
    assert "query 1" in said
    assert "at most 512 tokens" in said
    assert "query 2" not in said


def test_an_answer_that_nothing_predicts_is_refused():
    assert "nothing predicts" in refused("gpt2", Query("", "cat"))
    assert "no token at all" in refused("gpt2", Query(""))


def test_prompts_must_be_text():
    assert "must be text, got NoneType and int" in refused("llama", Query(None, 3))


def test_videos_of_unequal_length_can_not_share_a_batch_of_onevision():
    frames = tuple(picture(red) for red in range(4))
    with pytest.raises(BadInput, match=r"same number of frames, got \[2, 4\]: read them apart"):
        model("llava_onevision").read(
            [Query("a", "x", frames[:2], video=True), Query("b", "y", frames, video=True)]
        )


def test_tiles_are_filled_with_zeros():
    joined = assemble([{"p": torch.ones(1, 2, 3)}, {}, {"p": torch.ones(2, 4, 3)}])
    assert joined["p"].shape == (3, 4, 3)
    assert joined["p"].sum() == 2 * 3 + 8 * 3


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

        def get_added_vocab(self):
            return {}

    module, _ = tiny("gpt2")
    card = ModelCard(
        family="gpt2", id="x", num_layers=1, width=1, vocab=1, context=1, layers="h", head="h"
    )
    with pytest.raises(ModelUnsupported, match="must give character offsets, and Slow does not"):
        reader(Slow(), module.config, card)


def test_pixels_are_made_once_per_picture(monkeypatch):
    module, processor = tiny("llava")
    calls = []
    inner = type(processor.image_processor).__call__

    def counted(self, images, **settings):
        calls.append(len(images))
        return inner(self, images, **settings)

    monkeypatch.setattr(type(processor.image_processor), "__call__", counted)
    read = adapt(module, processor).read
    first = read([Query("who?", "x", (picture(),)), Query("what?", "y", (picture(),))])
    again = read([Query("where?", "z", (picture(),))])
    assert calls == [1]
    assert torch.equal(first.pixels["pixel_values"][:1], again.pixels["pixel_values"])
    assert first.keys == (again.keys[0],) * 2


# ---- the peers' own tensors


def unpatched(rows: torch.Tensor, grid: torch.Tensor, patch: int, merge: int) -> torch.Tensor:
    """A picture [3 H W] from Qwen's rows of patches (its first frame)."""
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
    from errata.adapters.load import load_parts

    notes = json.loads((GOLDEN / f"{name}.json").read_text())
    module, processor, _ = load_parts(GOLDEN / "models" / folder)
    return notes["queries"], load_file(GOLDEN / f"{name}.safetensors"), module, processor


@needs_golden
def test_liveedit_on_blip2_byte_for_byte():
    """Fifteen E-VQA rows as LiveEdit's own code turned them into tensors."""
    rows, want, module, processor = golden("mmedit_inputs_blip2", "blip2-micro")
    found = adapt(module, processor, template="liveedit")
    images = processor.image_processor
    for row in rows:
        name = row["key"]
        pixels = want.get(f"{name}.pixel_values")
        seen = () if pixels is None else (as_bytes(pixels[0], images.image_mean, images.image_std),)
        inputs = found.read([Query(row["prompt"], row["target"], seen)])
        scored_there = want[f"{name}.mask"][0].bool()
        assert torch.equal(inputs.ids[0][~inputs.image[0]], want[f"{name}.input_ids"][0]), name
        assert torch.equal(inputs.labels[0], want[f"{name}.labels"][0][scored_there]), name
        assert int(inputs.image.sum()) == (row["vt_range"] or [0, 0])[1]
        if seen:
            torch.testing.assert_close(inputs.pixels["pixel_values"], pixels, rtol=0, atol=1e-6)
        with torch.no_grad():
            logits = found.decode(found.params, found.embed(found.params, inputs))
        # the peer's first label sits on the prompt's last position, as ours; its last is masked
        tail = want[f"{name}.logits_tail_pre"][0][: len(inputs.labels[0])]
        torch.testing.assert_close(logits[0], tail, rtol=1e-5, atol=1e-5)


@needs_golden
def test_easyedit_on_qwen2_vl_byte_for_byte():
    """Thirty E-VQA rows, fifteen with an in-context prefix, as EasyEdit's own code read them."""
    rows, want, module, processor = golden("easyedit_inputs_qwen2-vl", "qwen2-vl-micro")
    found = adapt(module, processor, template="easyedit")
    images = processor.image_processor
    for row in rows:
        name = row["key"]
        base = name.replace(".ike", "")  # the prefixed rows show the same pictures
        pixels, grid = (
            want.get(f"{base}.in.{part}") for part in ("pixel_values", "image_grid_thw")
        )
        seen = ()
        if pixels is not None:
            shown = unpatched(pixels, grid[0], images.patch_size, images.merge_size)
            seen = (as_bytes(shown, images.image_mean, images.image_std),)
        inputs = found.read([Query(row["prompt"], row["target"], seen)])
        labels = want[f"{name}.labels"][0]
        assert torch.equal(inputs.ids[0], want[f"{name}.in.input_ids"][0]), name
        assert torch.equal(inputs.labels[0], labels[labels != IGNORE]), name
        assert torch.equal(inputs.at[0] + 1, (labels != IGNORE).nonzero()[:, 0]), name
        assert torch.equal(inputs.pixels["mm_token_type_ids"], want[f"{name}.in.mm_token_type_ids"])
        if seen:
            assert torch.equal(inputs.pixels["image_grid_thw"], grid)
            torch.testing.assert_close(inputs.pixels["pixel_values"], pixels, rtol=0, atol=1e-6)
        with torch.no_grad():
            logits = found.decode(found.params, found.embed(found.params, inputs))
        tail = want[f"{name}.logits_tail_pre"][0]
        torch.testing.assert_close(logits[0], tail[: len(logits[0])], rtol=1e-5, atol=1e-5)
