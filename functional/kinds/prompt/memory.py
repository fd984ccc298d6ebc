"""`FactMemory`: retrieve the facts that match a question, and its demonstrations."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.functional.errors import DeltaFileError, InvalidInputError
from errata.functional.forward.retrieval_keys import get_encoder, image_keys
from errata.functional.hashing import content_id
from errata.functional.kinds.prompt.entry import Prompt
from errata.functional.queries import IMAGE_PLACEHOLDER, EncodedImage, Query, encoded_image
from errata.functional.types import Model

__all__ = ["Demonstration", "fill_template", "strip_placeholders"]

MAX_CACHED_KEYS = 4096  # keys of questions and images remembered


class Demonstration(NamedTuple):
    """A demonstration: text, `<image>` where its image goes, and that image."""

    text: str
    images: tuple[EncodedImage, ...] = ()


class _Segment(NamedTuple):
    text: str
    images: tuple[Any, ...]


def strip_placeholders(text: str) -> str:
    """Remove image placeholders from a text.

    Args:
        text: Prompt text.

    Returns:
        The text without them.
    """
    return text.replace(IMAGE_PLACEHOLDER, "")


def fill_template(template: str, words: Mapping[str, str]) -> str:
    """Fill the named fields of a template in one pass, so that filled text is never expanded again.

    >>> fill_template("{prompt} {target}", {"prompt": "{target}?", "target": "bo"})
    '{target}? bo'

    Args:
        template: Text with fields like `{prompt}`.
        words: Text for each field; fields without one stay.

    Returns:
        The filled text.
    """
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), template)


class FactMemory:
    """An entry's texts and tensors, ready to be asked."""

    def __init__(
        self, model: Model, entry: Prompt, by_part: Mapping[str, Tensor], stacked: bool
    ) -> None:
        self.entry, self.stacked = entry, stacked
        self.question_keys = by_part["question_keys"].float()
        self.image_keys = by_part["image_keys"].float() if entry.image_key_size else None
        self.takes_several_images = model.card.takes_images and model.card.takes_several_images
        self.images, self.image_sizes = by_part.get("images"), by_part.get("image_sizes")
        self.demonstrations = _load_demonstrations(entry, by_part)
        self.demonstration_keys = (
            by_part["demonstration_keys"].float() if entry.num_stored_demonstrations else None
        )
        if entry.image_key_size and entry.image_key_size != model.card.hidden_size:
            raise DeltaFileError(
                f"{entry.name}: keys of images must be as wide as the model, "
                f"{model.card.hidden_size}; "
                f"are {entry.image_key_size}."
            )
        device = self.question_keys.device
        encode = get_encoder(entry.encoder, model)
        self._text_cache = _KeyCache(lambda texts: encode(texts).to(device), entry.key_size)
        self._image_cache = _KeyCache(
            lambda queries: image_keys(model, queries).to(device), entry.image_key_size
        )

    def retrieve(
        self, queries: Sequence[Query], edit_index: Tensor | None
    ) -> list[tuple[int, list[int]]]:
        """Find the facts that match each question.

        Args:
            queries: Questions.
            edit_index: The edit of a stacked delta each question runs under, [B]; none matches for
                -1.

        Returns:
            For each question the index of its memory and the matching facts, the best last.
        """
        if not queries:
            return []
        entry, device = self.entry, self.question_keys.device
        texts = [strip_placeholders(query.prompt).strip() or "?" for query in queries]
        text_keys = self._text_cache.lookup(texts, texts)  # [B d]
        edit_numbers = torch.zeros(len(queries), dtype=torch.long, device=device)
        if self.stacked and edit_index is not None:
            edit_numbers = edit_index.to(device).long()
        memory_index = edit_numbers.clamp_min(0)
        if self.stacked:
            similarity = torch.einsum("bd,bnd->bn", text_keys, self.question_keys[memory_index])
        else:
            similarity = text_keys @ self.question_keys.T  # [B N]
        fits = similarity >= entry.min_similarity - SIMILARITY_TOLERANCE
        similarity = _rescale(similarity, entry.min_similarity)
        if self.image_keys is not None:
            names = [(tuple(map(content_id, q.images)), q.video) for q in queries]
            query_image_keys = self._image_cache.lookup(names, list(queries))  # [B v]
            fact_image_keys = (
                self.image_keys[memory_index] if self.stacked else self.image_keys[None]
            )
            image_similarity = (query_image_keys[:, None] * fact_image_keys).sum(-1)  # [B N]
            has_image = fact_image_keys.abs().sum(-1) > 0
            fits = fits & (
                ~has_image | (image_similarity >= entry.min_image_similarity - SIMILARITY_TOLERANCE)
            )
            similarity = torch.where(
                has_image,
                (similarity + _rescale(image_similarity, entry.min_image_similarity)) / 2,
                similarity,
            )
        similarity = torch.where(fits & (edit_numbers >= 0)[:, None], similarity, -torch.inf).flip(
            1
        )
        best = similarity.sort(dim=1, descending=True, stable=True)
        last = similarity.shape[1] - 1
        retrieved = []
        for number, row, scores in zip(
            memory_index.tolist(), best.indices[:, : entry.max_facts].tolist(), best.values.tolist()
        ):
            chosen = [last - n for n, score in zip(row, scores) if score > -torch.inf]
            retrieved.append((number, chosen[::-1]))
        return retrieved

    def segments(
        self, query: Query, number: int, facts: Sequence[int]
    ) -> tuple[list[_Segment], list[_Segment]]:
        """The demonstrations and facts to prepend to a question; without their images if it has a
        video.

        Args:
            query: The question.
            number: Index of the memory.
            facts: Indices of the matching facts.

        Returns:
            Demonstrations and facts.
        """
        shows_images = self.takes_several_images and not query.video
        fact_segments = [self._fact_segment(number, fact, shows_images) for fact in facts]
        demos = []
        if self.entry.num_demonstrations and self.demonstrations:
            text = "".join(strip_placeholders(piece.text) for piece in fact_segments)
            if self.entry.demonstration_key == "question":
                text += fill_template(
                    self.entry.question_template, {"question": strip_placeholders(query.prompt)}
                )
            key = self._text_cache.lookup([text], [text])[0]  # [d]
            assert self.demonstration_keys is not None
            order = (self.demonstration_keys @ key).sort(descending=True, stable=True).indices
            chosen = order[: self.entry.num_demonstrations].tolist()
            for n in chosen if self.entry.demonstration_order == "nearest-first" else chosen[::-1]:
                demo = self.demonstrations[n]
                demos.append(
                    _Segment(demo.text, demo.images)
                    if shows_images and demo.images
                    else _Segment(strip_placeholders(demo.text), ())
                )
        return demos, fact_segments

    def nearest_demonstrations(self, demos: list[_Segment], count: int) -> list[_Segment]:
        """The nearest of some demonstrations.

        Args:
            demos: Demonstrations in the order of the prompt.
            count: How many to keep.

        Returns:
            The `count` nearest, in the same order.
        """
        if self.entry.demonstration_order == "nearest-first":
            return demos[:count]
        return demos[len(demos) - count :]

    def prepend(self, query: Query, segments: Sequence[_Segment]) -> Query:
        """Prepend segments to a question, with placeholders for its own images if the segments have
        images.

        Args:
            query: The question.
            segments: Demonstrations and facts.

        Returns:
            The expanded question.
        """
        question = fill_template(self.entry.question_template, {"question": query.prompt})
        earlier_images = tuple(image for segment in segments for image in segment.images)
        if (
            earlier_images
            and query.images
            and query.prompt.count(IMAGE_PLACEHOLDER) != len(query.images)
        ):
            question = IMAGE_PLACEHOLDER * len(query.images) + question
        text = "".join(piece.text for piece in segments) + question
        return query._replace(prompt=text, images=(*earlier_images, *query.images))

    def _fact_segment(self, number: int, fact: int, shows_images: bool) -> _Segment:
        text = self.entry.facts[number * self.entry.num_facts + fact]
        if not (shows_images and self.images is not None and IMAGE_PLACEHOLDER in text):
            return _Segment(strip_placeholders(text), ())
        assert self.image_sizes is not None
        encoded_files, sizes = (
            (self.images[number, fact], self.image_sizes[number, fact])
            if self.stacked
            else (self.images[fact], self.image_sizes[fact])
        )
        images = [
            encoded_image(bytes(file[:size].tolist()))
            for file, size in zip(encoded_files, sizes.tolist())
            if size
        ]
        if text.count(IMAGE_PLACEHOLDER) != len(images):
            raise DeltaFileError(
                f"{self.entry.name}: fact {fact} must have an image for each "
                f"{IMAGE_PLACEHOLDER}, has "
                f"{len(images)}."
            )
        return _Segment(text, tuple(images))


