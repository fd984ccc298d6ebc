"""A family found by structure, read through its own processor: InternVL from a hub-like folder."""

import json

import pytest
import torch
import transformers as hf
from PIL import Image

from errata.adapters import from_pretrained
from errata.adapters.families.tiny_configs import CHATML, TinySize, decoder_config, tiny_tokenizer
from errata.adapters.inputs.hf_processor import HFQueryProcessor
from errata.functional import Query
from errata.functional.errors import InvalidInputError

MARKS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def make_image(red: int, width: int = 40) -> Image.Image:
    return Image.new("RGB", (width, 30), (red, 9, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("internvl")
    plain = tiny_tokenizer()
    plain.add_special_tokens({"additional_special_tokens": list(MARKS.values())[:3]})
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=MARKS,
    )
    vision = hf.InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[32, 32],
        patch_size=[8, 8],
    )
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**decoder_config(TinySize(3, 32, tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    hf.InternVLForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    (path / "processor_config.json").write_text(json.dumps(settings))
    chat = CHATML.replace("IMAGE", "<IMG_CONTEXT>")
    (path / "chat_template.jinja").write_text(chat)
    return path


def test_it_loads_without_torchvision_and_reads_rows_of_every_kind(folder):
    model = from_pretrained(folder)
    assert isinstance(model.preprocess, HFQueryProcessor)
    rows = [
        Query("what?", "a cat", (make_image(3),)),
        Query("what is on the second?", "dog", (make_image(3), make_image(90, 64))),
        Query("nothing to see", "the old town"),
    ]
    inputs = model.preprocess(rows)
    for row, query in enumerate(rows):
        labels = inputs.labels[row][inputs.labels[row] >= 0]
        assert model.detokenize(labels) == query.target
        assert torch.equal(
            inputs.input_ids[row, inputs.logit_positions[row, : len(labels)] + 1], labels
        )
        assert not inputs.attention_mask[row, int(inputs.attention_mask[row].sum()) :].any(), (
            "padded on the right"
        )
    assert inputs.image_mask.any(-1).tolist() == [True, True, False]
    assert [len(keys) for keys in inputs.content_ids] == [1, 2, 0]
    with torch.no_grad():
        together = model.decode(model.params, model.embed(model.params, inputs))
        for row, query in enumerate(rows):
            alone = model.preprocess([query])
            assert torch.equal(alone.labels[0], inputs.labels[row, : alone.labels.shape[1]])
            logits = model.decode(model.params, model.embed(model.params, alone))[0]
            torch.testing.assert_close(together[row, : len(logits)], logits, rtol=1e-4, atol=1e-5)


def test_what_it_can_not_read_is_refused(folder):
    model = from_pretrained(folder)
    with pytest.raises(InvalidInputError, match="the text of this query cannot be read"):
        model.preprocess([Query("a forged <IMG_CONTEXT> here", "x")])
    with pytest.raises(InvalidInputError, match=r"query 2 \('b'\).*takes no video"):
        model.preprocess([Query("a", "x"), Query("b", "y", (make_image(1),), video=True)])
    with pytest.raises(InvalidInputError, match="at most 512 tokens"):
        model.preprocess([Query("word " * 600, "x")])
    with pytest.raises(InvalidInputError, match="must have a target"):
        model.preprocess([Query("a", "x"), Query("b")])


def test_a_raw_template_writes_its_placeholder(folder):
    model = from_pretrained(folder, template="plain")
    inputs = model.preprocess([Query("what?", "a cat", (make_image(3),))])
    assert inputs.image_mask.any()
    assert model.detokenize(inputs.input_ids[0]).endswith("what? a cat")
