"""Reading through a model's own processor: the way for families without a line in `READINGS`.

The processor gets the whole batch, text with the answer appended and pictures, and is asked for
character offsets and padding on the right. Whatever it answers beside ids and mask is handed to the
model by the same names. What the offsets say is checked: the labels must spell the answers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.functional import IGNORE, Inputs, ModelCard, Query
from errata.functional.errors import BadInput, ModelUnsupported, listed

from .checks import checked, every
from .images import key, picture
from .pictures import Parts
from .read import ending
from .text import Template, gap, scored, segments

__all__ = ["Whole"]


class Whole:
    """Reads queries for one model through its processor."""

    def __init__(self, found: Parts, template: Template, card: ModelCard):
        self.found, self.template, self.card = found, template, card
        tokenizer = found.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise ModelUnsupported(
                "the tokenizer must give character offsets, and "
                f"{type(tokenizer).__name__} does not: load the model's fast tokenizer."
            )
        self.lock = threading.Lock()
        self.specials = tuple(tokenizer.get_added_vocab())
        self.end = ending(template, tokenizer)
        self.stop = self.end or tokenizer.eos_token or ""

    def __call__(
        self, queries: Sequence[Query], *, end: bool = False, edit: torch.Tensor | None = None
    ) -> Inputs:
        queries = list(queries)
        behind = self.stop if end else self.end
        seen = every(queries, lambda _, query: self._see(query))
        texts = [self._text(query) for query in queries]
        gaps = [
            gap(self.template, text, query.target, self.specials) if query.target else ""
            for text, query in zip(texts, queries)
        ]
        tails = [
            between + query.target + behind if query.target else ""
            for between, query in zip(gaps, queries)
        ]
        if any(tails) and not all(tails):
            raise BadInput("every query of a scored batch must have a target; some are empty.")
        out = self._processed([a + b for a, b in zip(texts, tails)], queries, seen)
        ids, mask = out.pop("input_ids"), out.pop("attention_mask").bool()
        offsets = out.pop("offset_mapping")
        if offsets.shape[:2] != ids.shape:
            raise ModelUnsupported(
                f"{type(self.found.processor).__name__} must give the offsets of every token it "
                f"gives; got {tuple(offsets.shape)} for {tuple(ids.shape)}."
            )
        every(queries, lambda row, _: self._fits(int(mask[row].sum())))
        labels, at = self._labels(ids, mask, offsets, gaps, tails, queries)
        keys = tuple(tuple(map(key, query.images)) for query in queries)
        return Inputs(ids, mask, self._image(ids, mask), labels, at, out, keys)

    def _see(self, query: Query) -> list[Any]:
        checked(query, self.card)
        return [picture(image) for image in query.images]

    def _fits(self, length: int) -> None:
        if length > self.card.context:
            raise BadInput(
                f"a row must have at most {self.card.context} tokens, and this has {length}: "
                "shorten the prompt or use fewer pictures"
            )

    # ---- text

    def _place(self, video: bool) -> str:
        kind = "video" if video else "image"
        token = getattr(self.found.processor, f"{kind}_token", None)
        token = token or getattr(self.found.tokenizer, f"{kind}_token", None)
        if token is None:
            number = self._ids().get(kind)
            token = self.found.tokenizer.convert_ids_to_tokens(number) if number else None
        if token is None:
            raise ModelUnsupported(
                f"{type(self.found.processor).__name__} must name its {kind} token, and does not."
            )
        return getattr(token, "content", token)

    def _ids(self) -> dict[str, int]:
        config, found = self.found.config, {}
        for kind in ("image", "video"):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                number = getattr(config, name, None)
                if number is not None:
                    found[kind] = number
                    break
        return found

    def _text(self, query: Query) -> str:
        template = self.template
        if not (template.chat and self.found.chat):
            raw = template.raw or ("{images}{prompt}",)
            place = self._place(query.video) if query.images else ""
            row = segments(template, raw, query)
            return "".join(place if isinstance(part, int) else part for part in row)
        prompt = template.prompt.replace("{prompt}", query.prompt)
        row = segments(Template(chat=False), ("{images}{prompt}",), query._replace(prompt=prompt))
        kind = "video" if query.video else "image"
        content = [
            {"type": kind} if isinstance(part, int) else {"type": "text", "text": part}
            for part in row
        ]
        messages = [{"role": "user", "content": content}]
        if template.system:
            words = [{"type": "text", "text": template.system}]
            messages.insert(0, {"role": "system", "content": words})
        return self.found.tokenizer.apply_chat_template(
            messages, chat_template=self.found.chat, tokenize=False, add_generation_prompt=True
        )

    # ---- tensors

    def _processed(
        self, texts: list[str], queries: Sequence[Query], seen: Sequence[list[Any]]
    ) -> dict[str, Tensor]:
        given: dict[str, Any] = {}
        pictures = [[] if query.video else images for query, images in zip(queries, seen)]
        if any(pictures):
            given["images"] = pictures
        videos = [images for query, images in zip(queries, seen) if query.video]
        if videos:
            given["videos"] = videos
        bos = self.found.tokenizer.bos_token
        starts = not (bos and all(text.startswith(bos) for text in texts))
        try:
            with self.lock:  # a tokenizer's padding is state of its own
                out = self.found.processor(
                    text=texts, padding=True, padding_side="right", return_tensors="pt",
                    return_offsets_mapping=True, add_special_tokens=starts and self.template.bos,
                    **given,
                )  # fmt: skip
        except (ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            raise BadInput(
                f"{type(self.found.processor).__name__} must take this batch and refuses: {error}. "
                "If some rows have pictures and some none, read them apart."
            ) from error
        lacking = {"input_ids", "attention_mask", "offset_mapping"} - set(out)
        if lacking:
            raise ModelUnsupported(
                f"{type(self.found.processor).__name__} must give {', '.join(sorted(lacking))}."
            )
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def _image(self, ids: Tensor, mask: Tensor) -> Tensor:
        image = torch.zeros_like(mask)
        for number in self._ids().values():
            image |= ids == number
        return image & mask

    def _labels(
        self,
        ids: Tensor,
        mask: Tensor,
        offsets: Tensor,
        gaps: Sequence[str],
        tails: Sequence[str],
        queries: Sequence[Query],
    ) -> tuple[Tensor, Tensor]:
        found = []
        for row, tail in enumerate(tails):
            spans = [tuple(span) for span in offsets[row][mask[row]].tolist()]
            end = max((stop for _, stop in spans), default=0)
            first = int(mask[row].int().argmax())
            where = scored(spans, end - len(tail), len(gaps[row])) if tail else range(0)
            found.append(range(first + where.start, first + where.stop))
        self._spell(ids, found, queries)
        labels = torch.full((len(tails), max(map(len, found))), IGNORE, dtype=torch.int64)
        at = torch.zeros_like(labels)
        for row, where in enumerate(found):
            index = torch.arange(where.start, where.stop)
            labels[row, : len(index)] = ids[row, index]
            at[row, : len(index)] = index - 1
        return labels, at

    def _spell(self, ids: Tensor, found: Sequence[range], queries: Sequence[Query]) -> None:
        wrong = []
        for row, query in enumerate(queries):
            tokens = ids[row, found[row].start : found[row].stop].tolist()
            said = self.found.tokenizer.decode(tokens, skip_special_tokens=True)
            if query.target.strip() not in said or (query.target and found[row].start == 0):
                wrong.append(f"query {row + 1}: {said!r} for {query.target!r}")
        if wrong:
            raise ModelUnsupported(
                f"the labels must spell the answers, and {type(self.found.processor).__name__} "
                f"changes the text behind them: {listed(wrong)}."
            )
