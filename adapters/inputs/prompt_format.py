"""How a question becomes text: templates, the separator before the answer, scored tokens.

A row is a list of segments: texts, which are tokenised apart from one another, and numbers, which
stand for the n-th image. The answer is appended to the last text and the two are tokenised
together, so its token ids are read from the row itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from errata.functional import Query
from errata.functional.errors import InvalidSettingsError
from errata.functional.queries import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

__all__ = [
    "PromptSegment",
    "PromptTemplate",
    "answer_separator",
    "answer_suffix",
    "end_of_turn",
    "make_detokenizer",
    "scored_tokens",
    "split_template",
]

PromptSegment = str | int
"""A text, or the number of an image."""


class PromptTemplate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a question is put to a model; `templates.py` has the presets.

    With `chat`, the checkpoint's own chat template is used where it has one, with the generation
    prompt. Otherwise `raw_template` is: pieces that are tokenised apart, in which `{images}` and
    `{prompt}` stand for what they say; empty, the family's own.

    `answer_separator` stands between question and answer. None: one space, unless a space or a
    special token is there already. It counts as part of the answer, as it does for every peer: a
    tokenizer that makes the space a token of its own has that token scored.

    `answer_suffix` appends the tokenizer's end token (or the text given) to the answer, scored like
    the rest. The peers score the answer alone, and so does the default; edit with `append_eos` if
    generation must also stop after the answer.
    """

    name: str = "default"
    chat: bool = True
    system: str = ""
    prompt: str = "{prompt}"  # what is made of the question before anything else
    raw_template: tuple[str, ...] = ()
    image_wrapper: str = "{}"  # in raw text, what is written around each image
    answer_separator: str | None = None
    add_bos: bool = True  # begin with what the tokenizer puts before a text
    answer_suffix: bool | str = False
    special_targets: bool = False  # whether targets may hold special tokens, e.g. `</s>`


def answer_separator(
    template: PromptTemplate, text: str, target: str, special_tokens: tuple[str, ...]
) -> str:
    r"""What stands between the end of `text` and the target.

    >>> answer_separator(PromptTemplate(), "Answer:", "cat", ("<|im_end|>",)), answer_separator(PromptTemplate(), "USER:\n", "cat", ())
    (' ', '')

    Args:
        template: The prompt template.
        text: Text before the target.
        target: The target.
        special_tokens: Special tokens of the tokenizer.

    Returns:
        "" or a space, or what the template says.
    """  # noqa: E501
    if template.answer_separator is not None:
        return template.answer_separator
    if not text or text[-1].isspace() or target[:1].isspace():
        return ""
    return "" if special_tokens and text.endswith(special_tokens) else " "


def split_template(
    template: PromptTemplate, raw_template: Sequence[str], query: Query
) -> list[PromptSegment]:
    """Split a query under a raw template into texts and image numbers, in order.

    Images go where the template has `{images}`, with its `image_wrapper` around them; or, if the
    prompt has exactly as many `<image>` as images, there.

    >>> template = PromptTemplate(image_wrapper="<Img>{}</Img> ")
    >>> split_template(template, ("Q: {images}{prompt}",), Query("Who?", "", ("cat.png",)))
    ['Q: <Img>', 0, '</Img> Who?']

    Args:
        template: The prompt template.
        raw_template: Its pieces.
        query: The query.

    Returns:
        Texts and image numbers.
    """
    prompt = template.prompt.replace("{prompt}", query.prompt)
    if query.video and prompt.count(VIDEO_PLACEHOLDER) == 1:
        prompt = prompt.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
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

    A token that begins after the boundary belongs to the answer. One that a merge made of both
    sides does too, since the answer cannot be had without it, unless it takes no more than the
    separator. Tokens without characters (specials) at the end do not. A tokenizer that
    trims spaces off its offsets leaves a lone space the empty span (end, end), and is read rightly.

    >>> scored_tokens([(0, 4), (4, 6), (6, 7), (0, 0)], 5), scored_tokens([(0, 4), (4, 6), (6, 9)], 5, separator_length=1)
    (range(1, 3), range(2, 3))

    Args:
        offsets: Characters [start, end) of each token.
        boundary: Length of the text before the separator.
        separator_length: Length of the separator.

    Returns:
        The answer's tokens.
    """  # noqa: E501
    hits = [
        index
        for index, (start, end) in enumerate(offsets)
        if end > boundary and (start >= boundary or end > boundary + separator_length)
    ]
    return range(hits[0], hits[-1] + 1) if hits else range(0)


def make_detokenizer(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Make the function that turns ids into text, without special tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        The function.
    """

    def detokenize(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    return detokenize


_ANSWER = "errata-marks-the-answer"


def end_of_turn(template: PromptTemplate, tokenizer: Any, chat_template: str | None) -> str:
    """The token that ends an answer: where the chat template ends a turn, else the tokenizer's end.

    Llama 3's `<|eot_id|>` and Gemma's `<end_of_turn>` are not their tokenizers' end tokens, and a
    model that was taught those would not stop where its users expect.

    Args:
        template: The prompt template.
        tokenizer: A Hugging Face tokenizer.
        chat_template: The checkpoint's chat template, or None.

    Returns:
        The token's text; "" for a tokenizer without one.
    """
    default = tokenizer.eos_token or ""
    if not template.chat or not chat_template:
        return default
    for wrap in (lambda text: [{"type": "text", "text": text}], str):
        messages = [
            {"role": "user", "content": wrap("question")},
            {"role": "assistant", "content": wrap(_ANSWER)},
        ]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=chat_template, tokenize=False
            )
        except Exception:  # noqa: S112 - a template may refuse in any way it likes
            continue
        _, found, after = text.rpartition(_ANSWER)
        if found:
            special = [token for token in tokenizer.get_added_vocab() if token in after]
            return min(special, key=after.index) if special else default
    return default


def answer_suffix(template: PromptTemplate, tokenizer: Any) -> str:
    """The text appended to every answer: nothing, the tokenizer's end token, or a given text.

    Args:
        template: The prompt template.
        tokenizer: A Hugging Face tokenizer.

    Returns:
        The text.

    Raises:
        InvalidSettingsError: If the tokenizer has no end token and one is asked for.
    """
    if isinstance(template.answer_suffix, str):
        return template.answer_suffix
    if template.answer_suffix and tokenizer.eos_token is None:
        raise InvalidSettingsError(
            "template.answer_suffix must be a text for a tokenizer without an end token; got true."
        )
    return tokenizer.eos_token if template.answer_suffix else ""
