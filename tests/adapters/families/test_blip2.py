"""BLIP-2: old and new checkpoints, rows without images, any decoder but an encoder-decoder."""

import pytest
import torch
import transformers as hf
from PIL import Image

from errata.adapters import from_module, from_pretrained, tiny_model
from errata.adapters.families.tiny_configs import TinySize, tiny_tokenizer
from errata.adapters.loading.load import refuse_encoder_decoder
from errata.functional import Query
from errata.functional.errors import UnsupportedModelError


def make_image(red: int = 90) -> Image.Image:
    return Image.new("RGB", (40, 30), (red, 20, 200))


def logits(model, inputs):
    with torch.no_grad():
        return model.decode(model.params, model.embed(model.params, inputs))


ROWS = [
    Query("what is it?", "two dogs", (make_image(),)),
    Query("nothing to see", "red cat"),
    Query("and both?", "the chair", (make_image(1), make_image(250))),
]


def test_it_is_hugging_faces_forward():
    module, processor = tiny_model("blip2")
    model = from_module(module, processor)
    inputs = model.preprocess(ROWS)
    with torch.no_grad():
        whole = module(
            pixel_values=inputs.vision_inputs["pixel_values"],
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.long(),
        ).logits
    picked = torch.stack([whole[row, inputs.logit_positions[row]] for row in range(len(ROWS))])
    keep = inputs.labels >= 0
    torch.testing.assert_close(logits(model, inputs)[keep], picked[keep], rtol=1e-5, atol=1e-5)


def test_an_old_checkpoint_without_an_image_token_gives_the_same():
    """Before transformers 4.46 configs had no `image_token_index`; features were put in front."""
    module, processor = tiny_model("blip2")
    new = from_module(module, processor)
    want = logits(new, new.preprocess(ROWS))
    module.config.image_token_index = None
    processor.num_query_tokens = None
    old = from_module(module, processor)
    inputs = old.preprocess(ROWS)
    assert inputs.image_mask.sum(-1).tolist() == [4, 0, 8]
    assert torch.equal(logits(old, inputs), want)


def test_rows_without_pictures_need_no_pixels():
    model = from_module(*tiny_model("blip2"))
    inputs = model.preprocess(ROWS[1:2])
    assert not inputs.vision_inputs
    alone = logits(model, inputs)
    among = logits(model, model.preprocess(ROWS))
    torch.testing.assert_close(among[1, : alone.shape[1]], alone[0], rtol=1e-5, atol=1e-5)


def test_pictures_reach_the_answer_in_their_order():
    model = from_module(*tiny_model("blip2"))
    one = logits(
        model, model.preprocess([Query("and both?", "x", (make_image(1), make_image(250)))])
    )
    other = logits(
        model, model.preprocess([Query("and both?", "x", (make_image(250), make_image(1)))])
    )
    assert not torch.equal(one, other)


def test_a_llama_decoder_will_do():
    tokenizer = tiny_tokenizer(add_bos=True)
    size = TinySize(2, 32, tokenizer)
    parts = tiny_model("minigpt4", num_layers=2)[0].config
    config = hf.Blip2Config(
        vision_config=parts.vision_config,
        qformer_config=parts.qformer_config,
        text_config=parts.text_config,
        num_query_tokens=4,
        image_token_index=size.token_id("<image>"),
    )
    module = hf.Blip2ForConditionalGeneration(config).eval().requires_grad_(False)
    model = from_module(module, tiny_model("blip2")[1])
    inputs = model.preprocess(ROWS)
    with torch.no_grad():
        whole = module(
            pixel_values=inputs.vision_inputs["pixel_values"],
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.long(),
        ).logits
    picked = torch.stack([whole[row, inputs.logit_positions[row]] for row in range(len(ROWS))])
    keep = inputs.labels >= 0
    torch.testing.assert_close(logits(model, inputs)[keep], picked[keep], rtol=1e-5, atol=1e-5)


def test_flan_t5_is_refused_with_the_reason(tmp_path):
    config = hf.Blip2Config(text_config=hf.T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1))
    with pytest.raises(
        UnsupportedModelError, match=r"'blip-2' over 't5' is an encoder-decoder.*OPT"
    ):
        refuse_encoder_decoder(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        from_pretrained(tmp_path)  # said before a weight is looked for: there are none


def test_neutral_sites_are_there():
    card = from_module(*tiny_model("blip2")).card
    assert card.resolve_site("vision") == "vision_model"
    assert card.resolve_site("projector") == "qformer"
    assert card.resolve_linear("layers.-1.mlp.down").endswith("layers.2.fc2")
