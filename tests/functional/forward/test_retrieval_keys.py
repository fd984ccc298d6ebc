"""Keys of questions and images."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from PIL import Image

from errata import adapters
from errata.functional import Model, Query
from errata.functional.errors import InvalidSettingsError, UnsupportedModelError
from errata.functional.forward.retrieval_keys import (
    get_encoder,
    hashed_ngrams,
    image_keys,
    resolve_encoder,
)


@pytest.fixture(scope="module")
def model():
    return adapters.from_module(*adapters.tiny_model("llava"))


def test_hashed_keys_are_what_the_format_says():
    """Written out for one text by hand, as another reader would."""
    features = {
        "w to": 2,
        "w go": 1,
        "b to go": 1,
        "b go to": 1,
        "c ^to": 2,
        "c to$": 2,
        "c ^to$": 2,
        "c ^go": 1,
        "c go$": 1,
        "c ^go$": 1,
    }
    want = torch.zeros(16, dtype=torch.float64)
    for feature, count in features.items():
        code = zlib.crc32(feature.encode())
        want[code % 16] += (1 if code >= 2**31 else -1) * (1 + math.log(count))
    got = hashed_ngrams(["To go, TO!"], 16)
    torch.testing.assert_close(got[0].double(), want / want.norm(), rtol=0, atol=1e-7)


def test_hashed_keys_stay_the_same():
    """Keys lie in files: another version of this library must make the same."""
    key = hashed_ngrams(["where does this animal live?"], 8)[0]
    want = [0.5345, 0.2673, 0.0, -0.5345, 0.2673, -0.5345, 0.0, 0.0]
    torch.testing.assert_close(key, torch.tensor(want), rtol=0, atol=1e-4)
    assert hashed_ngrams(["", "?!"], 8).abs().sum() == 0


def test_the_base_as_encoder_gives_unit_keys_whatever_the_company(model):
    texts = ["who is it?", "where does it live now, and with whom?", "what is it?"]
    encode = get_encoder("base", model)
    together = encode(texts)
    assert together.shape == (3, model.card.hidden_size)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(together, torch.cat([encode([text]) for text in texts]))


def test_pictures_have_keys_and_questions_without_have_none(model):
    shades = [Image.new("RGB", (32, 32), (shade, 40, 90)) for shade in (10, 240)]
    asked = [Query("a", "", (shades[0],)), Query("b"), Query("c?", "d", (shades[1],))]
    keys = image_keys(model, asked)
    assert keys[1].abs().sum() == 0
    torch.testing.assert_close(keys[[0, 2]].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(keys[:1], image_keys(model, [Query("other", "", (shades[0],))]))
    assert keys[0] @ keys[2] < 0.9999


def test_names_are_completed_and_wrong_ones_refused(model):
    assert resolve_encoder("hashed", model) == "hashed:512"
    assert resolve_encoder("base", model) == f"base:{max(1, model.card.num_layers // 2)}"
    assert resolve_encoder("all-MiniLM-L6-v2", model) == "sentence:all-MiniLM-L6-v2"
    for name in ("base:0", f"base:{model.card.num_layers}", "hashed:few"):
        with pytest.raises(InvalidSettingsError, match="must name a"):
            resolve_encoder(name, model)


def test_sentence_encoders_are_loaded_by_the_model(model):
    loaded = []

    def load(name):
        loaded.append(name)
        return lambda texts: torch.tensor([[len(t), 1.0] for t in texts])

    encode = get_encoder("letters", model._replace(load_text_encoder=load))
    assert encode(["abc"]).tolist() == [[3.0, 1.0]]
    assert loaded == ["letters"]
    bare = model._replace(load_text_encoder=Model._field_defaults["load_text_encoder"])
    with pytest.raises(UnsupportedModelError, match="load_text_encoder"):
        get_encoder("letters", bare)
