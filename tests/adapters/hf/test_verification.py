"""The generic path: families found by structure prove themselves or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from errata.adapters import from_module
from errata.adapters.families import unlisted
from errata.adapters.families.table import FAMILIES
from errata.adapters.families.tiny_configs import tiny_tokenizer
from errata.adapters.hf import functional_model, structure, verification
from errata.functional import IGNORE_INDEX, Inputs, Query
from errata.functional.errors import UnsupportedModelError
from tests.adapters.zoo_of_families.models import make_image, roughen
from tests.adapters.zoo_of_families.others import CLIP, OTHERS, TEXT

PASSING = [name for name, other in OTHERS.items() if not other.refused]
REFUSED = [name for name, other in OTHERS.items() if other.refused]
TABLE = Path(__file__).parents[3] / "adapters" / "families" / "FAMILIES.md"


def module_of(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, given = OTHERS[name].make()
    roughen(module)
    return module.eval(), given


def built(module, given):
    family = unlisted.generic(module.config.model_type)
    card = structure.describe_module(module, family)
    samples = verification.sample_inputs(card, module, None)
    return functional_model.functionalize(
        card, module, None, None, family, [*samples, *([given] if given else [])]
    )


@pytest.mark.parametrize("name", PASSING)
def test_a_family_found_by_structure_is_the_whole_forward_at_every_cut(name):
    module, given = module_of(name)
    model = built(module, given)
    if given is None:
        given = verification.sample_inputs(model.card, module, None)[0]
    kwargs = unlisted.forward_arguments(module, given)
    with torch.no_grad():
        want = module(**kwargs, use_cache=False).logits[given.attention_mask]
    batch = model.embed(model.params, given)
    size = want.abs().max()
    for cut in range(model.card.num_layers):
        half = model.decode(model.params, batch, stop=cut)
        got = model.decode(model.params, half, logit_positions="all")[given.attention_mask]
        assert (got - want).abs().max() <= 2e-6 * size


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_can_not_be_cut_is_refused_with_the_reason(name):
    module, given = module_of(name)
    with pytest.raises(UnsupportedModelError, match=OTHERS[name].refused):
        built(module, given)


def test_a_model_and_its_own_processor_go_the_generic_way_from_end_to_end():
    tokenizer = tiny_tokenizer(True)
    sizes = [[16, 16], [16, 32]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(
            **{**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=sizes,
    )
    module = hf.LlavaNextForConditionalGeneration(config).eval()
    roughen(module)
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=sizes,
    )
    processor = hf.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model = from_module(module, processor)
    asked = [
        Query("what is this?", "a cat", (make_image(1),)),
        Query("where is the river in this?", "a red dog", (make_image(2, 50, 20),)),
    ]
    inputs = model.preprocess(asked)
    got = model.decode(model.params, model.embed(model.params, inputs), logit_positions="all")
    with torch.no_grad():
        want = module(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask.long(),
            **inputs.vision_inputs,
        ).logits
    assert torch.equal(got[inputs.attention_mask], want[inputs.attention_mask])


def test_a_model_that_can_not_be_thinned_stays_whole():
    config = hf.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3)
    module = hf.MambaForCausalLM(config).eval()
    roughen(module)
    model = built(module, None)
    given = verification.sample_inputs(model.card, module, None)[0]
    half = model.decode(model.params, model.embed(model.params, given), stop=2)
    assert model.select_scored(model.params, half) is half
    with pytest.raises(UnsupportedModelError, match="keeps no keys and values"):
        model.decode(model.params, half, return_cache=True)


def test_a_model_whose_layers_read_something_hidden_is_refused():
    """A residual scale between layers is no addition: only the proof can see it."""
    module, _ = module_of("mistral")
    decoder = module.get_decoder()
    forward = type(decoder.layers[1]).forward

    class Scaled(type(decoder.layers[1])):
        def forward(self, hidden_states, **kwargs):
            return forward(self, hidden_states, **kwargs) * decoder.scale.mean()

    decoder.scale = torch.ones(1)

    def count(part, args, kwargs):
        decoder.scale = 1 + kwargs["inputs_embeds"].detach().abs().mean(-1, keepdim=True)

    decoder.register_forward_pre_hook(count, with_kwargs=True)
    decoder.layers[1].__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match=r"cut forward must be the whole|fails when"):
        built(module, None)


def test_a_model_that_looks_ahead_is_refused():
    module, _ = module_of("mistral")
    for layer in module.get_decoder().layers:
        attention = layer.self_attn
        inner = attention.forward

        def forward(*args, inner=inner, **kwargs):
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = torch.ones_like(mask) if mask is not None else None
            return inner(*args, **kwargs)

        attention.forward = forward
    with pytest.raises(UnsupportedModelError):
        built(module, None)


def test_a_cut_in_time_is_exact_behind_ragged_rows_and_sliding_windows():
    """Past slots of padding must not push a window's far end off the row."""
    module, _ = module_of("mistral")
    model = built(module, None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (2, 20), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = False
    at = torch.zeros(2, 1, dtype=torch.long)
    given = Inputs(ids, mask, torch.zeros_like(mask), torch.full_like(at, IGNORE_INDEX), at)
    _, past = model.decode(model.params, model.embed(model.params, given), return_cache=True)
    new = torch.randint(5, 90, (2, 3), generator=generator)
    step = model.embed_next(model.params, new, past)
    got = model.decode(model.params, step, kv_cache=past, logit_positions="all")
    for row in range(2):
        whole = torch.cat([ids[row, mask[row]], new[row]])[None]
        with torch.no_grad():
            want = module(input_ids=whole, use_cache=False).logits[0, -3:]
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)


def test_the_table_of_families_is_current():
    text = TABLE.read_text()
    for name, other in OTHERS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert ("refused" in line) == bool(other.refused), line
    for name in FAMILIES:
        assert f"| `{name}`" in text
