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

from .change import Change
from .encoders import encoder, looks
from .entries import Prompt
from .errors import BadInput, DeltaFault
from .header import Header
from .queries import MARK
from .records import image_key
from .types import Inputs, Model, Query

__all__ = [
    "Demo", "Png", "Reads", "as_png", "asked", "bare", "filled", "open_pngs", "prompt", "unmarked",
]  # fmt: skip

KEPT = 4096  # keys of questions and pictures remembered

_PNG: list[tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = []


def open_pngs(write: Callable[[Any], bytes], read: Callable[[bytes], Any]) -> None:
    """Say how pictures become PNG files and back: the adapters do, who know pictures."""
    _PNG[:] = [(write, read)]


def as_png(image: Any) -> bytes:
    """A picture as the bytes of a PNG file."""
    return _PNG[0][0](image)


class Png(NamedTuple):
    """A picture out of a delta file, named by its content."""

    data: bytes
    key: str

    def load(self) -> Any:
        """Decode it."""
        return _PNG[0][1](self.data)


class Demo(NamedTuple):
    """A demonstration: text, `<image>` where its picture stands, and that picture."""

    text: str
    images: tuple[Png, ...] = ()


class _Piece(NamedTuple):
    text: str
    images: tuple[Any, ...]


def prompt(model: Model, header: Header, entry: Prompt, tensors: Mapping[str, Tensor]) -> Change:
    """What a memory of facts does to a model: questions are read with what fits them before.

    Keys are made by the model as it was before this delta, with nothing put before. Raises
    DeltaFault for texts or pictures that are not what the entry says.
    """
    given = {name.removeprefix(f"{entry.name}."): t for name, t in tensors.items()}
    memory = _Memory(model, entry, given, bool(header.stack))

    def wrap(bound: Model) -> Model:
        return bound._replace(read=Reads(memory, bound.read, model.card.context))

    return Change(wrap=wrap)


def asked(model: Model, queries: Sequence[Query], edit: Tensor | None = None) -> list[Query]:
    """The questions as `model` reads them: with what its memories of facts put before each."""
    read = model.read
    return read.asked(queries, edit) if isinstance(read, Reads) else list(queries)


def bare(model: Model) -> Model:
    """The model without memories of facts that were bound before: keys are of a question alone."""
    while isinstance(model.read, Reads):
        model = model._replace(read=model.read.inner)
    return model


def unmarked(text: str) -> str:
    """A text without places for pictures."""
    return text.replace(MARK, "")


def filled(template: str, words: Mapping[str, str]) -> str:
    """A template with words at their places; what they hold is never read as a place.

    >>> filled("{prompt} {target}", {"prompt": "{target}?", "target": "bo"})
    '{target}? bo'
    """
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), template)


class Reads:
    """`model.read` with a memory of facts in front; safe to share between threads."""

    def __init__(self, memory: _Memory, inner: Callable[..., Inputs], context: int) -> None:
        self.memory, self.inner, self.context = memory, inner, context

    def __call__(
        self, queries: Sequence[Query], *, end: bool = False, edit: Tensor | None = None
    ) -> Inputs:
        queries = list(queries)
        put = self._put(queries, edit)
        options: dict[str, Any] = {"edit": edit} | ({"end": True} if end else {})
        try:
            return self.inner(put, **options)
        except BadInput as fault:
            for old, new in zip(queries, put):
                if new is not old and self._length(new) is None and self._length(old) is not None:
                    raise BadInput(
                        f"question and facts must fit into the {self.context} tokens of the "
                        f"model, and {old.prompt[:60]!r} fits only without them ({fault}): put "
                        "fewer facts before a question (`most`), or shorten the edit."
                    ) from fault
            raise

    def asked(self, queries: Sequence[Query], edit: Tensor | None = None) -> list[Query]:
        """The questions as they are read in the end."""
        put = self._put(list(queries), edit)
        return self.inner.asked(put, edit) if isinstance(self.inner, Reads) else put

    def _put(self, queries: list[Query], edit: Tensor | None) -> list[Query]:
        memory = self.memory
        found = memory.find(queries, edit)
        pieces = [
            memory.pieces(query, *one) if one[1] else ([], []) for query, one in zip(queries, found)
        ]
        whole = [
            memory.joined(query, demos + facts) if facts else query
            for query, (demos, facts) in zip(queries, pieces)
        ]
        if not any(demos for demos, _ in pieces) or self._roomy(whole):
            return whole
        return [
            self._shortened(query, demos, facts) if demos else full
            for query, (demos, facts), full in zip(queries, pieces, whole)
        ]

    def _shortened(self, query: Query, demos: list[_Piece], facts: list[_Piece]) -> Query:
        """The question with as many of the nearest demonstrations as there is room for."""
        memory = self.memory
        low, high = 0, len(demos)
        while low < high:
            middle = (low + high + 1) // 2
            kept = memory.nearest(demos, middle)
            if self._roomy([memory.joined(query, kept + facts)]):
                low = middle
            else:
                high = middle - 1
        return memory.joined(query, memory.nearest(demos, low) + facts)

    def _roomy(self, queries: Sequence[Query]) -> bool:
        """Whether all leave the room they should behind the prompt; targets are not looked at."""
        longest = self._length(*queries)
        return longest is not None and longest <= self.context - self.memory.entry.room

    def _length(self, *queries: Query) -> int | None:
        """Tokens of the longest prompt; None where one can not be read."""
        try:
            inputs = self.inner([query._replace(target="") for query in queries])
        except BadInput:
            return None
        return inputs.ids.shape[1]


