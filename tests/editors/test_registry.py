from __future__ import annotations

import pytest

from errata.editors import configure
from errata.editors.lora import LoraConfig
from errata.functional.errors import InvalidSettingsError


def said(name: str, preset: str = "", **settings: object) -> str:
    with pytest.raises(InvalidSettingsError) as caught:
        configure(name, preset, **settings)
    return str(caught.value)


def test_settings_lie_over_a_preset():
    assert configure("lora", "easyedit", rank=2) == LoraConfig(
        rank=2,
        alpha=32.0,
        optimizer="sgd",
        lr=0.1,
        lr_decay=0.9,
        num_steps=5,
        stop_loss=0.0,
        append_eos=False,
    )


def test_every_fault_is_named_at_once():
    text = said("lora", "nobody", rank=0, alhpa=3, optimizer="sdg")
    for part in (
        "unknown preset of lora 'nobody'; known: default, easyedit",
        "unknown setting of lora 'alhpa'; did you mean 'alpha'?",
        "lora.rank must be int >= 1; got 0",
        "lora.optimizer must be one of adamw, adam, sgd; got 'sdg'",
    ):
        assert part in text
    assert "`" not in text


def test_an_unknown_editor_is_named_with_the_nearest():
    assert "unknown editor 'finetnue'; did you mean 'finetune'?" in said("finetnue")
