"""Scores of generated text: what counts as the same answer, and how repetitive a text is."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from math import log2

__all__ = [
    "contains_answer",
    "first_line",
    "matches_answer",
    "ngram_entropy",
    "normalize_answer",
    "tokenize_words",
]

_ARTICLES = frozenset({"a", "an", "the"})


def normalize_answer(text: str) -> str:
    """The normaliser of every free-generation score, stated once.

    Unicode NFKC, case folded, split on white space; punctuation stripped from the ends of each word
    (inside a word it stays: `1:50`, `12/13`, `t-shirt`); the articles a, an, the dropped; joined by
    single spaces. Underscores count as spaces (VLKEB targets are Wikipedia titles).

    >>> normalize_answer('  "The  Dark_Knight". '), normalize_answer("1:50"), normalize_answer("An apple!")
    ('dark knight', '1:50', 'apple')

    Args:
        text: An answer.

    Returns:
        The normalised answer.
    """  # noqa: E501
    folded = unicodedata.normalize("NFKC", text).casefold().replace("_", " ")
    words = (_strip_punctuation(word) for word in folded.split())
    return " ".join(word for word in words if word and word not in _ARTICLES)


def _strip_punctuation(word: str) -> str:
    start, stop = 0, len(word)
    while start < stop and _is_punctuation(word[start]):
        start += 1
    while stop > start and _is_punctuation(word[stop - 1]):
        stop -= 1
    return word[start:stop]


def _is_punctuation(char: str) -> bool:
    # symbols such as $ + ° carry meaning; quotes typed as ` or ´ do not
    return unicodedata.category(char).startswith("P") or char in "`´"


def first_line(text: str) -> str:
    r"""The first non-empty line: what a short-answer generation is judged by.

    >>> first_line("\n 2 \nQuestion: what else?")
    '2'

    Args:
        text: A generation.

    Returns:
        The line, stripped; empty if there is none.
    """
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def matches_answer(generation: str, targets: str | Sequence[str]) -> bool:
    """Normalised exact match of a free generation with a target, or with any of its aliases.

    Only the first line of the generation counts.

    Args:
        generation: What the model generated.
        targets: The target, or its aliases.

    Returns:
        Whether one matches.
    """
    answer = normalize_answer(first_line(generation))
    return any(answer == normalize_answer(one) for one in _as_list(targets))


def contains_answer(generation: str, targets: str | Sequence[str]) -> bool:
    """Whether the first line of a generation holds a target as whole words; laxer than `matches`.

    >>> contains_answer("it is in Paris, France", "paris"), contains_answer("Parisian", "paris")
    (True, False)

    Args:
        generation: What the model generated.
        targets: The target, or its aliases.

    Returns:
        Whether one occurs.
    """
    answer = f" {normalize_answer(first_line(generation))} "
    return any(f" {one} " in answer for one in map(normalize_answer, _as_list(targets)) if one)


def _as_list(targets: str | Sequence[str]) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets


# The Penn Treebank conventions (Robert MacIntyre's sed script, public domain) with the order,
# dashes and Unicode quotes of NLTK's `NLTKWordTokenizer` (Apache-2.0): fluency in print is of
# its tokens.
_CONTRACTIONS = re.compile(
    r"(?i)\b(can)(not)\b|\b(d)('ye)\b|\b(gim)(me)\b|\b(gon)(na)\b|\b(got)(ta)\b|\b(lem)(me)\b"
    r"|\b(more)('n)\b|\b(wan)(na)(?=\s)| ('t)(is)\b| ('t)(was)\b"
)
_RULES = tuple(
    (re.compile(pattern), change)
    for pattern, change in (
        (r"([«“‘„]|[`]+)", r" \1 "),  # opening quotes
        (r"^\"", "``"),
        (r"(``)", r" \1 "),
        (r"([ \(\[{<])(\"|\'{2})", r"\1 `` "),
        (r"(?i)(?<!\w)(\')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", r"\1 "),
        (r"([^\.])(\.)([\]\)}>\"\'»”’ ]*+)\s*$", r"\1 \2 \3 "),  # the last full stop only
        (r"([:,])([^\d])", r" \1 \2"),
        (r"([:,])$", r" \1 "),
        (r"\.{2,}", r" \g<0> "),
        (r"[;@#$%&]", r" \g<0> "),
        (r"[\u2012-\u2015]", r" \g<0> "),  # dashes
        (r"([^\.])(\.)([\]\)}>\"\']*)\s*$", r"\1 \2\3 "),
        (r"[?!]", r" \g<0> "),
        (r"([^'])' ", r"\1 ' "),
        (r"[*]", r" \g<0> "),
        (r"[\]\[\(\)\{\}\<\>]", r" \g<0> "),
        (r"--", r" -- "),
    )
)
_ENDINGS = tuple(
    (re.compile(pattern), change)
    for pattern, change in (
        (r"([»”’])", r" \1 "),  # closing quotes
        (r"''", " '' "),
        (r'"', " '' "),
        (r"\s+", " "),
        (r"([^' ])('[sS]|'[mM]|'[dD]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) ", r"\1 \2 "),
    )
)


def tokenize_words(text: str) -> list[str]:
    """Split a text into words and marks as the Penn Treebank does, taking it as one sentence.

    >>> tokenize_words("It isn't 3.5, is it?")
    ['It', 'is', "n't", '3.5', ',', 'is', 'it', '?']

    Args:
        text: A sentence.

    Returns:
        Words and punctuation marks.
    """
    for pattern, change in _RULES:
        text = pattern.sub(change, text)
    text = f" {text} "
    for pattern, change in _ENDINGS:
        text = pattern.sub(change, text)
    spaced = _CONTRACTIONS.sub(lambda m: " " + " ".join(g for g in m.groups() if g) + " ", text)
    return spaced.split()


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * log2(c / total) for c in counts.values()) + 0.0


def ngram_entropy(text: str | Sequence[str]) -> float:
    """Fluency: mean over n = 2, 3 of w_n H_n, H_n = -sum f log2 f over n-grams, w = (2/3, 4/3).

    Takes a text, or its tokens. 0 for a text of one token. Papers print it times 100 (ROME and
    MEMIT `eval_utils_counterfact.py:220-251`, EasyEdit `evaluate_utils.py:373-402`).

    >>> round(ngram_entropy("a b a b a b a b"), 6)
    0.995076

    Args:
        text: A text, or its tokens.

    Returns:
        Bits.
    """
    words = tokenize_words(text) if isinstance(text, str) else text
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2
