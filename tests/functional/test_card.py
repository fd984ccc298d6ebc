"""Where parameters are used, by the card alone."""

import pytest

from errata.functional.card import (
    all_names,
    before_decoder,
    canonical_name,
    in_decoder,
    module_path,
)


def test_a_tied_parameter_has_one_home_and_all_its_names(toy):
    assert canonical_name(toy.card, "head.weight") == "tokens.weight"
    assert all_names(toy.card, "head.weight") == ["tokens.weight", "head.weight"]
    assert all_names(toy.card, "tokens.weight") == ["tokens.weight", "head.weight"]
    assert all_names(toy.card, "norm.weight") == ["norm.weight"]
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
    assert before_decoder(toy.card, name) == below
    assert in_decoder(toy.card, name) == above
