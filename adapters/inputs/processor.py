"""Queries to Inputs: the impure edge, where templates, tokenizers and images are.

Answers are tokenised together with what stands before them, and their ids are read from the row by
character offsets; rows are padded on the right. Images are preprocessed once per content (an
LRU cache in bytes) and every violation in a batch of queries is reported at once.

B rows · L tokens · T scored positions
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from errata.adapters.inputs.collation import TokenRow, collate, concat_pixels
from errata.adapters.inputs.images import content_id
from errata.adapters.inputs.lru_cache import LRUCache
from errata.adapters.inputs.prompt_format import (
    PromptSegment,
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
    reading,
    refuse_special_tokens,
    special_tokens_of,
    validate_all,
    validate_query,
    validate_tokens,
)
from errata.adapters.inputs.vision_inputs import (
    TEXT_ONLY,
    ProcessorParts,
    VisionFormat,
    VisionInputs,
)
from errata.functional import Inputs, ModelCard, Query
from errata.functional.errors import (
    InvalidInputError,
    InvalidSettingsError,
    UnsupportedModelError,
    join_messages,
)
from errata.functional.forward.spans import spanned
from errata.functional.queries import IMAGE_PLACEHOLDER

__all__ = ["PromptRow", "QueryProcessor"]


class PromptRow(NamedTuple):
    """A query, read but not tokenised."""

    segments: list[PromptSegment]  # texts, and numbers of placeholder tokens
    boundary: int  # characters of the last text that stand before the separator
    separator_length: int  # characters between them and the target; -1 where there is no target
    vision_inputs: dict[str, Tensor]
    content_ids: tuple[str, ...]


class QueryProcessor:
    """Reads queries for one model under one template; safe to share between threads.

    `preprocess(queries, append_eos=False, edit_index=None)` gives Inputs. Targets may be missing
    only if all are: then nothing is scored. With `append_eos` the token that ends an answer
    follows each target and is scored with it, whatever the template says: what an editor wants
    that teaches a model to stop there.
    """

    def __init__(
        self,
        parts: ProcessorParts,
        vision_format: VisionFormat,
        template: PromptTemplate,
        card: ModelCard,
        max_cache_bytes: int,
    ):
        self.parts, self.vision_format, self.template, self.card = (
            parts,
            vision_format,
            template,
            card,
        )
        self.image_cache = LRUCache(max_cache_bytes)
        tokenizer = parts.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                "the tokenizer must give character offsets, and "
                f"{type(tokenizer).__name__} does not: load the model's fast tokenizer."
            )
        self.special_tokens = tuple(tokenizer.get_added_vocab())
        first_ids = tokenizer("").input_ids[:1]
        self.bos_ids = first_ids if first_ids == [tokenizer.bos_token_id] else []
        self.raw_template = template.raw_template or vision_format.raw_template
        if not template.raw_template and template.image_wrapper == "{}":
            self.template = replace(template, image_wrapper=vision_format.image_wrapper)
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
        edit_index: Tensor | None = None,
    ) -> Inputs:
        queries = list(queries)
        suffix = self.eos_suffix if append_eos else self.answer_suffix
        rows = validate_all(queries, lambda _, query: self._make_prompt_row(query, suffix))
        unscored = [i for i, row in enumerate(rows) if row.separator_length < 0]
        if unscored and len(unscored) < len(rows):
            raise InvalidInputError(
                f"every query of a scored batch must have a target; empty: "
                f"{join_messages(name_query(i, queries[i], InvalidInputError('no target')) for i in unscored)}."  # noqa: E501
            )
        token_rows = self._tokenize(rows)
        validate_all(
            queries,
            lambda number, _: validate_tokens(
                token_rows[number],
                self.card,
                self.parts.tokenizer,
                has_target=rows[number].separator_length >= 0,
            ),
        )
        return self._make_inputs(rows, token_rows)

    # ---- text and images of one query

    def _make_prompt_row(self, query: Query, suffix: str) -> PromptRow:
        validate_query(query, self.card)
        if not self.template.special_targets:
            refuse_special_tokens(query.target, self.refused_in_targets)
        vision, content_ids = self._encode_vision(query)
        if self.vision_format.placement == "token":
            row = self._expand_placeholders(
                [self._fill_chat_template(query)]
                if self._uses_chat_template()
                else self._fill_raw_template(query),
                query,
                vision,
            )
        elif self.vision_format.placement == "prefix":
            prompt = query.prompt
            if query.images and prompt.count(IMAGE_PLACEHOLDER) == len(query.images):
                prompt = prompt.replace(
                    IMAGE_PLACEHOLDER, ""
                )  # wherever it says, they come first here
            text_query = Query(prompt, query.target)
            row = [
                *(vision.placeholder_runs if vision else ()),
                *split_template(self.template, self.raw_template, text_query),
            ]
        else:
            row = [
                vision.placeholder_runs[part] if vision and isinstance(part, int) else part
                for part in split_template(self.template, self.raw_template, query)
            ]
        before = row.pop() if isinstance(row[-1], str) else ""
        boundary = len(str(before))
        vision_inputs = vision.tensors if vision else {}
        if not query.target:
            return PromptRow([*row, before], boundary, -1, vision_inputs, content_ids)
        separator = answer_separator(self.template, str(before), query.target, self.special_tokens)
        row.append(f"{before}{separator}{query.target}{suffix}")
        return PromptRow(row, boundary, len(separator), vision_inputs, content_ids)

    def _encode_vision(self, query: Query) -> tuple[VisionInputs | None, tuple[str, ...]]:
        if not query.images:
            return None, ()
        encode = (
            self.vision_format.encode_video if query.video else self.vision_format.encode_images
        )
        if encode is None:
            raise InvalidInputError(
                f"{self.card.id} takes no {'video' if query.video else 'images'}"
            )
        content_ids, wrong = [], []
        for image in query.images:
            try:
                content_ids.append(content_id(image))
            except InvalidInputError as error:
                wrong.append(str(error).rstrip("."))
        if wrong:
            open_images(query.images, wrong)
        cache_key = (tuple(content_ids), query.video)

        def encode_all() -> VisionInputs:
            images = open_images(query.images, [])
            with reading(f"{describe_images(query.images)} of this query"):
                return encode(self.parts, images)

        return self.image_cache.get(cache_key, encode_all), cache_key[0]

    def _placeholder(self, query: Query) -> str:
        make_token = (
            self.vision_format.video_token if query.video else self.vision_format.image_token
        )
        if make_token is None:
            raise InvalidInputError(
                f"{self.card.id} takes no {'video' if query.video else 'images'}"
            )
        return make_token(self.parts)

    def _wrapped_placeholder(self, query: Query) -> str:
        """The placeholder with the tokens that must stand around it, for texts we write."""
        placeholder = self._placeholder(query)
        before, _, after = self.vision_format.placeholder_wrapper.partition("{}")
        if placeholder.startswith(before) and placeholder.endswith(after):  # it brings its own
            return placeholder
        return before + placeholder + after

    def _uses_chat_template(self) -> bool:
        return self.template.chat and bool(self.parts.chat_template)

    def _fill_raw_template(self, query: Query) -> list[PromptSegment]:
        """A raw template with the placeholder written where images stand: one text a piece."""
        if not query.images:
            return split_template(self.template, self.raw_template, query)
        placeholder = self._wrapped_placeholder(query)
        row: list[PromptSegment] = []
        for piece in self.raw_template:
            segments_of_piece = split_template(self.template, (piece,), query)
            row.append(
                "".join(
                    placeholder if isinstance(part, int) else part for part in segments_of_piece
                )
            )
        return row

    def _fill_chat_template(self, query: Query) -> str:
        """The checkpoint's chat template, up to where the answer begins."""
        prompt = self.template.prompt.replace("{prompt}", query.prompt)
        if self.vision_format is TEXT_ONLY:
            return self._render_chat(prompt)
        kind = "video" if query.video else "image"
        ordered = split_template(
            PromptTemplate(chat=False), ("{images}{prompt}",), query._replace(prompt=prompt)
        )
        content = [
            {"type": kind} if isinstance(part, int) else {"type": "text", "text": part}
            for part in ordered
        ]
        text = self._render_chat(content)
        if not query.images:
            return text
        placeholder = self._placeholder(query)
        count = 1 if query.video else len(query.images)
        if (
            text.count(placeholder) != count
        ):  # a template that knows no images: write them ourselves
            wrapped_placeholder = self._wrapped_placeholder(query)
            text = self._render_chat(
                "".join(wrapped_placeholder if isinstance(part, int) else part for part in ordered)
            )
        return text

    def _render_chat(self, content: Any) -> str:
        messages = [{"role": "user", "content": content}]
        if self.template.system:
            system = self.template.system
            if not isinstance(content, str):
                system = [{"type": "text", "text": system}]
            messages.insert(0, {"role": "system", "content": system})
        from jinja2 import TemplateError

        try:
            return self.parts.tokenizer.apply_chat_template(
                messages,
                chat_template=self.parts.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise InvalidSettingsError(
                f"the checkpoint's chat template must take these messages and refuses ({error}): "
                "choose template='plain', or leave the system message out."
            ) from error

    def _expand_placeholders(
        self, row: list[PromptSegment], query: Query, vision: VisionInputs | None
    ) -> list[PromptSegment]:
        """Each placeholder replaced by its image's run of tokens."""
        processor = self.parts.processor
        tokens = [
            getattr(processor, f"{kind}_token")
            for kind in ("image", "video")
            if getattr(self.vision_format, f"{kind}_token")
        ]
        placeholder = self._placeholder(query) if vision else ""
        runs = iter(vision.placeholder_runs if vision else ())
        num_expected = len(vision.placeholder_runs) if vision else 0
        num_found = sum(str(part).count(token) for part in (*row, query.target) for token in tokens)
        if num_found != num_expected:
            raise InvalidInputError(
                f"a row must hold one placeholder per image, {num_expected} in all, and has "
                f"{num_found}: "
                f"take {', '.join(map(repr, tokens))} out of the prompt and the target"
            )
        if not vision:
            return row
        pattern = re.compile(re.escape(placeholder))
        return [pattern.sub(lambda _: str(next(runs)), str(part)) for part in row]

    # ---- tokens

    def _tokenize(self, rows: Sequence[PromptRow]) -> list[TokenRow]:
        texts = [part for row in rows for part in row.segments if isinstance(part, str)]
        with reading("the text of this batch"):
            tokenized = self.parts.tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        tokens_and_offsets = iter(zip(tokenized["input_ids"], tokenized["offset_mapping"]))
        return [self._make_token_row(row, tokens_and_offsets) for row in rows]

    def _make_token_row(self, row: PromptRow, tokens_and_offsets: Any) -> TokenRow:
        input_ids: list[int] = []
        image_mask: list[bool] = []
        bos_segment = self._bos_segment(row)
        fill_id = self._image_fill_id()
        scored_positions = range(0)
        for index, part in enumerate(row.segments):
            if index == bos_segment:
                input_ids += self.bos_ids
                image_mask += [False] * len(self.bos_ids)
            if isinstance(part, int):
                input_ids += [fill_id] * part
                image_mask += [True] * part
                continue
            tokens, offsets = next(tokens_and_offsets)
            if index == len(row.segments) - 1 and row.separator_length >= 0:
                scored_range = scored_tokens(offsets, row.boundary, row.separator_length)
                scored_positions = range(
                    len(input_ids) + scored_range.start, len(input_ids) + scored_range.stop
                )
            input_ids += tokens
            image_mask += [False] * len(tokens)
        if self.vision_format.placement == "token":
            placeholder_ids = self._placeholder_ids()
            image_mask = [token in placeholder_ids for token in input_ids]
        return TokenRow(input_ids, image_mask, scored_positions)

    def _bos_segment(self, row: PromptRow) -> int:
        """Before which segment the start token stands; -1 for none."""
        if not self.template.add_bos or not self.bos_ids:
            return -1
        first = next(i for i, part in enumerate(row.segments) if isinstance(part, str))
        bos = self.parts.tokenizer.bos_token
        if bos and str(row.segments[first]).startswith(bos):
            return -1  # the template wrote it
        return first if self.vision_format.placement == "prefix" else 0

    def _image_fill_id(self) -> int:
        """The id written at image positions of families without a placeholder token."""
        config = self.parts.config
        token_id = getattr(config, "image_token_id", None)
        if token_id is None:
            token_id = getattr(config, "image_token_index", None)
        return 0 if token_id is None else token_id

    def _placeholder_ids(self) -> dict[int, int]:
        """Placeholder id -> 1 for images, 2 for video."""
        processor, vision_format = self.parts.processor, self.vision_format
        placeholder_ids = {}
        if vision_format.image_token is not None:
            placeholder_ids[processor.image_token_id] = 1
        if vision_format.video_token is not None:
            placeholder_ids[processor.video_token_id] = 2
        return placeholder_ids

    # ---- tensors

    def _make_inputs(self, rows: Sequence[PromptRow], token_rows: Sequence[TokenRow]) -> Inputs:
        pad_id = self.parts.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = self.parts.tokenizer.eos_token_id or 0
        content_ids = tuple(row.content_ids for row in rows)
        vision_inputs = concat_pixels([row.vision_inputs for row in rows])
        inputs = collate(token_rows, pad_id, content_ids, vision_inputs)
        if self.vision_format.needs_token_types:
            token_types = torch.zeros_like(inputs.input_ids)
            for token, token_type in self._placeholder_ids().items():
                token_types = torch.where(
                    (inputs.input_ids == token) & inputs.attention_mask, token_type, token_types
                )
            inputs = inputs._replace(
                vision_inputs={**vision_inputs, "mm_token_type_ids": token_types}
            )
        return inputs
