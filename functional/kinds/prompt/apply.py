"""A `prompt` entry bound to a model: facts retrieved for each question and prepended as text.

    similarity of questions  t_n = <key of the question, question_keys_n>
    of images                p_n = <key of its images, image_keys_n>, where fact n has an image
    n matches                t_n >= min_similarity, and p_n >= min_image_similarity with an image
    best n                   largest mean of (t_n - min) / (1 - min) and the same of p_n; of equal
                             ones the latest, so that a repeated edit overrides the earlier one

The best matching facts are put before the question, the best one next to it, and before them the
k demonstrations nearest to fact and question. A question that matches nothing is read unchanged.
Only the prompt is used, never the target: retrieval does not depend on the answer.

After IKE: Zheng et al. 2023, https://arxiv.org/abs/2305.12740; EasyEdit's `models/ike`. Legend:
B questions · N facts · E edits · D demonstrations · d, v widths of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from errata.functional.errors import InvalidInputError
from errata.functional.header import Header
from errata.functional.kinds.common.patch import Patch
from errata.functional.kinds.prompt.entry import Prompt
from errata.functional.kinds.prompt.memory import FactMemory, _Segment
from errata.functional.queries import Query
from errata.functional.types import Inputs, Model

__all__ = ["RetrievalPreprocess", "apply_prompt", "expand_prompts", "without_memories"]


def apply_prompt(
    model: Model, header: Header, entry: Prompt, tensors: Mapping[str, Tensor]
) -> Patch:
    """Build the patch of a memory of facts: matching facts are prepended to each question.

    Keys are computed by the model without this delta and without prepended facts.

    Args:
        model: Model to bind to.
        header: Header of the delta.
        entry: Entry of the delta.
        tensors: Tensors of the delta.

    Returns:
        A patch of the preprocessing.
    """
    by_part = {name.removeprefix(f"{entry.name}."): t for name, t in tensors.items()}
    memory = FactMemory(without_memories(model), entry, by_part, bool(header.stack))

    def wrap(bound: Model) -> Model:
        return bound._replace(
            preprocess=RetrievalPreprocess(memory, bound.preprocess, model.card.max_positions)
        )

    return Patch(wrap=wrap)


def expand_prompts(
    model: Model, queries: Sequence[Query], edit_index: Tensor | None = None
) -> list[Query]:
    """The questions as `model` reads them, with the facts its memories prepend.

    Args:
        model: Model, with or without memories of facts.
        queries: Questions.
        edit_index: The edit of a stacked delta each question runs under, [B].

    Returns:
        The expanded questions.
    """
    preprocess = model.preprocess
    return (
        preprocess.expand_prompts(queries, edit_index)
        if isinstance(preprocess, RetrievalPreprocess)
        else list(queries)
    )


def without_memories(model: Model) -> Model:
    """Remove the memories of facts from a model, so that keys depend on the question alone.

    Args:
        model: Model, with or without memories of facts.

    Returns:
        The model without them.
    """
    while isinstance(model.preprocess, RetrievalPreprocess):
        model = model._replace(preprocess=model.preprocess.base_preprocess)
    return model


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
        """Expand questions with the facts of this memory and of those bound before it.

        Args:
            queries: Questions.
            edit_index: The edit of a stacked delta each question runs under, [B].

        Returns:
            The expanded questions.
        """
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
        """Tokens of the longest prompt; None where one cannot be read."""
        try:
            inputs = self.base_preprocess([query._replace(target="") for query in queries])
        except InvalidInputError:
            return None
        return inputs.input_ids.shape[1]