SIMILARITY_TOLERANCE = 1e-5  # rounding of a similarity


def _rescale(similarity: Tensor, min_similarity: float) -> Tensor:
    return (similarity - min_similarity) / max(1 - min_similarity, 1e-6)


def _load_demonstrations(entry: Prompt, by_part: Mapping[str, Tensor]) -> list[Demonstration]:
    """The demonstrations, decoded. Raises DeltaFileError where texts or images do not add up."""
    if not entry.num_stored_demonstrations:
        return []
    texts = _split_bytes(
        entry, by_part["demonstrations"], by_part["demonstration_ends"], "demonstrations"
    )
    files = (
        _split_bytes(
            entry, by_part["demonstration_images"], by_part["demonstration_image_ends"], "images"
        )
        if (entry.num_demonstration_images)
        else []
    )
    image_index = by_part["demonstration_image_index"].tolist() if files else [-1] * len(texts)
    if any(not -1 <= n < len(files) for n in image_index):
        raise DeltaFileError(f"{entry.name}: demonstrations must show images that are there.")
    images = [encoded_image(data) for data in files]
    try:
        decoded = [text.decode() for text in texts]
    except UnicodeDecodeError as fault:
        raise DeltaFileError(f"{entry.name}: demonstrations must be UTF-8 text: {fault}.") from None
    wrong = [
        n
        for n, (text, image_number) in enumerate(zip(decoded, image_index))
        if image_number >= 0 and text.count(IMAGE_PLACEHOLDER) != 1
    ]
    if wrong:
        raise DeltaFileError(
            f"{entry.name}: demonstration {wrong[0]} must hold {IMAGE_PLACEHOLDER} once."
        )
    return [
        Demonstration(text, (images[n],) if n >= 0 else ()) for text, n in zip(decoded, image_index)
    ]


