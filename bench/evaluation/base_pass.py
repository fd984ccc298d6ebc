"""One pass of the base for everyone: all editors, probes and protocols of a run share its rows.

Cases are run in pages of a few neighbours. What a page holds follows from the cases and the memory
budget alone, so rows have the same bits whichever editor asked first and wherever a run went on.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from errata.adapters import cache_vision_features
from errata.bench.evaluation.batching import make_batches
from errata.bench.evaluation.profiling import section
from errata.bench.evaluation.questions import (
    EvaluationConfig,
    _name_failing_case,
    query_key,
    questions_of,
)
from errata.functional import Case, Editor, Model
from errata.functional.errors import ErrataError
from errata.functional.forward.generation import generate
from errata.functional.forward.prefix_cache import CacheBlock, PrefixCache, QueryBatch
from errata.functional.metrics.conventions import get_probe
from errata.functional.types import Inputs

__all__ = ["SharedBasePass"]

MAX_CASES_PER_BLOCK = 16  # of a page, whatever the budget


class _DepthFound(Exception):
    """Where an editor cuts: thrown to it in place of an answer."""

    def __init__(self, depth: int, scored_only: bool) -> None:
        self.request = depth, scored_only


class _DepthRecorder:
    """A store that serves nothing and tells where it was asked for."""

    def serves(self, model: Model) -> bool:
        return not model.deltas

    def lookup(self, inputs: Inputs, depth: int, scored_only: bool) -> None:
        raise _DepthFound(depth, scored_only)


class SharedBasePass:
    """The base, with the rows of the cases that are being worked on, in `terms.budget` / 2 bytes.

    `model` is the base whose rows are looked up, `case_bytes` what those of a case take.
    """

    def __init__(
        self, model: Model, cases: Sequence[Case], evaluation_config: EvaluationConfig
    ) -> None:
        limit = evaluation_config.memory_bytes // 2
        self._cases, self._evaluation_config = cases, evaluation_config
        once = cache_vision_features(model, limit // 4)
        self._prefix_cache = PrefixCache(once, limit)
        self._generated_blocks: set[Hashable] = set()
        self._prefetched_blocks: set[int] = {0}
        self._blocks: dict[int, CacheBlock] = {}
        self._preprocess_pool = ThreadPoolExecutor(1, "errata-reader")
        self.model = once._replace(prefix_cache=self._prefix_cache)
        self.bytes_per_case = _case_num_bytes(model, cases)
        self._cases_per_block = max(1, min(MAX_CASES_PER_BLOCK, limit // (2 * self.bytes_per_case)))

    @property
    def num_bytes(self) -> int:
        """Bytes of the base's rows."""
        return self._prefix_cache.num_bytes

    def record_depth(self, editor: Editor) -> None:
        """Find out where an editor cuts, so that the first pass keeps its rows there."""
        model = self.model._replace(prefix_cache=_DepthRecorder())
        try:
            state = editor.init(model, torch.Generator().manual_seed(0))
            editor.edit_each(model, state, [self._cases[0].edit])
        except _DepthFound as found:
            self._prefix_cache.request_depth(*found.request)
        except ErrataError:
            pass  # it will say so when it edits

    def block_slices(self, numbers: Sequence[int]) -> Iterator[slice]:
        """Split case numbers into slices that lie in one block each.

        Args:
            numbers: Case numbers, in ascending runs.

        Yields:
            Slices of `numbers`.
        """
        begin = 0
        for k in range(1, len(numbers) + 1):
            if (
                k == len(numbers)
                or numbers[k] // self._cases_per_block != numbers[begin] // self._cases_per_block
            ):
                yield slice(begin, k)
                begin = k

    def load(self, numbers: Collection[int]) -> None:
        """Have the base's rows of these cases ready, and what it says to them when left to talk."""
        blocks = sorted({number // self._cases_per_block for number in numbers})
        cases = [case for number in blocks for case in self._cases_of(number)]
        with _name_failing_case(self.model, cases):
            pages = [self._block(number) for number in blocks]
            with section("base, for all editors"):
                self._prefix_cache.load(pages)
        if pages:
            self._prefetch_images(pages[-1].number + 1)
        for page in pages:
            if self._evaluation_config.max_new_tokens and page.number not in self._generated_blocks:
                self._generated_blocks.add(page.number)
                self._generate_base_texts(page)

    def _prefetch_images(self, number: int) -> None:
        """Have the next page's images read by another thread; the reader keeps them."""
        if number in self._prefetched_blocks or not self._cases_of(number):
            return
        self._prefetched_blocks.add(number)
        for batch in self._block(number).batches:
            if any(query.images for query in batch.queries):
                self._preprocess_pool.submit(self.model.preprocess, batch.queries)

    def _generate_base_texts(self, block: CacheBlock) -> None:
        wanted = {
            query_key(query)
            for case in self._cases_of(block.number)
            for name, _, query in questions_of(case)
            if self._evaluation_config.generate_probes == "all" or get_probe(name).kind == "success"
        }
        for batch in block.batches:
            asked = [query for query in batch.queries if query_key(query) in wanted]
            if asked:
                with section("generation"):
                    texts = generate(self.model, asked, self._evaluation_config.max_new_tokens)
                self._prefix_cache.generations.update(zip(map(query_key, asked), texts))

    def _cases_of(self, block_number: int) -> Sequence[Case]:
        return self._cases[
            block_number * self._cases_per_block : (block_number + 1) * self._cases_per_block
        ]

    def _block(self, number: int) -> CacheBlock:
        if number not in self._blocks:
            self._blocks[number] = self._make_block(number)
        return self._blocks[number]

    def _make_block(self, number: int) -> CacheBlock:
        cases = self._cases_of(number)
        edits = {query_key(case.edit): case.edit for case in cases}
        asked = {query_key(query): query for case in cases for _, _, query in questions_of(case)}
        rest = [query for key, query in asked.items() if key not in edits]
        parts = []
        for ended, queries in ((True, list(edits.values())), (False, rest)):
            for chosen in make_batches(self.model, queries, self._evaluation_config.memory_bytes):
                parts.append(QueryBatch(tuple(queries[k] for k in chosen), ended))
        return CacheBlock(number, tuple(parts))


def _case_num_bytes(model: Model, cases: Sequence[Case]) -> int:
    """What the rows of a case take: at two depths, with masks, and the logits of the answers."""
    longest = max(cases, key=lambda case: len(case.edit.prompt) + len(case.edit.target))
    inputs = model.preprocess([longest.edit])
    tokens, scored = inputs.input_ids.shape[1], inputs.labels.shape[1]
    row = 8 * tokens * model.card.hidden_size + 4 * scored * model.card.vocab_size + 2 * tokens**2
    return len(questions_of(longest)) * row
