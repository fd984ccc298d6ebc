"""Reading: joint tokenisation, labels, padding, and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from errata.adapters import PromptTemplate, from_module, tiny_model
from errata.adapters.families.table import tiny_families
from errata.adapters.families.tiny_configs import CORPUS, tiny_tokenizer
from errata.adapters.inputs.collation import concat_pixels
from errata.adapters.inputs.prompt_format import scored_tokens
from errata.adapters.loading.query_processor import make_processor
from errata.functional import IGNORE_INDEX, Inputs, ModelCard, Query
from errata.functional.errors import InvalidInputError, UnsupportedModelError


def make_image(red: int = 90, width: int = 40, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (red, 20, 200))


def model(name: str, **settings):
    return from_module(*tiny_model(name), **settings)


def text(name: str, inputs: Inputs, row: int = 0) -> str:
    processor = tiny_model(name)[1]
    ids = inputs.input_ids[row][inputs.attention_mask[row] & ~inputs.image_mask[row]]
    return getattr(processor, "tokenizer", processor).decode(ids)


# ---- labels


@pytest.mark.parametrize("name", tiny_families())
def test_labels_are_the_targets_tokens_and_at_points_before_them(name):
    found = model(name)
    targets = ["a red dog", "the president of the country", "7", "naïve – ‘quoted’\nline"]
    rows = [Query("what is in the city?", target) for target in targets]
    if found.card.takes_images:
        rows = [row._replace(images=(make_image(),)) for row in rows]
    inputs = found.preprocess(rows)
    for row, target in enumerate(targets):
        labels = inputs.labels[row][inputs.labels[row] != IGNORE_INDEX]
        at = inputs.logit_positions[row, : len(labels)]
        assert found.detokenize(labels).strip() == target
        assert torch.equal(inputs.input_ids[row, at + 1], labels)
        assert inputs.attention_mask[row, at + 1].all()
        assert not inputs.attention_mask[row, int(at[-1]) + 2 :].any(), "the target ends the row"
        assert (inputs.logit_positions[row, len(labels) :] == 0).all()


@pytest.mark.parametrize("name", tiny_families())
def test_rows_are_padded_on_the_right_and_do_not_depend_on_each_other(name):
    found = model(name)
    rows = [Query("who?", "a cat"), Query("what is in the city of the river?", "the old town")]
    if found.card.takes_images:
        rows.append(Query("and here?", "dog", (make_image(),)))
    together = found.preprocess(rows)
    for row, query in enumerate(rows):
        alone = found.preprocess([query])
        length = alone.input_ids.shape[1]
        assert alone.attention_mask.all()
        assert torch.equal(together.input_ids[row, :length], alone.input_ids[0])
        assert together.attention_mask[row].tolist() == [True] * length + [False] * (
            together.input_ids.shape[1] - length
        )
        assert torch.equal(together.labels[row, : alone.labels.shape[1]], alone.labels[0])
        assert torch.equal(together.image_mask[row, :length], alone.image_mask[0])
        assert together.content_ids[row] == alone.content_ids[0]


def test_a_token_across_the_boundary_belongs_to_the_answer():
    """`ab` is one token: prompt "xa" and target "b" share it, and it is scored."""
    bpe = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="x")
    module, _ = tiny_model("gpt2")
    card = from_module(module, tiny_tokenizer()).card
    read = make_processor(
        tokenizer, module.config, card, PromptTemplate(chat=False, answer_separator="")
    )
    inputs = read([Query("xa", "b")])
    assert inputs.input_ids.tolist() == [[0, 3]]
    assert inputs.labels.tolist() == [[3]]
    assert inputs.logit_positions.tolist() == [[0]]


def test_a_lone_space_is_scored_whether_its_characters_are_trimmed_or_not():
    # "Q:" + " " + "7": the space a token of its own, spanning itself, or trimmed to nothing
    assert scored_tokens([(0, 2), (2, 3), (3, 4)], 2, separator_length=1) == range(1, 3)
    assert scored_tokens([(0, 2), (3, 3), (3, 4)], 2, separator_length=1) == range(1, 3)
    # "Q: " + " " + "7": the prompt's own space is not the answer's, trimmed or not
    assert scored_tokens([(0, 2), (2, 3), (3, 5)], 3, separator_length=1) == range(2, 3)
    assert scored_tokens([(0, 2), (3, 3), (4, 5)], 3, separator_length=1) == range(2, 3)
    # "Q" + ": " merged: a token that takes the gap alone is the prompt's
    assert scored_tokens([(0, 3), (3, 4)], 2, separator_length=1) == range(1, 2)


def sentencepiece_like() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    bpe.normalizer = normalizers.Sequence(marks)
    return bpe


def byte_level(trim: bool, space: bool) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    return bpe


@pytest.mark.parametrize(
    "make",
    [sentencepiece_like, lambda: byte_level(True, False), lambda: byte_level(False, True)],
    ids=["llama", "trimmed", "gpt2"],
)
@pytest.mark.parametrize("prompt", ["who? ASSISTANT:", "who is it\n", "a lone space ", "x</s>"])
@pytest.mark.parametrize("between", ["", " ", None], ids=repr)
def test_labels_spell_the_answer_under_any_kind_of_tokenizer(make, prompt, between):
    bpe = make()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([*CORPUS, "\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<unk>")
    module, _ = tiny_model("gpt2")
    card = replace(from_module(module, tiny_tokenizer()).card, vocab_size=400)
    read = make_processor(
        tokenizer, module.config, card, PromptTemplate(chat=False, answer_separator=between)
    )
    for target in ("dog", "the old town", "V I"):
        inputs = read([Query(prompt, target)])
        pieces = tokenizer.convert_ids_to_tokens(inputs.labels[0].tolist())
        said = "".join(pieces).replace("▁", " ").replace("Ġ", " ")
        assert said.strip() == target
        assert int(inputs.logit_positions[0, -1]) == inputs.input_ids.shape[1] - 2


def test_special_tokens_behind_the_answer_are_not_scored():
    assert scored_tokens([(0, 1), (1, 3), (0, 0)], 1) == range(1, 2)
    assert scored_tokens([(0, 1)], 1) == range(0)


def test_the_end_token_is_scored_only_when_asked_for():
    module, processor = tiny_model("qwen2_vl")
    plain = from_module(module, processor).preprocess([Query("who?", "a cat")])
    for end in (True, "<|im_end|>"):
        inputs = from_module(
            module, processor, template=PromptTemplate(answer_suffix=end)
        ).preprocess([Query("who?", "a cat")])
        assert processor.tokenizer.decode(inputs.labels[0][-1:]) == "<|im_end|>"
        assert torch.equal(inputs.labels[0][:-1], plain.labels[0])
        again = from_module(module, processor).preprocess([Query("who?", "a cat")], append_eos=True)
        assert torch.equal(again.labels, inputs.labels)


def test_without_targets_nothing_is_scored():
    inputs = model("llava").preprocess(
        [Query("who?"), Query("what is it?", images=(make_image(),))]
    )
    assert inputs.labels.shape == (2, 0)
    assert inputs.logit_positions.shape == (2, 0)


# ---- what is refused


def refused(name: str, *queries: Query) -> str:
    with pytest.raises(InvalidInputError) as error:
        model(name).preprocess(list(queries))
    return str(error.value)


def test_every_violation_of_a_batch_is_listed(tmp_path):
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    said = refused(
        "llava",
        Query("fine", "cat", (make_image(),)),
        Query("blank", "  \n", (make_image(),)),
        Query("gone", "cat", (tmp_path / "gone.png", tmp_path / "page.jpg")),
        Query("moving", "cat", (make_image(),), video=True),
    )
    for part in (
        "query 2 ('blank'): the target must hold more than white space",
        "query 3 ('gone')",
        "gone.png",
        "page.jpg",
        "query 4 ('moving')",
        "takes no video",
    ):
        assert part in said
    assert "query 1" not in said


def test_a_scored_batch_needs_every_target():
    assert "query 2 ('b'): no target" in refused("llama", Query("a", "x"), Query("b"))


def test_pictures_for_a_text_model_are_refused():
    assert "takes no images, got 1: leave them out" in refused("llama", Query("a", "x", (1,)))


FORGED = [("llava", "<image>"), ("qwen2_vl", "<|image_pad|>"), ("qwen3_vl", "<|video_pad|>")]


@pytest.mark.parametrize(("name", "token"), FORGED)
def test_neither_prompt_nor_target_can_forge_pictures(name, token):
    said = refused(name, Query(f"look {token} here", "x"))
    assert "one placeholder per image, 0 in all, and has 1: take" in said
    for images in ((), (make_image(),)):
        said = refused(name, Query("look", f"a {token}", images))
        assert f"holds the special token(s) {token!r}" in said
    assert "one placeholder" in refused(name, Query(f"{token} {token}", "x", (make_image(),)))


def test_a_token_that_the_model_does_not_have_is_refused():
    """An old BLIP-2's processor adds `<image>` to the tokenizer, and nothing to the model."""
    module, processor = tiny_model("blip2")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    read = from_module(module, processor).preprocess
    with pytest.raises(InvalidInputError, match="one of the model's 310, and '<new>' is none"):
        read([Query("what <new> is it?", "x")])