def _split_bytes(entry: Prompt, data: Tensor, ends: Tensor, what: str) -> list[bytes]:
    raw, boundaries = bytes(data.cpu().numpy()), ends.tolist()
    if boundaries != sorted(boundaries) or boundaries[0] < 0 or boundaries[-1] != len(raw):
        raise DeltaFileError(f"{entry.name}: the ends of {what} must rise up to {len(raw)}.")
    return [raw[begin:end] for begin, end in zip([0, *boundaries], boundaries)]


class _KeyCache:
    """Keys by content, each made once; the oldest are dropped."""

    def __init__(self, make: Callable[[list[Any]], Tensor], dim: int) -> None:
        self._make, self._dim = make, dim
        self._keys: OrderedDict[Any, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def lookup(self, names: Sequence[Any], values: Sequence[Any]) -> Tensor:
        """[B d] one key per value, `names` saying what they are."""
        with self._lock:
            cached = {name: self._keys[name] for name in names if name in self._keys}
        missing = {name: value for name, value in zip(names, values) if name not in cached}
        if missing:
            new_keys = dict(zip(missing, self._make(list(missing.values()))))
            cached |= new_keys
            with self._lock:
                self._keys.update(new_keys)
                while len(self._keys) > MAX_CACHED_KEYS:
                    self._keys.popitem(last=False)
        keys = torch.stack([cached[name] for name in names])
        if keys.shape[1] != self._dim:
            raise InvalidInputError(
                f"the encoder must give keys of width {self._dim}, as it did when the edits were "
                f"made, and gives {keys.shape[1]}: it is another model of that name."
            )
        return keys
