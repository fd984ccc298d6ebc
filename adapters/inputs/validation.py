"""What a query must hold before it is read, and one message for all that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from errata.adapters.inputs.images import open_image
from errata.functional import ModelCard, Query
from errata.functional.errors import InvalidInputError, join_messages

__all__ = ["name_query", "open_images", "validate_all", "validate_query"]


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
