"""Normalised matches of free generation, and the peers' fluency score on their own outputs."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from errata.functional.metrics import text as words

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "ngram_entropy.safetensors")
TEXTS = [
    "the cat sat on the mat and the cat sat on the mat again",
    "a b a b a b a b",
    "It's a photo of two dogs, isn't it? Yes. It's a photo of two dogs.",
    "one two three",
    "Paris is the capital of France; the Eiffel Tower (1889) is in Paris.",
]


@pytest.mark.parametrize("index", range(5))
def test_ngram_entropy_equals_easyedit(index):
    got = words.ngram_entropy(TEXTS[index])
    assert got == pytest.approx(GOLDEN[f"t{index}"].item(), abs=1e-12)


def test_a_degenerate_text_has_no_entropy():
    assert words.ngram_entropy("no no no no") == 0.0
    assert words.ngram_entropy("") == 0.0
    assert words.ngram_entropy(["one"]) == 0.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It's 3.5%, isn't it?", ["It", "'s", "3.5", "%", ",", "is", "n't", "it", "?"]),
        ("Dr. Who (1963–89) --...", ["Dr.", "Who", "(", "1963", "–", "89", ")", "--", "..."]),
        ("I cannot; 'robot'", ["I", "can", "not", ";", "'", "robot", "'"]),
        ('she said "no".', ["she", "said", "``", "no", "''", "."]),
    ],
)
def test_tokens_follow_the_treebank(text, wanted):
    assert words.tokenize_words(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  The Cat. ", "cat"),
        ("female_illusionist", "female illusionist"),
        ("1:50", "1:50"),
        ("$5", "$5"),
        ("“Ümlaut!”", "ümlaut"),
        ("ﬁne", "fine"),
        ("A", ""),
        ("...", ""),
    ],
)
def test_normalise(text, wanted):
    assert words.normalize_answer(text) == wanted


def test_matches_judges_the_first_line():
    assert words.matches_answer("\n Kankakee.\nQuestion: next", "kankakee")
    assert not words.matches_answer("Kankakee is a city", "Kankakee")
    assert words.contains_answer("Kankakee is a city", "Kankakee")
    assert not words.contains_answer("anything", "the")  # an empty normal form is in no answer
    assert words.matches_answer("2", ["two", "2"])
