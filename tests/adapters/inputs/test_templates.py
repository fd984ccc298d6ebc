"""Templates: what each preset writes, where images stand, templates of one's own."""

import pytest
from PIL import Image

from errata.adapters import TEMPLATES, PromptTemplate, from_module, get_template, tiny_model
from errata.adapters.inputs.prompt_format import answer_separator
from errata.functional import Inputs, Query
from errata.functional.errors import InvalidSettingsError


def make_image(red: int = 90, width: int = 40, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (red, 20, 200))


def model(name: str, **settings):
    return from_module(*tiny_model(name), **settings)


def text(name: str, inputs: Inputs, row: int = 0) -> str:
    processor = tiny_model(name)[1]
    ids = inputs.input_ids[row][inputs.attention_mask[row] & ~inputs.image_mask[row]]
    return getattr(processor, "tokenizer", processor).decode(ids)


def test_a_gap_is_one_space_unless_one_is_there():
    free = PromptTemplate()
    assert answer_separator(free, "Answer:", "cat", ()) == " "
    assert answer_separator(free, "Answer: ", "cat", ()) == ""
    assert answer_separator(free, "assistant\n", "cat", ()) == ""
    assert answer_separator(free, "Answer:", " cat", ()) == ""
    assert answer_separator(free, "Q<end>", "cat", ("<end>",)) == ""
    assert answer_separator(PromptTemplate(answer_separator=" "), "assistant\n", "cat", ()) == " "
    assert answer_separator(PromptTemplate(answer_separator=""), "Answer:", "cat", ()) == ""


WRITTEN = {  # preset, family -> what stands in the row, images left out
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
    inputs = model(family, template=name).preprocess([Query("what is it?", "dog", (make_image(),))])
    assert text(family, inputs) == WRITTEN[name, family]
    assert inputs.image_mask.any()


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
    inputs = model(family, template=name).preprocess([Query("what is it?", "dog")])
    assert text(family, inputs) == want
    assert not inputs.image_mask.any()


def test_pictures_stand_where_their_family_has_them():
    image = make_image()
    for name, first in (("blip2", 0), ("llava", len("<s>USER: ") - 4)):
        inputs = model(name).preprocess([Query("what is it?", "dog", (image,))])
        row = inputs.image_mask[0].nonzero()[:, 0]
        assert row.tolist() == list(range(int(row[0]), int(row[0]) + len(row)))
        assert int(row[0]) == first if name == "blip2" else int(row[0]) > 0
    inputs = model("minigpt4", template="liveedit").preprocess([Query("q", "dog", (image,))])
    assert inputs.image_mask[0].tolist()[:6] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]  # <s>, 4 queries


def test_minigpt4_tokenises_the_wrapping_apart_from_the_question_for_easyedit():
    module, processor = tiny_model("minigpt4")
    inputs = from_module(module, processor, template="easyedit").preprocess(
        [Query("is it", "x", (make_image(),))]
    )
    apart = [
        processor.tokenizer(part, add_special_tokens=False).input_ids
        for part in ("###Human: <Img>", "</Img> ", "is it x")
    ]
    want = apart[0] + [module.config.image_token_index] * 4 + apart[1] + apart[2]
    assert inputs.input_ids[0].tolist() == want


def test_a_prompt_says_where_its_pictures_stand():
    images = (make_image(1), make_image(2))
    found = model("qwen2_vl").preprocess([Query("First <image> then <image>: which?", "x", images)])
    said = text("qwen2_vl", found)
    mark = "<|vision_start|><|vision_end|>"
    assert f"user\nFirst {mark} then {mark}: which?<|im_end|>" in said
    blip = model("minigpt4").preprocess([Query("First <image> then <image>?", "x", images)])
    assert "Human: First <Img></Img>  then <Img></Img> ?###" in text("minigpt4", blip)


def test_a_template_of_ones_own():
    template = PromptTemplate(
        name="mine",
        system="Be brief.",
        prompt="Question: {prompt} Short answer:",
        answer_separator=" ",
    )
    inputs = model("qwen2_vl", template=template).preprocess([Query("who?", "a cat")])
    assert text("qwen2_vl", inputs) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "Question: who? Short answer:<|im_end|>\n<|im_start|>assistant\n a cat"
    )


def test_an_unknown_template_is_refused_with_the_names():
    with pytest.raises(InvalidSettingsError, match=r"unknown template 'easyedti'; did you mean"):
        get_template("easyedti")
    assert all(get_template(name).name == name for name in TEMPLATES)


def test_a_chat_template_that_ignores_pictures_gets_them_written():
    module, processor = tiny_model("llava")
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] if m['content'] is string else '' }}"
        "{% endfor %}"
    )
    inputs = from_module(module, processor).preprocess([Query("what?", "dog", (make_image(),))])
    assert inputs.image_mask.sum() == 9
    assert "what?dog" in text("llava", inputs).replace(" ", "")
