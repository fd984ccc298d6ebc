"""Where parameters are used, by the card alone."""

import pytest

from errata.functional.places import canonical, module_of, runs_above, runs_below, uses


def test_a_tied_parameter_has_one_home_and_all_its_names(toy):
    assert canonical(toy.card, "head.weight") == "tokens.weight"
    assert uses(toy.card, "head.weight") == ["tokens.weight", "head.weight"]
    assert uses(toy.card, "tokens.weight") == ["tokens.weight", "head.weight"]
    assert uses(toy.card, "norm.weight") == ["norm.weight"]
    assert module_of("layers.0.attn.q.weight") == "layers.0.attn.q"


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
    assert runs_below(toy.card, name) == below
    assert runs_above(toy.card, name) == above
