"""One pass of the base for everyone: all editors, probes and protocols of a run share its rows.

Cases are run in pages of a few neighbours. What a page holds follows from the cases and the memory
budget alone, so rows have the same bits whichever editor asked first and wherever a run went on.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from errata.adapters import seeing_once
from errata.functional import Case, Editor, Model
from errata.functional.errors import ErrataError
from errata.functional.generate import generate
from errata.functional.known import Known, Page, Part
from errata.functional.metrics import probe
from errata.functional.types import Inputs

from .clock import part
from .probes import Terms, batches, key_of
from .sources import queries_of

__all__ = ["Shared"]

MOST_CASES = 16  # of a page, whatever the budget


class _Found(Exception):
    """Where an editor cuts: thrown to it in place of an answer."""

    def __init__(self, depth: int, thinned: bool) -> None:
        self.place = depth, thinned


class _Spy:
    """A store that serves nothing and tells where it was asked for."""

    def serves(self, model: Model) -> bool:
        return not model.deltas

    def cut(self, inputs: Inputs, depth: int, thinned: bool) -> None:
        raise _Found(depth, thinned)


class Shared:
    """The base, with the rows of the cases that are being worked on, in `terms.budget` / 2 bytes.

    `model` is the base whose rows are looked up, `case_bytes` what those of a case take.
    """

    def __init__(self, model: Model, cases: Sequence[Case], terms: Terms) -> None:
        limit = terms.budget // 2
        self._cases, self._terms = cases, terms
        once = seeing_once(model, limit // 4)
        self._known = Known(once, limit)
        self._heard: set[Hashable] = set()
        self._ahead: set[int] = {0}
        self._pages: dict[int, Page] = {}
        self._readers = ThreadPoolExecutor(1, "errata-reader")
        self.model = once._replace(known=self._known)
        self.case_bytes = _case_bytes(model, cases)
        self._size = max(1, min(MOST_CASES, limit // (2 * self.case_bytes)))

    @property
    def held(self) -> int:
        """Bytes of the base's rows."""
        return self._known.held

    def expect(self, editor: Editor) -> None:
        """Find out where an editor cuts, so that the first pass keeps its rows there."""
        model = self.model._replace(known=_Spy())
        try:
            state = editor.init(model, torch.Generator().manual_seed(0))
            editor.each(model, state, [self._cases[0].edit])
        except _Found as found:
            self._known.expect(*found.place)
        except ErrataError:
            pass  # it will say so when it edits

    def slices(self, numbers: Sequence[int]) -> Iterator[slice]:
        """Stretches of these case numbers (ascending runs) that lie on one page each."""
        begin = 0
        for k in range(1, len(numbers) + 1):
            if k == len(numbers) or numbers[k] // self._size != numbers[begin] // self._size:
                yield slice(begin, k)
                begin = k

    def open(self, numbers: Collection[int]) -> None:
        """Have the base's rows of these cases ready, and what it says to them when left to talk."""
        pages = [self._page(page) for page in sorted({n // self._size for n in numbers})]
        with part("base, for all editors"):
            self._known.open(pages)
        if pages:
            self._look_ahead(pages[-1].name + 1)
        for page in pages:
            if self._terms.generate and page.name not in self._heard:
                self._heard.add(page.name)
                self._listen(page)

    def _look_ahead(self, number: int) -> None:
        """Have the next page's pictures read by another thread; the reader keeps them."""
        if number in self._ahead or not self._on(number):
            return
        self._ahead.add(number)
        for batch in self._page(number).parts:
            if any(query.images for query in batch.queries):
                self._readers.submit(self.model.read, batch.queries)

    def _listen(self, page: Page) -> None:
        wanted = {
            key_of(query)
            for case in self._on(page.name)
            for name, _, query in queries_of(case)
            if self._terms.generate_for == "every" or probe(name).kind == "success"
        }
        for batch in page.parts:
            asked = [query for query in batch.queries if key_of(query) in wanted]
            if asked:
                with part("generation"):
                    texts = generate(self.model, asked, self._terms.generate)
                self._known.texts.update(zip(map(key_of, asked), texts))

    def _on(self, page: int) -> Sequence[Case]:
        return self._cases[page * self._size : (page + 1) * self._size]

    def _page(self, number: int) -> Page:
        if number not in self._pages:
            self._pages[number] = self._made(number)
        return self._pages[number]

    def _made(self, number: int) -> Page:
        cases = self._on(number)
        edits = {key_of(case.edit): case.edit for case in cases}
        asked = {key_of(query): query for case in cases for _, _, query in queries_of(case)}
        rest = [query for key, query in asked.items() if key not in edits]
        parts = []
        for ended, queries in ((True, list(edits.values())), (False, rest)):
            for chosen in batches(self.model, queries, self._terms.budget):
                parts.append(Part(tuple(queries[k] for k in chosen), ended))
        return Page(number, tuple(parts))


def _case_bytes(model: Model, cases: Sequence[Case]) -> int:
    """What the rows of a case take: at two depths, with masks, and the logits of the answers."""
    longest = max(cases, key=lambda case: len(case.edit.prompt) + len(case.edit.target))
    inputs = model.read([longest.edit])
    tokens, scored = inputs.ids.shape[1], inputs.labels.shape[1]
    row = 8 * tokens * model.card.width + 4 * scored * model.card.vocab + 2 * tokens**2
    return len(queries_of(longest)) * row