def test_a_prompt_that_places_its_picture_is_read_where_pictures_come_first():
    found = model("blip2")
    image = make_image()
    there = found.preprocess([Query("<image>what is it?", "x", (image,))])
    assert torch.equal(
        there.input_ids, found.preprocess([Query("what is it?", "x", (image,))]).input_ids
    )


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
    frames = tuple(make_image(red) for red in range(4))
    with pytest.raises(
        InvalidInputError, match=r"same number of frames, got \[2, 4\]: read them apart"
    ):
        model("llava_onevision").preprocess(
            [Query("a", "x", frames[:2], video=True), Query("b", "y", frames, video=True)]
        )


def test_tiles_are_filled_with_zeros():
    joined = concat_pixels([{"p": torch.ones(1, 2, 3)}, {}, {"p": torch.ones(2, 4, 3)}])
    assert joined["p"].shape == (3, 4, 3)
    assert joined["p"].sum() == 2 * 3 + 8 * 3


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

        def get_added_vocab(self):
            return {}

    module, _ = tiny_model("gpt2")
    card = ModelCard(
        family="gpt2",
        id="x",
        num_layers=1,
        hidden_size=1,
        vocab_size=1,
        max_positions=1,
        layers="h",
        head="h",
    )
    with pytest.raises(
        UnsupportedModelError, match="must give character offsets, and Slow does not"
    ):
        make_processor(Slow(), module.config, card)


