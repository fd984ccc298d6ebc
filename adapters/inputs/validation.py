"""What a query must hold before it is read, and one message for all that do not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from errata.adapters.inputs.collation import TokenRow
from errata.adapters.inputs.images import open_image
from errata.functional import ModelCard, Query
from errata.functional.errors import ErrataError, InvalidInputError, join_messages, lone_surrogate

MAX_CHARS_PER_TOKEN = 64
"""Longer texts are refused before they are tokenised: no tokens are that long in the mean."""

__all__ = [
    "describe_images",
    "name_query",
    "open_images",
    "reading",
    "refuse_special_tokens",
    "special_tokens_of",
    "validate_all",
    "validate_query",
    "validate_tokens",
]


def open_images(images: Sequence[Any], wrong: list[str]) -> list[Any]:
    """Open all images of a query.

    Args:
        images: Images.
        wrong: Complaints so far; those of the images are appended.

    Returns:
        The opened images.

    Raises:
        InvalidInputError: With all complaints.
    """
    opened_images = []
    for image in images:
        try:
            opened_images.append(open_image(image))
        except InvalidInputError as error:
            wrong.append(str(error).rstrip("."))
    if wrong:
        raise InvalidInputError(join_messages(dict.fromkeys(wrong)))
    return opened_images


def validate_query(query: Query, card: ModelCard) -> None:
    """Check that a model can take a query.

    Args:
        query: The query.
        card: The model's card.

    Raises:
        InvalidInputError: With everything that the model cannot take.
    """
    wrong = []
    if not isinstance(query.prompt, str) or not isinstance(query.target, str):
        raise InvalidInputError(
            "prompt and target must be text, got "
            f"{type(query.prompt).__name__} and {type(query.target).__name__}"
        )
    for text in (query.prompt, query.target):
        if surrogate := lone_surrogate(text):
            wrong.append(surrogate)
    longest = MAX_CHARS_PER_TOKEN * card.max_positions
    if len(query.prompt) + len(query.target) > longest:
        raise InvalidInputError(
            f"a row must have at most {card.max_positions} tokens, and prompt and target have "
            f"{len(query.prompt) + len(query.target):,} characters: shorten the prompt"
        )
    if query.target and not query.target.strip():
        wrong.append(f"the target must hold more than white space, got {query.target!r}")
    if query.images and not card.takes_images:
        wrong.append(f"{card.id} takes no images, got {len(query.images)}: leave them out")
    elif query.video and not card.takes_videos:
        wrong.append(f"{card.id} takes no video: pass the frames as images, or choose a model")
    elif len(query.images) > 1 and not query.video and not card.takes_several_images:
        wrong.append(f"{card.id} takes one image per question, got {len(query.images)}")
    if query.video and not query.images:
        wrong.append("a video must have frames, got none")
    if wrong:
        raise InvalidInputError(join_messages(wrong))


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any error of a processor or tokenizer into one that says what could not be read.

    Args:
        what: What is read, e.g. "the image of this query".

    Yields:
        Nothing.

    Raises:
        InvalidInputError: For any other error than errata's own.
    """
    try:
        yield
    except ErrataError:
        raise
    except Exception as error:  # a processor has many ways to say no
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise InvalidInputError(
            f"{what} cannot be read ({type(error).__name__}: {reason})"
        ) from error


def describe_images(images: Sequence[Any]) -> str:
    """Name the images of a query for a message.

    Args:
        images: Images.

    Returns:
        Paths, or sizes of images in memory.
    """
    names = []
    for image in images:
        if isinstance(image, (str, os.PathLike)):
            names.append(repr(os.fspath(image)))
        elif hasattr(image, "size") and hasattr(image, "mode"):
            names.append(f"a {image.size[0]} x {image.size[1]} image")
        else:
            path = getattr(image, "path", None) or getattr(image, "content_id", "")
            names.append(repr(str(path)[:80]))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def refuse_special_tokens(text: str, special_tokens: Sequence[str]) -> None:
    """Refuse a target that holds special tokens of the tokenizer.

    Args:
        text: The target.
        special_tokens: Special tokens.

    Raises:
        InvalidInputError: Names those that it holds.
    """
    found = [token for token in special_tokens if token in text]
    if found:
        raise InvalidInputError(
            f"the target must be plain text, and holds the special token(s) "
            f"{', '.join(map(repr, found[:4]))}: take them out, or use a template with "
            "special_targets=True"
        )


def special_tokens_of(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, those that are added as such included.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        Their texts.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)}
    return tuple(sorted(special | set(tokenizer.all_special_tokens)))


def validate_tokens(
    token_row: TokenRow, card: ModelCard, tokenizer: Any, *, has_target: bool
) -> None:
    """Check that a model can take a tokenised row.

    Args:
        token_row: Ids, image mask and scored tokens.
        card: The model's card.
        tokenizer: Its tokenizer.
        has_target: Whether the query has a target.

    Raises:
        InvalidInputError: Says what the model cannot take.
    """
    if len(token_row.input_ids) > card.max_positions:
        raise InvalidInputError(
            f"a row must have at most {card.max_positions} tokens, and this has "
            f"{len(token_row.input_ids)} "
            f"({sum(token_row.image_mask)} of them images): shorten the prompt or use fewer "
            "images"
        )
    if max(token_row.input_ids, default=0) >= card.vocab_size:
        token = tokenizer.convert_ids_to_tokens(max(token_row.input_ids))
        raise InvalidInputError(
            f"every token must be one of the model's {card.vocab_size}, and {token!r} is "
            "none: "
            "take it out of the text"
        )
    if not token_row.input_ids:
        raise InvalidInputError("the prompt must hold something, and this row has no token at all")
    if has_target and not token_row.scored_tokens:
        raise InvalidInputError(
            "the target must have a token of its own, and the tokenizer gives none"
        )
    if has_target and token_row.scored_tokens.start == 0:
        raise InvalidInputError(
            "the prompt must not be empty: nothing predicts the first target token"
        )


def name_query(number: int, query: Query, error: Exception) -> str:
    """Prefix a complaint with the number and prompt of its query.

    Args:
        number: Index of the query.
        query: The query.
        error: The complaint.

    Returns:
        One line.
    """
    prompt = query.prompt if isinstance(query.prompt, str) else repr(query.prompt)
    short = prompt if len(prompt) <= 40 else prompt[:37] + "..."
    return f"query {number + 1} ({short!r}): {str(error).rstrip('.')}"


def validate_all(queries: Sequence[Query], act: Callable[[int, Query], Any]) -> list[Any]:
    """Act on each query, and report all failures together.

    Args:
        queries: Queries.
        act: Called with the index and the query.

    Returns:
        The results.

    Raises:
        InvalidInputError: Lists all that failed.
    """
    results, wrong = [], []
    for number, query in enumerate(queries):
        try:
            results.append(act(number, query))
        except InvalidInputError as error:
            wrong.append(name_query(number, query, error))
    if wrong:
        raise InvalidInputError(f"{join_messages(wrong)}.")
    return results
