"""What a query must hold before it is read, and one message for all that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from errata.functional import ModelCard, Query
from errata.functional.errors import BadInput, listed

from .images import picture

__all__ = ["checked", "every", "named", "opened"]


def opened(images: Sequence[Any], wrong: list[str]) -> list[Any]:
    """All pictures of a query, or one BadInput: what is `wrong` already, and what will not open."""
    found = []
    for image in images:
        try:
            found.append(picture(image))
        except BadInput as error:
            wrong.append(str(error).rstrip("."))
    if wrong:
        raise BadInput(listed(dict.fromkeys(wrong)))
    return found


def checked(query: Query, card: ModelCard) -> None:
    """Raise BadInput with everything about a query that this model can not take."""
    wrong = []
    if not isinstance(query.prompt, str) or not isinstance(query.target, str):
        raise BadInput(
            "prompt and target must be text, got "
            f"{type(query.prompt).__name__} and {type(query.target).__name__}"
        )
    if query.target and not query.target.strip():
        wrong.append(f"the target must hold more than white space, got {query.target!r}")
    if query.images and not card.images:
        wrong.append(f"{card.id} takes no images, got {len(query.images)}: leave them out")
    elif query.video and not card.videos:
        wrong.append(f"{card.id} takes no video: pass the frames as pictures, or choose a model")
    elif len(query.images) > 1 and not query.video and not card.several:
        wrong.append(f"{card.id} takes one image per question, got {len(query.images)}")
    if query.video and not query.images:
        wrong.append("a video must have frames, got none")
    if wrong:
        raise BadInput(listed(wrong))


def named(number: int, query: Query, error: Exception) -> str:
    prompt = query.prompt if isinstance(query.prompt, str) else repr(query.prompt)
    short = prompt if len(prompt) <= 40 else prompt[:37] + "..."
    return f"query {number + 1} ({short!r}): {str(error).rstrip('.')}"


def every(queries: Sequence[Query], act: Callable[[int, Query], Any]) -> list[Any]:
    """Act on each query; raise one BadInput that lists all that fail."""
    done, wrong = [], []
    for number, query in enumerate(queries):
        try:
            done.append(act(number, query))
        except BadInput as error:
            wrong.append(named(number, query, error))
    if wrong:
        raise BadInput(f"{listed(wrong)}.")
    return done