class _Memory:
    """An entry's texts and tensors, ready to be asked."""

    def __init__(
        self, model: Model, entry: Prompt, given: Mapping[str, Tensor], stacked: bool
    ) -> None:
        self.entry, self.stacked = entry, stacked
        self.questions = given["questions"].float()
        self.pictures = given["pictures"].float() if entry.look else None
        self.several = model.card.images and model.card.several
        self.shown, self.sizes = given.get("shown"), given.get("sizes")
        self.demos = _demos(entry, given)
        self.demo_keys = given["demo_keys"].float() if entry.num_demos else None
        if entry.look and entry.look != model.card.width:
            raise DeltaFault(
                f"{entry.name}: keys of pictures must be as wide as the model, {model.card.width}; "
                f"are {entry.look}."
            )
        home = self.questions.device
        model = bare(model)
        encode = encoder(entry.encoder, model)
        self._words = _Kept(lambda texts: encode(texts).to(home), entry.width)
        self._looks = _Kept(lambda queries: looks(model, queries).to(home), entry.look)

    def find(self, queries: Sequence[Query], edit: Tensor | None) -> list[tuple[int, list[int]]]:
        """(memory, its facts that fit, best last) of each question; no facts for edit -1."""
        if not queries:
            return []
        entry, home = self.entry, self.questions.device
        texts = [unmarked(query.prompt).strip() or "?" for query in queries]
        words = self._words.of(texts, texts)  # [B d]
        mine = torch.zeros(len(queries), dtype=torch.long, device=home)
        if self.stacked and edit is not None:
            mine = edit.to(home).long()
        at = mine.clamp_min(0)
        if self.stacked:
            value = torch.einsum("bd,bnd->bn", words, self.questions[at])
        else:
            value = words @ self.questions.T  # [B N]
        fits = value >= entry.least - SLACK
        value = _over(value, entry.least)
        if self.pictures is not None:
            names = [(tuple(map(image_key, q.images)), q.video) for q in queries]
            seen = self._looks.of(names, list(queries))  # [B v]
            there = self.pictures[at] if self.stacked else self.pictures[None]
            near = (seen[:, None] * there).sum(-1)  # [B N]
            has = there.abs().sum(-1) > 0
            fits = fits & (~has | (near >= entry.least_look - SLACK))
            value = torch.where(has, (value + _over(near, entry.least_look)) / 2, value)
        value = torch.where(fits & (mine >= 0)[:, None], value, -torch.inf).flip(1)
        best = value.sort(dim=1, descending=True, stable=True)
        last = value.shape[1] - 1
        found = []
        for number, row, scores in zip(
            at.tolist(), best.indices[:, : entry.most].tolist(), best.values.tolist()
        ):
            chosen = [last - n for n, score in zip(row, scores) if score > -torch.inf]
            found.append((number, chosen[::-1]))
        return found

    def pieces(
        self, query: Query, number: int, facts: Sequence[int]
    ) -> tuple[list[_Piece], list[_Piece]]:
        """Demonstrations and facts as they stand before a question, without pictures in a video."""
        shows = self.several and not query.video
        put = [self._fact(number, fact, shows) for fact in facts]
        demos = []
        if self.entry.k and self.demos:
            text = "".join(unmarked(piece.text) for piece in put)
            if self.entry.by == "question":
                text += filled(self.entry.ask, {"question": unmarked(query.prompt)})
            key = self._words.of([text], [text])[0]  # [d]
            assert self.demo_keys is not None
            near = (self.demo_keys @ key).sort(descending=True, stable=True).indices
            chosen = near[: self.entry.k].tolist()
            for n in chosen if self.entry.order == "nearest-first" else chosen[::-1]:
                demo = self.demos[n]
                demos.append(_Piece(demo.text, demo.images) if shows and demo.images
                             else _Piece(unmarked(demo.text), ()))  # fmt: skip
        return demos, put

    def nearest(self, demos: list[_Piece], count: int) -> list[_Piece]:
        """The `count` nearest of demonstrations in their order."""
        if self.entry.order == "nearest-first":
            return demos[:count]
        return demos[len(demos) - count :]

    def joined(self, query: Query, pieces: Sequence[_Piece]) -> Query:
        """A question with pieces before it; places for its own pictures, if theirs have some."""
        question = filled(self.entry.ask, {"question": query.prompt})
        before = tuple(image for piece in pieces for image in piece.images)
        if before and query.images and query.prompt.count(MARK) != len(query.images):
            question = MARK * len(query.images) + question
        text = "".join(piece.text for piece in pieces) + question
        return query._replace(prompt=text, images=(*before, *query.images))

    def _fact(self, number: int, fact: int, shows: bool) -> _Piece:
        text = self.entry.facts[number * self.entry.num_facts + fact]
        if not (shows and self.shown is not None and MARK in text):
            return _Piece(unmarked(text), ())
        assert self.sizes is not None
        files, sizes = (
            (self.shown[number, fact], self.sizes[number, fact]) if self.stacked
            else (self.shown[fact], self.sizes[fact])
        )  # fmt: skip
        images = [
            _png(bytes(file[:size].tolist())) for file, size in zip(files, sizes.tolist()) if size
        ]
        if text.count(MARK) != len(images):
            raise DeltaFault(
                f"{self.entry.name}: fact {fact} must have a picture for each {MARK}, has "
                f"{len(images)}."
            )
        return _Piece(text, tuple(images))


