"""A `prompt` entry bound to a model: facts found for each question, put before it as text.

    similarity of questions  t_n = <key of the question, questions_n>
    of pictures              p_n = <key of what it shows, pictures_n>, where fact n has a picture
    n fits                   t_n >= least, and p_n >= least_look where it has a picture
    best n                   largest mean of (t_n - least) / (1 - least) and the same of p_n;
                             of equal ones the latest, so that a repeated edit counts as it says now

The `most` best facts that fit are put before the question, the best next to it, and before them
the `k` demonstrations nearest to fact and question. A question that nothing fits is read as ever.
Only the prompt is looked at, never the target: what is retrieved is the same whatever the answer.

After IKE: Zheng et al. 2023, https://arxiv.org/abs/2305.12740; EasyEdit's `models/ike`. Legend:
B questions · N facts · E edits · D demonstrations · d, v widths of keys.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .change import Patch
from .encoders import get_encoder, image_keys
from .entries import Prompt
from .errors import DeltaFileError, InvalidInputError
from .header import Header
from .queries import IMAGE_PLACEHOLDER
from .records import content_id
from .types import Inputs, Model, Query

__all__ = [
    "Demonstration",
    "EncodedImage",
    "RetrievalPreprocess",
    "as_png",
    "expand_prompts",
    "without_memories",
    "fill_template",
    "open_pngs",
    "apply",
    "strip_placeholders",
]

MAX_CACHED_KEYS = 4096  # keys of questions and pictures remembered

_PNG: list[tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = []


def open_pngs(write: Callable[[Any], bytes], read: Callable[[bytes], Any]) -> None:
    """Say how pictures become PNG files and back: the adapters do, who know pictures."""
    _PNG[:] = [(write, read)]


def as_png(image: Any) -> bytes:
    """A picture as the bytes of a PNG file."""
    return _PNG[0][0](image)


class EncodedImage(NamedTuple):
    """A picture out of a delta file, named by its content."""

    data: bytes
    content_id: str

    def load(self) -> Any:
        """Decode it."""
        return _PNG[0][1](self.data)


class Demonstration(NamedTuple):
    """A demonstration: text, `<image>` where its picture stands, and that picture."""

    text: str
    images: tuple[EncodedImage, ...] = ()


class _Segment(NamedTuple):
    text: str
    images: tuple[Any, ...]


def apply(model: Model, header: Header, entry: Prompt, tensors: Mapping[str, Tensor]) -> Patch:
    """What a memory of facts does to a model: questions are read with what fits them before.

    Keys are made by the model as it was before this delta, with nothing put before. Raises
    DeltaFault for texts or pictures that are not what the entry says.
    """
    by_part = {name.removeprefix(f"{entry.name}."): t for name, t in tensors.items()}
    memory = FactMemory(model, entry, by_part, bool(header.stack))

    def wrap(bound: Model) -> Model:
        return bound._replace(
            preprocess=RetrievalPreprocess(memory, bound.preprocess, model.card.max_positions)
        )

    return Patch(wrap=wrap)


def expand_prompts(
    model: Model, queries: Sequence[Query], edit_index: Tensor | None = None
) -> list[Query]:
    """The questions as `model` reads them: with what its memories of facts put before each."""
    preprocess = model.preprocess
    return (
        preprocess.expand_prompts(queries, edit_index)
        if isinstance(preprocess, RetrievalPreprocess)
        else list(queries)
    )


def without_memories(model: Model) -> Model:
    """The model without memories of facts that were bound before: keys are of a question alone."""
    while isinstance(model.preprocess, RetrievalPreprocess):
        model = model._replace(preprocess=model.preprocess.base_preprocess)
    return model


def strip_placeholders(text: str) -> str:
    """A text without places for pictures."""
    return text.replace(IMAGE_PLACEHOLDER, "")


def fill_template(template: str, words: Mapping[str, str]) -> str:
    """A template with words at their places; what they hold is never read as a place.

    >>> fill_template("{prompt} {target}", {"prompt": "{target}?", "target": "bo"})
    '{target}? bo'
    """
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), template)


class RetrievalPreprocess:
    """`model.read` with a memory of facts in front; safe to share between threads."""

    def __init__(
        self, memory: FactMemory, base_preprocess: Callable[..., Inputs], max_positions: int
    ) -> None:
        self.memory, self.base_preprocess, self.max_positions = (
            memory,
            base_preprocess,
            max_positions,
        )

    def __call__(
        self,
        queries: Sequence[Query],
        *,
        append_eos: bool = False,
        edit_index: Tensor | None = None,
    ) -> Inputs:
        queries = list(queries)
        expanded = self._expand(queries, edit_index)
        options: dict[str, Any] = {"edit_index": edit_index} | (
            {"append_eos": True} if append_eos else {}
        )
        try:
            return self.base_preprocess(expanded, **options)
        except InvalidInputError as fault:
            for old, new in zip(queries, expanded):
                if (
                    new is not old
                    and self._longest_prompt(new) is None
                    and self._longest_prompt(old) is not None
                ):
                    raise InvalidInputError(
                        f"question and facts must fit into the {self.max_positions} tokens of the "
                        f"model, and {old.prompt[:60]!r} fits only without them ({fault}): put "
                        "fewer facts before a question (`max_facts`), or shorten the edit."
                    ) from fault
            raise

    def expand_prompts(
        self, queries: Sequence[Query], edit_index: Tensor | None = None
    ) -> list[Query]:
        """The questions as they are read in the end."""
        expanded = self._expand(list(queries), edit_index)
        return (
            self.base_preprocess.expand_prompts(expanded, edit_index)
            if isinstance(self.base_preprocess, RetrievalPreprocess)
            else expanded
        )

    def _expand(self, queries: list[Query], edit_index: Tensor | None) -> list[Query]:
        memory = self.memory
        retrieved = memory.retrieve(queries, edit_index)
        segments = [
            memory.segments(query, *retrieval) if retrieval[1] else ([], [])
            for query, retrieval in zip(queries, retrieved)
        ]
        expanded = [
            memory.prepend(query, demos + facts) if facts else query
            for query, (demos, facts) in zip(queries, segments)
        ]
        if not any(demos for demos, _ in segments) or self._leaves_room(expanded):
            return expanded
        return [
            self._drop_demonstrations(query, demos, facts) if demos else full_query
            for query, (demos, facts), full_query in zip(queries, segments, expanded)
        ]

    def _drop_demonstrations(
        self, query: Query, demos: list[_Segment], facts: list[_Segment]
    ) -> Query:
        """The question with as many of the nearest demonstrations as there is room for."""
        memory = self.memory
        low, high = 0, len(demos)
        while low < high:
            middle = (low + high + 1) // 2
            nearest = memory.nearest_demonstrations(demos, middle)
            if self._leaves_room([memory.prepend(query, nearest + facts)]):
                low = middle
            else:
                high = middle - 1
        return memory.prepend(query, memory.nearest_demonstrations(demos, low) + facts)

    def _leaves_room(self, queries: Sequence[Query]) -> bool:
        """Whether all leave the room they should behind the prompt; targets are not looked at."""
        longest = self._longest_prompt(*queries)
        return (
            longest is not None
            and longest <= self.max_positions - self.memory.entry.reserved_tokens
        )

    def _longest_prompt(self, *queries: Query) -> int | None:
        """Tokens of the longest prompt; None where one can not be read."""
        try:
            inputs = self.base_preprocess([query._replace(target="") for query in queries])
        except InvalidInputError:
            return None
        return inputs.input_ids.shape[1]


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
                f"{entry.name}: keys of pictures must be as wide as the model, {model.card.hidden_size}; "
                f"are {entry.image_key_size}."
            )
        device = self.question_keys.device
        model = without_memories(model)
        encode = get_encoder(entry.encoder, model)
        self._text_cache = _KeyCache(lambda texts: encode(texts).to(device), entry.key_size)
        self._image_cache = _KeyCache(
            lambda queries: image_keys(model, queries).to(device), entry.image_key_size
        )

    def retrieve(
        self, queries: Sequence[Query], edit_index: Tensor | None
    ) -> list[tuple[int, list[int]]]:
        """(memory, its facts that fit, best last) of each question; no facts for edit -1."""
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
        """Demonstrations and facts as they stand before a question, without pictures in a video."""
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
        """The `count` nearest of demonstrations in their order."""
        if self.entry.demonstration_order == "nearest-first":
            return demos[:count]
        return demos[len(demos) - count :]

    def prepend(self, query: Query, segments: Sequence[_Segment]) -> Query:
        """A question with pieces before it; places for its own pictures, if theirs have some."""
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
            _encoded_image(bytes(file[:size].tolist()))
            for file, size in zip(encoded_files, sizes.tolist())
            if size
        ]
        if text.count(IMAGE_PLACEHOLDER) != len(images):
            raise DeltaFileError(
                f"{self.entry.name}: fact {fact} must have a picture for each {IMAGE_PLACEHOLDER}, has "
                f"{len(images)}."
            )
        return _Segment(text, tuple(images))


SIMILARITY_TOLERANCE = 1e-5  # rounding of a similarity


def _rescale(similarity: Tensor, min_similarity: float) -> Tensor:
    return (similarity - min_similarity) / max(1 - min_similarity, 1e-6)


def _encoded_image(data: bytes) -> EncodedImage:
    return EncodedImage(data, hashlib.sha256(data).hexdigest())


def _load_demonstrations(entry: Prompt, by_part: Mapping[str, Tensor]) -> list[Demonstration]:
    """The demonstrations, decoded. Raises DeltaFault where texts or pictures do not add up."""
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
        raise DeltaFileError(f"{entry.name}: demonstrations must show pictures that are there.")
    images = [_encoded_image(data) for data in files]
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
