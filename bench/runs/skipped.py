"""Cases that a model cannot read: found before the first edit, left out, and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import msgspec

from errata.bench.evaluation.questions import find_unreadable
from errata.bench.protocols.settings import SingleSettings
from errata.bench.runs.identity import unit_states
from errata.bench.storage.run_folder import RunFolder
from errata.bench.storage.skips import SKIPPED, SkipRecord, decode_skips
from errata.functional import Case, Model

__all__ = ["SkippedCases"]


class SkippedCases:
    """The cases that a model cannot read, remembered in the run folder.

    Args:
        folder: The run folder.
        model: Label of the model.
        parts: What a leg of the model depends on.
        cases: All cases.

    Attributes:
        known: Whether they were found in an earlier start, of the same model and cases.
    """

    def __init__(
        self, folder: RunFolder, model: str, parts: Mapping[str, str], cases: Sequence[Case]
    ) -> None:
        of_model = {name: value for name, value in parts.items() if name.endswith("the model")}
        states = [[u.key, u.images] for u in unit_states(SingleSettings(), cases)]
        text = msgspec.json.encode([of_model, states], order="sorted")
        self._folder, self._model = folder, model
        self._key = hashlib.sha256(text).hexdigest()
        self._records = decode_skips(folder.read(SKIPPED))
        record = self._records.get(model)
        self.known = record is not None and record.key == self._key

    def find(self, model: Model, cases: Sequence[Case], note: Callable[[str], None]) -> None:
        """Read every query of every case once.

        Args:
            model: The model.
            cases: All cases.
            note: Called with one line, if there are any.
        """
        faults = find_unreadable(model, cases)
        self._records[self._model] = SkipRecord(self._key, faults)
        self._folder.write(SKIPPED, msgspec.json.format(msgspec.json.encode(self._records)) + b"\n")
        self.known = True
        if faults:
            first = next(iter(faults.values()))
            note(f"{self._model}: {len(faults)} case(s) are skipped, e.g. {first}")

    def without(self, cases: Sequence[Case]) -> list[Case]:
        """The cases that the model can read.

        Args:
            cases: All cases.

        Returns:
            Those that are left.
        """
        faults = self._records[self._model].faults
        return [case for case in cases if case.id not in faults]
