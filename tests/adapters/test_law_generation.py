"""Generation equals Hugging Face's `generate`, token for token, greedy and sampled."""

from __future__ import annotations

import pytest
import torch

from errata.adapters import from_module
from errata.functional import Query, Sampling, generate, stream
from errata.functional.errors import InvalidInputError, InvalidSettingsError
from errata.functional.forward.generation import generate_ids
from tests.adapters.test_laws import each_family, fresh
from tests.adapters.zoo_of_families.models import arguments, made, make_image, queries

SAMPLING = Sampling(temperature=0.7, top_k=20, top_p=0.9)


NEED_IMAGES = ("blip2", "minigpt4")  # for Hugging Face's `generate`


def prompts(name):
    return [query._replace(target="") for query in queries(name)]


def as_hugging_face(name, query, **settings):
    """The new tokens of the module's own `generate`, for one row."""
    module, model = made(name)
    inputs = model.preprocess([query])
    given = arguments(name)(inputs)
    length = inputs.input_ids.shape[1]
    with torch.no_grad():
        out = module.generate(
            **given, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **settings
        )[0]
    return out[length:].tolist() if len(out) > 8 else out.tolist()


@each_family
def test_greedy_tokens_are_hugging_faces(name):
    model = made(name).model
    asked = [k for k, query in enumerate(prompts(name)) if query.images or name not in NEED_IMAGES]
    want = [as_hugging_face(name, prompts(name)[k], do_sample=False) for k in asked]
    inputs = model.preprocess(prompts(name))  # with rows of text among rows with images
    got = generate_ids(model, inputs, 8, stop_ids=())
    assert [got[k] for k in asked] == want
    assert len({tuple(row) for row in want}) > 1, "rows say different things"


@each_family
def test_sampled_tokens_are_hugging_faces_under_the_same_generator(name):
    model = made(name).model
    for query in [q for q in prompts(name) if q.images or name not in NEED_IMAGES][:2]:
        torch.manual_seed(5)
        want = as_hugging_face(name, query, do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
        generator = torch.Generator().manual_seed(5)
        got = generate_ids(
            model, model.preprocess([query]), 8, sampling=SAMPLING, generator=generator, stop_ids=()
        )
        assert got == [want]


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_a_stream_joins_to_what_generate_gives(name):
    model = made(name).model
    for query in prompts(name):
        pieces = list(stream(model, query, 12))
        assert "".join(pieces) == generate(model, [query], 12)[0]
        assert torch.is_grad_enabled()
    one = list(stream(model, prompts(name)[0], 12, sampling=SAMPLING, generator=seeded()))
    assert (
        "".join(one)
        == generate(model, prompts(name)[:1], 12, sampling=SAMPLING, generator=seeded())[0]
    )


def seeded():
    return torch.Generator().manual_seed(1)


def test_sampling_keeps_the_likeliest_tokens_alone():
    _, model, _, _ = fresh("llama")
    query = prompts("llama")[:1]
    greedy = generate(model, query, 8)
    assert generate(model, query, 8, sampling=Sampling(top_k=1), generator=seeded()) == greedy
    assert generate(model, query, 8, sampling=Sampling(top_p=1e-9), generator=seeded()) == greedy
    assert generate(model, query, 8, sampling=Sampling(), generator=seeded()) != greedy


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 2},
    ],
)
def test_sampling_out_of_range_is_refused(settings):
    with pytest.raises(InvalidSettingsError, match=next(iter(settings))):
        Sampling(**settings)


def test_an_answer_longer_than_the_context_is_refused_by_both():
    model, asked = made("llama").model, prompts("llama")
    with pytest.raises(InvalidInputError, match="must fit into"):
        generate(model, asked, 10**6)
    with pytest.raises(InvalidInputError, match="must fit into"):
        next(stream(model, asked[0], 10**6))


LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)


def test_an_answer_ends_where_the_chat_template_ends_a_turn():
    """As in Llama 3 and Gemma, whose tokenizers' end token is another."""
    from errata.adapters.zoo.tiny import tiny_model

    module, tokenizer = tiny_model("llama")
    assert from_module(module, tokenizer).preprocess.eos_suffix == tokenizer.eos_token
    special = ["<|start|>", "<|end|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    module.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template = LLAMA3
    model = from_module(module, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert model.card.stop_ids[-1] == end
    inputs = model.preprocess([Query("who is it?", "bo")], append_eos=True)
    assert int(inputs.labels[0, -1]) == end
    plain = from_module(module, tokenizer, template="plain")
    inputs = plain.preprocess([Query("who is it?", "bo")], append_eos=True)
    assert int(inputs.labels[0, -1]) == tokenizer.eos_token_id


def test_row_shaped_inputs_grow_with_the_row():
    """A model without a cache runs whole rows: `mm_token_type_ids` must have their length."""
    model = made("qwen3_vl").model

    def decode(*args, return_cache=False, **options):
        from errata.functional.errors import UnsupportedModelError

        if return_cache:
            raise UnsupportedModelError("no cache")
        return model.decode(*args, **options)

    slow = model._replace(decode=decode)
    query = [Query("what is it?", images=(make_image(1),))]
    assert generate(slow, query, 6, stop_ids=()) == generate(model, query, 6, stop_ids=())
