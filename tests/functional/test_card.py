"""Where parameters are used, by the card alone."""

import pytest

from errata.functional.card import (
    module_path,
)


def test_a_tied_parameter_has_one_home_and_all_its_names(toy):
    assert toy.card.canonical_name("head.weight") == "tokens.weight"
    assert toy.card.all_names("head.weight") == ["tokens.weight", "head.weight"]
    assert toy.card.all_names("tokens.weight") == ["tokens.weight", "head.weight"]
    assert toy.card.all_names("norm.weight") == ["norm.weight"]
    assert module_path("layers.0.attn.q.weight") == "layers.0.attn.q"


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("layers.0.attn.q.weight", False, True),
        ("norm.weight", False, True),
        ("head.weight", False, True),
        ("projector.weight", True, False),
        ("tokens.weight", True, False),
        ("places.weight", True, True),  # nobody can tell
        ("projector2.weight", True, True),
        ("layers", True, True),
    ],
)
def test_what_can_not_be_told_counts_as_both(toy, name, below, above):
    assert toy.card.before_decoder(name) == below
    assert toy.card.in_decoder(name) == above
