"""Queries to Inputs: the impure edge, where templates, tokenizers and pictures are.

Answers are tokenised together with what stands before them, and their ids are read from the row by
character offsets; rows are padded on the right. Pictures are preprocessed once per content (an
LRU cache in bytes) and every violation in a batch of queries is reported at once.

B rows · L tokens · T scored positions
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from errata.functional import Inputs, ModelCard, Query
from errata.functional.errors import BadInput, BadSettings, ModelUnsupported, listed

from . import sentences as _sentences  # noqa: F401  (enrols itself)
from .checks import checked, every, named, opened
from .collate import Encoded, assemble, collated
from .images import Cache, key
from .pictures import READINGS, TEXT, Parts, Reading, Seen, parts
from .templates import preset
from .text import MARK, Segment, Template, gap, scored, segments

__all__ = ["Reader", "Row", "ending", "reader", "writer"]


class Row(NamedTuple):
    """A query, read but not tokenised."""

    segments: list[Segment]  # texts, and numbers of placeholder tokens
    boundary: int  # characters of the last text that stand before the gap
    gap: int  # characters between them and the target; -1 where there is no target
    pixels: dict[str, Tensor]
    keys: tuple[str, ...]


def writer(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Detokenise, special tokens dropped."""

    def write(ids: Sequence[int]) -> str:
        return tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    return write


def ending(template: Template, tokenizer: Any) -> str:
    """What is appended to every answer: nothing, the tokenizer's end token, or a text."""
    if isinstance(template.end, str):
        return template.end
    if template.end and tokenizer.eos_token is None:
        raise BadSettings(
            "template.end must be a text for a tokenizer without an end token; got true."
        )
    return tokenizer.eos_token if template.end else ""


