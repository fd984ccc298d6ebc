"""How a question becomes text: templates, the gap before the answer, and which tokens are scored.

A row is a list of segments: texts, which are tokenised apart from one another, and numbers, which
stand for the n-th picture. The answer is appended to the last text and the two are tokenised
together, so its token ids are read from the row itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from errata.functional import Query
from errata.functional.errors import InvalidSettingsError
from errata.functional.queries import IMAGE_PLACEHOLDER

__all__ = [
    "PromptSegment",
    "PromptTemplate",
    "answer_separator",
    "answer_suffix",
    "make_detokenizer",
    "scored_tokens",
    "split_template",
]

PromptSegment = str | int
"""A text, or the number of a picture."""


class PromptTemplate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a question is put to a model; `templates.py` has the presets.

    With `chat`, the checkpoint's own chat template is used where it has one, with the generation
    prompt. Otherwise `raw` is: pieces that are tokenised apart, in which `{images}` and `{prompt}`
    stand for what they say; empty, the family's own.

    `gap` stands between question and answer. None: one space, unless a space or a special token is
    there already. It counts as part of the answer, as it does for every peer: a tokenizer that
    makes the space a token of its own has that token scored.

    `end` appends the tokenizer's end token (or the text given) to the answer, scored like the rest.
    The peers score the answer alone, and so does the default; edit with `end` if generation must
    also stop after the answer.
    """

    name: str = "default"
    chat: bool = True
    system: str = ""
    prompt: str = "{prompt}"  # what is made of the question before anything else
    raw_template: tuple[str, ...] = ()
    image_wrapper: str = "{}"  # in raw text, what is written around each picture
    answer_separator: str | None = None
    add_bos: bool = True  # begin with what the tokenizer puts before a text
    answer_suffix: bool | str = False


def answer_separator(
    template: PromptTemplate, text: str, target: str, special_tokens: tuple[str, ...]
) -> str:
    """What stands between the end of `text` and the target.

    >>> answer_separator(PromptTemplate(), "Answer:", "cat", ("<|im_end|>",)), answer_separator(PromptTemplate(), "USER:\\n", "cat", ())
    (' ', '')
    """  # noqa: E501
    if template.answer_separator is not None:
        return template.answer_separator
    if not text or text[-1].isspace() or target[:1].isspace():
        return ""
    return "" if special_tokens and text.endswith(special_tokens) else " "


def split_template(
    template: PromptTemplate, raw_template: Sequence[str], query: Query
) -> list[PromptSegment]:
    """A query under a raw template: texts and picture numbers, in order.

    Pictures stand, with the template's `picture` around them, where it has `{images}`; or, if the
    prompt says `<image>` exactly as often as it has pictures, there.

    >>> template = PromptTemplate(image_wrapper="<Img>{}</Img> ")
    >>> split_template(template, ("Q: {images}{prompt}",), Query("Who?", "", ("cat.png",)))
    ['Q: <Img>', 0, '</Img> Who?']
    """
    prompt = template.prompt.replace("{prompt}", query.prompt)
    num_images = 1 if query.video else len(query.images)
    inline = num_images > 0 and prompt.count(IMAGE_PLACEHOLDER) == num_images
    before, _, after = template.image_wrapper.partition("{}")
    row: list[PromptSegment] = []
    for piece in raw_template:
        text = ""
        for part in re.split(r"(\{images\}|\{prompt\})", piece):
            if part == "{images}":
                for number in () if inline else range(num_images):
                    row += [text + before, number]
                    text = after
            elif part == "{prompt}":
                first, *rest = prompt.split(IMAGE_PLACEHOLDER) if inline else (prompt,)
                text += first
                for number, words in enumerate(rest):
                    row += [text + before, number]
                    text = after + words
            else:
                text += part
        row.append(text)
    return [part for part in row if part != ""] or [""]


def scored_tokens(
    offsets: Sequence[tuple[int, int]], boundary: int, separator_length: int = 0
) -> range:
    """Which tokens of the last text are the answer's.

    offsets: the characters [start, end) of each token; boundary: the length of the text before the
    gap; gap: its length. A token that begins behind the boundary belongs to the answer. One that a
    merge made of both sides does too, since the answer cannot be had without it, unless it takes
    no more than the gap. Tokens without characters (specials) at the end do not. A tokenizer that
    trims spaces off its offsets leaves a lone space the empty span (end, end), and is read rightly.

    >>> scored_tokens([(0, 4), (4, 6), (6, 7), (0, 0)], 5), scored_tokens([(0, 4), (4, 6), (6, 9)], 5, separator_length=1)
    (range(1, 3), range(2, 3))
    """  # noqa: E501
    hits = [
        index
        for index, (start, end) in enumerate(offsets)
        if end > boundary and (start >= boundary or end > boundary + separator_length)
    ]
    return range(hits[0], hits[-1] + 1) if hits else range(0)


def make_detokenizer(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Detokenise, special tokens dropped."""

    def detokenize(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    return detokenize


def answer_suffix(template: PromptTemplate, tokenizer: Any) -> str:
    """What is appended to every answer: nothing, the tokenizer's end token, or a text."""
    if isinstance(template.answer_suffix, str):
        return template.answer_suffix
    if template.answer_suffix and tokenizer.eos_token is None:
        raise InvalidSettingsError(
            "template.answer_suffix must be a text for a tokenizer without an end token; got true."
        )
    return tokenizer.eos_token if template.answer_suffix else ""
