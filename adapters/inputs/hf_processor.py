"""Reading through a model's own processor: the way for families without a line in `FAMILIES`.

The processor gets the whole batch, text with the answer appended and images, and is asked for
character offsets and padding on the right. Its other outputs are handed to the
model by the same names. What the offsets say is checked: the labels must spell the answers.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from errata.adapters.inputs.images import content_id
from errata.adapters.inputs.prompt_format import (
    PromptTemplate,
    answer_separator,
    answer_suffix,
    end_of_turn,
    scored_tokens,
    split_template,
)
from errata.adapters.inputs.validation import (
    describe_images,
    name_query,
    open_images,
    refuse_special_tokens,
    special_tokens_of,
    validate_all,
    validate_query,
)
from errata.adapters.inputs.vision_inputs import ProcessorParts
from errata.functional import IGNORE_INDEX, Inputs, ModelCard, Query
from errata.functional.errors import InvalidInputError, UnsupportedModelError, join_messages
from errata.functional.forward.spans import spanned

__all__ = ["HFQueryProcessor"]


class HFQueryProcessor:
    """Reads queries for one model through its processor."""

    def __init__(self, parts: ProcessorParts, template: PromptTemplate, card: ModelCard):
        self.parts, self.template, self.card = parts, template, card
        tokenizer = parts.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                "the tokenizer must give character offsets, and "
                f"{type(tokenizer).__name__} does not: load the model's fast tokenizer."
            )
        self.lock = threading.Lock()
        self.special_tokens = tuple(tokenizer.get_added_vocab())
        self.refused_in_targets = special_tokens_of(tokenizer)
        self.answer_suffix = answer_suffix(template, tokenizer)
        self.eos_suffix = self.answer_suffix or end_of_turn(
            template, tokenizer, parts.chat_template
        )

    @spanned("reading")
    def __call__(
        self,
        queries: Sequence[Query],
        *,
        append_eos: bool = False,
        edit_index: torch.Tensor | None = None,
    ) -> Inputs:
        queries = list(queries)
        suffix = self.eos_suffix if append_eos else self.answer_suffix
        opened_images = validate_all(queries, lambda _, query: self._open_images(query))
        texts = [self._format_prompt(query) for query in queries]
        separators = [
            answer_separator(self.template, text, query.target, self.special_tokens)
            if query.target
            else ""
            for text, query in zip(texts, queries)
        ]
        answers = [
            between + query.target + suffix if query.target else ""
            for between, query in zip(separators, queries)
        ]
        if any(answers) and not all(answers):
            raise InvalidInputError(
                "every query of a scored batch must have a target; some are empty."
            )
        vision_inputs = self._run_processor(
            [a + b for a, b in zip(texts, answers)], queries, opened_images
        )
        input_ids, attention_mask = (
            vision_inputs.pop("input_ids"),
            vision_inputs.pop("attention_mask").bool(),
        )
        offsets = vision_inputs.pop("offset_mapping")
        if offsets.shape[:2] != input_ids.shape:
            raise UnsupportedModelError(
                f"{type(self.parts.processor).__name__} must give the offsets of every token it "
                f"gives; got {tuple(offsets.shape)} for {tuple(input_ids.shape)}."
            )
        validate_all(queries, lambda row, _: self._validate_length(int(attention_mask[row].sum())))
        labels, logit_positions = self._make_labels(
            input_ids, attention_mask, offsets, separators, answers, queries
        )
        content_ids = tuple(tuple(map(content_id, query.images)) for query in queries)
        return Inputs(
            input_ids,
            attention_mask,
            self._image_mask(input_ids, attention_mask),
            labels,
            logit_positions,
            vision_inputs,
            content_ids,
        )

    def _open_images(self, query: Query) -> list[Any]:
        validate_query(query, self.card)
        if not self.template.special_targets:
            refuse_special_tokens(query.target, self.refused_in_targets)
        return open_images(query.images, [])

    def _validate_length(self, length: int) -> None:
        if length > self.card.max_positions:
            raise InvalidInputError(
                f"a row must have at most {self.card.max_positions} tokens, and this has {length}: "
                "shorten the prompt or use fewer images"
            )

    # ---- text

    def _placeholder(self, video: bool) -> str:
        kind = "video" if video else "image"
        token = getattr(self.parts.processor, f"{kind}_token", None)
        token = token or getattr(self.parts.tokenizer, f"{kind}_token", None)
        if token is None:
            number = self._placeholder_ids().get(kind)
            token = self.parts.tokenizer.convert_ids_to_tokens(number) if number else None
        if token is None:
            raise UnsupportedModelError(
                f"{type(self.parts.processor).__name__} must name its {kind} token, and does not."
            )
        return getattr(token, "content", token)

    def _placeholder_ids(self) -> dict[str, int]:
        config, ids_by_kind = self.parts.config, {}
        for kind in ("image", "video"):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                number = getattr(config, name, None)
                if number is not None:
                    ids_by_kind[kind] = number
                    break
        return ids_by_kind

    def _format_prompt(self, query: Query) -> str:
        template = self.template
        if not (template.chat and self.parts.chat_template):
            raw_template = template.raw_template or ("{images}{prompt}",)
            placeholder = self._placeholder(query.video) if query.images else ""
            row = split_template(template, raw_template, query)
            return "".join(placeholder if isinstance(part, int) else part for part in row)
        prompt = template.prompt.replace("{prompt}", query.prompt)
        row = split_template(
            PromptTemplate(chat=False), ("{images}{prompt}",), query._replace(prompt=prompt)
        )
        kind = "video" if query.video else "image"
        content = [
            {"type": kind} if isinstance(part, int) else {"type": "text", "text": part}
            for part in row
        ]
        messages = [{"role": "user", "content": content}]
        if template.system:
            words = [{"type": "text", "text": template.system}]
            messages.insert(0, {"role": "system", "content": words})
        return self.parts.tokenizer.apply_chat_template(
            messages,
            chat_template=self.parts.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )

    # ---- tensors

    def _run_processor(
        self, texts: list[str], queries: Sequence[Query], opened_images: Sequence[list[Any]]
    ) -> dict[str, Tensor]:
        vision_arguments: dict[str, Any] = {}
        image_rows = [
            [] if query.video else images for query, images in zip(queries, opened_images)
        ]
        if any(image_rows):
            vision_arguments["images"] = image_rows
        videos = [images for query, images in zip(queries, opened_images) if query.video]
        if videos:
            vision_arguments["videos"] = videos
        bos = self.parts.tokenizer.bos_token
        starts = not (bos and all(text.startswith(bos) for text in texts))
        try:
            with self.lock:  # a tokenizer's padding is state of its own
                out = self.parts.processor(
                    text=texts,
                    padding=True,
                    padding_side="right",
                    return_tensors="pt",
                    return_offsets_mapping=True,
                    add_special_tokens=starts and self.template.add_bos,
                    **vision_arguments,
                )
        except Exception as error:  # a processor has many ways to say no
            self._name_refused_query(texts, queries, opened_images, error)
            reason = " ".join(str(error).split())[:300]
            raise InvalidInputError(
                f"{type(self.parts.processor).__name__} must take this batch and refuses: "
                f"{type(error).__name__}: {reason}. "
                "If some rows have images and some none, read them apart."
            ) from error
        missing = {"input_ids", "attention_mask", "offset_mapping"} - set(out)
        if missing:
            raise UnsupportedModelError(
                f"{type(self.parts.processor).__name__} must give {', '.join(sorted(missing))}."
            )
        return {name: value for name, value in out.items() if isinstance(value, Tensor)}

    def _name_refused_query(
        self,
        texts: list[str],
        queries: Sequence[Query],
        opened_images: Sequence[list[Any]],
        error: Exception,
    ) -> None:
        """Raise for the queries that the processor refuses alone, if there are such."""
        if len(queries) == 1:
            names = describe_images(queries[0].images) or "the text"
            reason = " ".join(str(error).split())[:300]
            short = InvalidInputError(
                f"{names} of this query cannot be read ({type(error).__name__}: {reason})"
            )
            raise InvalidInputError(f"{name_query(0, queries[0], short)}.") from error
        wrong = []
        for number, query in enumerate(queries):
            one = slice(number, number + 1)
            try:
                self._run_processor(texts[one], queries[one], opened_images[one])
            except InvalidInputError as own:
                message = str(own).partition(": ")[2].rstrip(".")
                wrong.append(name_query(number, query, InvalidInputError(message)))
        if wrong:
            raise InvalidInputError(f"{join_messages(wrong)}.") from error

    def _image_mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image_mask = torch.zeros_like(attention_mask)
        for number in self._placeholder_ids().values():
            image_mask |= input_ids == number
        return image_mask & attention_mask

    def _make_labels(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        offsets: Tensor,
        separators: Sequence[str],
        answers: Sequence[str],
        queries: Sequence[Query],
    ) -> tuple[Tensor, Tensor]:
        scored_ranges = []
        for row, answer in enumerate(answers):
            spans = [tuple(span) for span in offsets[row][attention_mask[row]].tolist()]
            end = max((stop for _, stop in spans), default=0)
            first = int(attention_mask[row].int().argmax())
            scored_range = (
                scored_tokens(spans, end - len(answer), len(separators[row]))
                if answer
                else range(0)
            )
            scored_ranges.append(range(first + scored_range.start, first + scored_range.stop))
        self._verify_labels(input_ids, scored_ranges, queries)
        labels = torch.full(
            (len(answers), max(map(len, scored_ranges))),
            IGNORE_INDEX,
            dtype=torch.int64,
            device="cpu",
        )
        logit_positions = torch.zeros_like(labels)
        for row, scored_range in enumerate(scored_ranges):
            index = torch.arange(
                scored_range.start, scored_range.stop, dtype=torch.int64, device="cpu"
            )
            labels[row, : len(index)] = input_ids[row, index]
            logit_positions[row, : len(index)] = index - 1
        return labels, logit_positions

    def _verify_labels(
        self, input_ids: Tensor, scored_ranges: Sequence[range], queries: Sequence[Query]
    ) -> None:
        wrong = []
        for row, query in enumerate(queries):
            tokens = input_ids[row, scored_ranges[row].start : scored_ranges[row].stop].tolist()
            decoded = self.parts.tokenizer.decode(tokens, skip_special_tokens=True)
            if query.target.strip() not in decoded or (
                query.target and scored_ranges[row].start == 0
            ):
                wrong.append(f"query {row + 1}: {decoded!r} for {query.target!r}")
        if wrong:
            raise UnsupportedModelError(
                f"the labels must spell the answers, and {type(self.parts.processor).__name__} "
                f"changes the text after them: {join_messages(wrong)}."
            )