class Reader:
    """Reads queries for one model under one template; safe to share between threads.

    reader(queries, end=False, edit=None) -> Inputs, whatever `edit` says. Targets may be missing
    only if all are: then nothing is scored. With `end` the token that ends an answer follows each
    target and is scored with it, whatever the template says: what an editor wants that teaches a
    model to stop there.
    """

    def __init__(
        self, found: Parts, reading: Reading, template: Template, card: ModelCard, limit: int
    ):
        self.found, self.reading, self.template, self.card = found, reading, template, card
        self.cache = Cache(limit)
        tokenizer = found.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ModelUnsupported(
                "the tokenizer must give character offsets, and "
                f"{type(tokenizer).__name__} does not: load the model's fast tokenizer."
            )
        self.specials = tuple(tokenizer.get_added_vocab())
        start = tokenizer("").input_ids[:1]
        self.start = start if start == [tokenizer.bos_token_id] else []
        self.raw = template.raw or reading.raw
        if not template.raw and template.picture == "{}":
            self.template = replace(template, picture=reading.picture)
        self.end = ending(template, tokenizer)
        self.stop = self.end or tokenizer.eos_token or ""

    def __call__(
        self, queries: Sequence[Query], *, end: bool = False, edit: Tensor | None = None
    ) -> Inputs:
        queries = list(queries)
        behind = self.stop if end else self.end
        rows = every(queries, lambda _, query: self._row(query, behind))
        bare = [i for i, row in enumerate(rows) if row.gap < 0]
        if bare and len(bare) < len(rows):
            raise BadInput(
                f"every query of a scored batch must have a target; empty: "
                f"{listed(named(i, queries[i], BadInput('no target')) for i in bare)}."
            )
        encoded = self._encode(rows)
        every(queries, lambda number, _: self._fits(encoded[number], rows[number]))
        return self._inputs(rows, encoded)

    # ---- text and pictures of one query

    def _row(self, query: Query, end: str) -> Row:
        checked(query, self.card)
        seen, keys = self._see(query)
        if self.reading.place == "text":
            row = self._expanded(
                [self._chat(query)] if self._chats() else self._written(query), query, seen
            )
        elif self.reading.place == "lead":
            prompt = query.prompt
            if query.images and prompt.count(MARK) == len(query.images):
                prompt = prompt.replace(MARK, "")  # wherever it says, they come first here
            bare = Query(prompt, query.target)
            row = [*(seen.runs if seen else ()), *segments(self.template, self.raw, bare)]
        else:
            row = [
                seen.runs[part] if seen and isinstance(part, int) else part
                for part in segments(self.template, self.raw, query)
            ]
        before = row.pop() if isinstance(row[-1], str) else ""
        boundary = len(str(before))
        pixels = seen.pixels if seen else {}
        if not query.target:
            return Row([*row, before], boundary, -1, pixels, keys)
        between = gap(self.template, str(before), query.target, self.specials)
        row.append(f"{before}{between}{query.target}{end}")
        return Row(row, boundary, len(between), pixels, keys)

    def _see(self, query: Query) -> tuple[Seen | None, tuple[str, ...]]:
        if not query.images:
            return None, ()
        look = self.reading.frames if query.video else self.reading.pictures
        if look is None:
            raise BadInput(f"{self.card.id} takes no {'video' if query.video else 'images'}")
        keys, wrong = [], []
        for image in query.images:
            try:
                keys.append(key(image))
            except BadInput as error:
                wrong.append(str(error).rstrip("."))
        if wrong:
            opened(query.images, wrong)
        name = (tuple(keys), query.video)
        return self.cache.get(name, lambda: look(self.found, opened(query.images, []))), name[0]

    def _place(self, query: Query) -> str:
        place = self.reading.video if query.video else self.reading.image
        if place is None:
            raise BadInput(f"{self.card.id} takes no {'video' if query.video else 'images'}")
        return place(self.found)

    def _marked(self, query: Query) -> str:
        """The placeholder with the tokens that must stand around it, for texts we write."""
        place = self._place(query)
        before, _, after = self.reading.mark.partition("{}")
        if place.startswith(before) and place.endswith(after):  # it brings its own
            return place
        return before + place + after

    def _chats(self) -> bool:
        return self.template.chat and bool(self.found.chat)

    def _written(self, query: Query) -> list[Segment]:
        """A raw template with the placeholder written where pictures stand: one text a piece."""
        if not query.images:
            return segments(self.template, self.raw, query)
        place = self._marked(query)
        row: list[Segment] = []
        for piece in self.raw:
            found = segments(self.template, (piece,), query)
            row.append("".join(place if isinstance(part, int) else part for part in found))
        return row

    def _chat(self, query: Query) -> str:
        """The checkpoint's chat template, up to where the answer begins."""
        prompt = self.template.prompt.replace("{prompt}", query.prompt)
        if self.reading is TEXT:
            return self._render(prompt)
        kind = "video" if query.video else "image"
        ordered = segments(
            Template(chat=False), ("{images}{prompt}",), query._replace(prompt=prompt)
        )
        content = [
            {"type": kind} if isinstance(part, int) else {"type": "text", "text": part}
            for part in ordered
        ]
        text = self._render(content)
        if not query.images:
            return text
        place = self._place(query)
        count = 1 if query.video else len(query.images)
        if text.count(place) != count:  # a template that knows no pictures: write them ourselves
            marked = self._marked(query)
            text = self._render(
                "".join(marked if isinstance(part, int) else part for part in ordered)
            )
        return text

    def _render(self, content: Any) -> str:
        messages = [{"role": "user", "content": content}]
        if self.template.system:
            system = self.template.system
            if not isinstance(content, str):
                system = [{"type": "text", "text": system}]
            messages.insert(0, {"role": "system", "content": system})
        from jinja2 import TemplateError

        try:
            return self.found.tokenizer.apply_chat_template(
                messages, chat_template=self.found.chat, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise BadSettings(
                f"the checkpoint's chat template must take these messages and refuses ({error}): "
                "choose template='plain', or leave the system message out."
            ) from error

    def _expanded(self, row: list[Segment], query: Query, seen: Seen | None) -> list[Segment]:
        """Each placeholder replaced by its picture's run of tokens."""
        processor = self.found.processor
        tokens = [
            getattr(processor, f"{kind}_token")
            for kind in ("image", "video")
            if getattr(self.reading, kind)
        ]
        place = self._place(query) if seen else ""
        runs = iter(seen.runs if seen else ())
        want = len(seen.runs) if seen else 0
        have = sum(str(part).count(token) for part in (*row, query.target) for token in tokens)
        if have != want:
            raise BadInput(
                f"a row must hold one placeholder per picture, {want} in all, and has {have}: "
                f"take {', '.join(map(repr, tokens))} out of the prompt and the target"
            )
        if not seen:
            return row
        swap = re.compile(re.escape(place))
        return [swap.sub(lambda _: str(next(runs)), str(part)) for part in row]

    # ---- tokens

    def _encode(self, rows: Sequence[Row]) -> list[Encoded]:
        texts = [part for row in rows for part in row.segments if isinstance(part, str)]
        tokenizer = self.found.tokenizer
        coded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, padding=False,
            truncation=False, return_attention_mask=False, return_token_type_ids=False,
            verbose=False,
        )  # fmt: skip
        codes = iter(zip(coded["input_ids"], coded["offset_mapping"]))
        return [self._encoded(row, codes) for row in rows]

    def _encoded(self, row: Row, codes: Any) -> Encoded:
        ids: list[int] = []
        image: list[bool] = []
        start = self._start(row)
        place = self._fill()
        where = range(0)
        for index, part in enumerate(row.segments):
            if index == start:
                ids += self.start
                image += [False] * len(self.start)
            if isinstance(part, int):
                ids += [place] * part
                image += [True] * part
                continue
            tokens, offsets = next(codes)
            if index == len(row.segments) - 1 and row.gap >= 0:
                found = scored(offsets, row.boundary, row.gap)
                where = range(len(ids) + found.start, len(ids) + found.stop)
            ids += tokens
            image += [False] * len(tokens)
        if self.reading.place == "text":
            shown = self._shown()
            image = [token in shown for token in ids]
        return Encoded(ids, image, where)

    def _start(self, row: Row) -> int:
        """Before which segment the start token stands; -1 for none."""
        if not self.template.bos or not self.start:
            return -1
        first = next(i for i, part in enumerate(row.segments) if isinstance(part, str))
        bos = self.found.tokenizer.bos_token
        if bos and str(row.segments[first]).startswith(bos):
            return -1  # the template wrote it
        return first if self.reading.place == "lead" else 0

    def _fill(self) -> int:
        """The id written at picture positions of families without a placeholder token."""
        config = self.found.config
        given = getattr(config, "image_token_id", None)
        if given is None:
            given = getattr(config, "image_token_index", None)
        return 0 if given is None else given

    def _shown(self) -> dict[int, int]:
        """Placeholder id -> 1 for pictures, 2 for video."""
        processor, reading = self.found.processor, self.reading
        shown = {}
        if reading.image is not None:
            shown[processor.image_token_id] = 1
        if reading.video is not None:
            shown[processor.video_token_id] = 2
        return shown

    def _fits(self, row: Encoded, raw: Row) -> None:
        if len(row.ids) > self.card.context:
            raise BadInput(
                f"a row must have at most {self.card.context} tokens, and this has {len(row.ids)} "
                f"({sum(row.image)} of them pictures): shorten the prompt or use fewer pictures"
            )
        if max(row.ids, default=0) >= self.card.vocab:
            token = self.found.tokenizer.convert_ids_to_tokens(max(row.ids))
            raise BadInput(
                f"every token must be one of the model's {self.card.vocab}, and {token!r} is none: "
                "take it out of the text"
            )
        if not row.ids:
            raise BadInput("the prompt must hold something, and this row has no token at all")
        if raw.gap >= 0 and not row.scored:
            raise BadInput("the target must have a token of its own, and the tokenizer gives none")
        if raw.gap >= 0 and row.scored.start == 0:
            raise BadInput("the prompt must not be empty: nothing predicts the first target token")

    # ---- tensors

    def _inputs(self, rows: Sequence[Row], encoded: Sequence[Encoded]) -> Inputs:
        pad = self.found.tokenizer.pad_token_id
        if pad is None:
            pad = self.found.tokenizer.eos_token_id or 0
        keys = tuple(row.keys for row in rows)
        pixels = assemble([row.pixels for row in rows])
        inputs = collated(encoded, pad, keys, pixels)
        if self.reading.types:
            kinds = torch.zeros_like(inputs.ids)
            for token, kind in self._shown().items():
                kinds = torch.where((inputs.ids == token) & inputs.mask, kind, kinds)
            inputs = inputs._replace(pixels={**pixels, "mm_token_type_ids": kinds})
        return inputs


def reader(
    processor: Any,
    config: Any,
    card: ModelCard,
    template: str | Template = "default",
    cache: int = 256 << 20,
) -> Callable[[Sequence[Query]], Inputs]:
    """What reads queries for a model: its processor (or tokenizer) under a prompt template.

    Families of `READINGS` and text decoders are read by our own code; any other through its own
    processor (`whole.py`). `cache` bounds the preprocessed pictures that are kept, in bytes.
    Raises BadSettings for an unknown template, ModelUnsupported for a processor that can not serve.
    """
    chosen = preset(template, config.model_type)
    found = parts(processor, config)
    reading = READINGS.get(config.model_type)
    if found.processor is None or not card.images:
        return Reader(found, TEXT, chosen, card, cache)
    if reading is None:
        from .whole import Whole

        return Whole(found, chosen, card)
    if found.images is None:
        raise ModelUnsupported(
            f"a {config.model_type} must come with a processor that has an image processor; "
            f"{type(processor).__name__} has none."
        )
    return Reader(found, reading, chosen, card, cache)