def test_pixels_are_made_once_per_picture(monkeypatch):
    module, processor = tiny_model("llava")
    calls = []
    inner = type(processor.image_processor).__call__

    def counted(self, images, **settings):
        calls.append(len(images))
        return inner(self, images, **settings)

    monkeypatch.setattr(type(processor.image_processor), "__call__", counted)
    read = from_module(module, processor).preprocess
    first = read([Query("who?", "x", (make_image(),)), Query("what?", "y", (make_image(),))])
    again = read([Query("where?", "z", (make_image(),))])
    assert calls == [1]
    assert torch.equal(first.vision_inputs["pixel_values"][:1], again.vision_inputs["pixel_values"])
    assert first.content_ids == (again.content_ids[0],) * 2


def test_threads_may_share_a_reader():
    found = model("llava")
    rows = [
        [
            Query(f"what is number {step}?", "a cat", (make_image(step),)),
            Query("who?", "the old town"),
        ]
        for step in range(6)
    ]
    want = [found.preprocess(row) for row in rows]
    read = model("llava").preprocess
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(read, rows * 8))
    for number, inputs in enumerate(got):
        serial = want[number % len(rows)]
        assert torch.equal(inputs.input_ids, serial.input_ids)
        assert torch.equal(inputs.labels, serial.labels)
        assert torch.equal(
            inputs.vision_inputs["pixel_values"], serial.vision_inputs["pixel_values"]
        )