SLACK = 1e-5  # rounding of a similarity


def _over(similarity: Tensor, least: float) -> Tensor:
    return (similarity - least) / max(1 - least, 1e-6)


def _png(data: bytes) -> Png:
    return Png(data, hashlib.sha256(data).hexdigest())


def _demos(entry: Prompt, given: Mapping[str, Tensor]) -> list[Demo]:
    """The demonstrations, decoded. Raises DeltaFault where texts or pictures do not add up."""
    if not entry.num_demos:
        return []
    texts = _cut(entry, given["demos"], given["ends"], "demonstrations")
    files = _cut(entry, given["demo_shown"], given["demo_shown_ends"], "pictures") if (
        entry.num_demo_shown
    ) else []  # fmt: skip
    shows = given["demo_shows"].tolist() if files else [-1] * len(texts)
    if any(not -1 <= n < len(files) for n in shows):
        raise DeltaFault(f"{entry.name}: demonstrations must show pictures that are there.")
    pictures = [_png(data) for data in files]
    try:
        said = [text.decode() for text in texts]
    except UnicodeDecodeError as fault:
        raise DeltaFault(f"{entry.name}: demonstrations must be UTF-8 text: {fault}.") from None
    wrong = [n for n, (text, show) in enumerate(zip(said, shows)) if show >= 0
             and text.count(MARK) != 1]  # fmt: skip
    if wrong:
        raise DeltaFault(f"{entry.name}: demonstration {wrong[0]} must hold {MARK} once.")
    return [Demo(text, (pictures[n],) if n >= 0 else ()) for text, n in zip(said, shows)]


def _cut(entry: Prompt, data: Tensor, ends: Tensor, what: str) -> list[bytes]:
    raw, places = bytes(data.cpu().numpy()), ends.tolist()
    if places != sorted(places) or places[0] < 0 or places[-1] != len(raw):
        raise DeltaFault(f"{entry.name}: the ends of {what} must rise up to {len(raw)}.")
    return [raw[begin:end] for begin, end in zip([0, *places], places)]


class _Kept:
    """Keys by content, each made once; the oldest are dropped."""

    def __init__(self, make: Callable[[list[Any]], Tensor], width: int) -> None:
        self._make, self._width = make, width
        self._keys: OrderedDict[Any, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, names: Sequence[Any], values: Sequence[Any]) -> Tensor:
        """[B d] one key per value, `names` saying what they are."""
        with self._lock:
            known = {name: self._keys[name] for name in names if name in self._keys}
        missing = {name: value for name, value in zip(names, values) if name not in known}
        if missing:
            made = dict(zip(missing, self._make(list(missing.values()))))
            known |= made
            with self._lock:
                self._keys.update(made)
                while len(self._keys) > KEPT:
                    self._keys.popitem(last=False)
        keys = torch.stack([known[name] for name in names])
        if keys.shape[1] != self._width:
            raise BadInput(
                f"the encoder must give keys of width {self._width}, as it did when the edits were "
                f"made, and gives {keys.shape[1]}: it is another model of that name."
            )
        return keys
