"""Models that the protocols run on."""

from __future__ import annotations

import pytest

from errata.adapters import from_module, tiny_model
from errata.functional import Model


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "blip2"])
def model(request) -> Model:
    return from_module(*tiny_model(request.param))


@pytest.fixture(scope="module")
def llava() -> Model:
    return from_module(*tiny_model("llava"))
