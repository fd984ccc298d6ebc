"""Lessons: what an editor is trained on, from prefixes computed once and kept.

A case's questions are read and run up to the lowest edited layer by the base, the case alone; what
the base says to its localities is kept with them. Legend: E cases · B rows · T positions · V words.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from errata.editors.common import checkpoint
from errata.functional import Batch, Case, Model, Query
from errata.functional.errors import InvalidInputError, UnknownSiteError
from errata.functional.forward import batches as rows
from errata.functional.forward import prefix

__all__ = ["PrefixDataset", "TrainingBatch"]


class TrainingBatch(NamedTuple):
    """Cases to be edited side by side, and what to ask each edited model."""

    queries: tuple[Query, ...]
    edits: Batch  # [E ...] one row per case
    questions: Batch  # [B ...] each under the edit it names; localities last
    probe_index: Tensor  # [B] which of `weights` a row is about
    base_logits: Tensor  # [B' T V] what the base says to the localities
    loss_weights: Mapping[str, float]
    seed: int = 0  # of what a course draws; 0 where it validates


class CaseRows(NamedTuple):
    """All questions of one case at the cut: the edit's first, then each probe's in order."""

    batch: Batch
    base_logits: Tensor  # [n T V], of the localities


class PrefixDataset:
    """Every case's questions at the cut, computed once; the last used stay in memory."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[str],
        config: Any,
        append_eos: bool,
        checkpoint_dir: str | Path | None,
        edit_depth: prefix.EditDepth | None = None,
    ) -> None:
        self._model, self._config, self._append_eos = model, config, append_eos
        self._edit_depth = edit_depth or prefix.edit_depth(
            model.card, [f"{site}.weight" for site in sites]
        )
        if self._edit_depth.before_decoder:
            raise UnknownSiteError(
                "training needs sites in decoder layers, and some lie below them."
            )
        names = [name for name in config.loss_weights if name.endswith("locality")]
        self._probe_names = [n for n in config.loss_weights if n not in names] + names
        self._locality_names = set(names)
        self._cached_rows: OrderedDict[str, CaseRows] = OrderedDict()
        self._num_cached_bytes = 0
        self._disk_folder = (
            Path(checkpoint_dir) / "prefixes"
            if checkpoint_dir and config.prefix_disk_bytes
            else None
        )
        self._num_written_bytes = 0
        if self._disk_folder:
            self._disk_folder.mkdir(parents=True, exist_ok=True)
            self._num_written_bytes = sum(
                file.stat().st_size for file in self._disk_folder.glob("*.safetensors")
            )

    def batch(self, cases: Sequence[Case], generator: torch.Generator | None) -> TrainingBatch:
        """Build the training batch of some cases from their cached prefixes.

        Args:
            cases: Cases of the batch.
            generator: Chooses among a probe's questions. None: the first ones.

        Returns:
            Edits, questions and what the loss needs.
        """
        cached_rows = [self._get_case_rows(case) for case in cases]
        edits, probe_batches, probe_indices, base_logits = (
            [],
            {name: [] for name in self._probe_names},
            [],
            [],
        )
        for number, (case, case_rows) in enumerate(zip(cases, cached_rows)):
            edits.append(rows.take_rows(case_rows.batch, slice(0, 1)))
            row_offset = 1
            locality_offset = 0
            for name in self._probe_names:
                count = 1 if name == "edit" else len(case.probes[name])
                num_questions = min(self._config.questions_per_probe, count)
                order = (
                    range(count)
                    if generator is None
                    else torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
                )
                chosen = torch.tensor(
                    [int(k) for k in order][:num_questions], dtype=torch.int64, device="cpu"
                )
                question_rows = rows.take_rows(
                    case_rows.batch, chosen if name == "edit" else chosen + row_offset
                )
                question_rows = question_rows._replace(
                    edit_index=torch.full_like(question_rows.edit_index, number)
                )
                locality_logits = (
                    case_rows.base_logits[locality_offset + chosen]
                    if name in self._locality_names
                    else None
                )
                probe_batches[name].append((question_rows, locality_logits))
                row_offset += 0 if name == "edit" else count
                locality_offset += count if name in self._locality_names else 0
        batches = []
        for number, name in enumerate(self._probe_names):
            for question_rows, locality_logits in probe_batches[name]:
                batches.append(question_rows)
                probe_indices += [number] * question_rows.num_rows
                if locality_logits is not None:
                    base_logits.append(locality_logits)
        questions = rows.concat_batches(batches)
        device = questions.hidden_states.device
        return TrainingBatch(
            queries=tuple(case.edit for case in cases),
            edits=rows.concat_batches(edits),
            questions=questions,
            probe_index=torch.tensor(probe_indices, device=device, dtype=torch.int64),
            base_logits=_pad_base_logits(
                base_logits, questions.labels.shape[1], self._model.card.vocab_size, device
            ),
            loss_weights={name: self._config.loss_weights[name] for name in self._probe_names},
            seed=0
            if generator is None
            else int(
                torch.randint(1, 2**62, (), generator=generator, dtype=torch.int64, device="cpu")
            ),
        )

    def _get_case_rows(self, case: Case) -> CaseRows:
        key = _case_key(
            case,
            self._model.card.config_hash,
            self._edit_depth,
            self._append_eos,
            self._probe_names,
        )
        if key in self._cached_rows:
            self._cached_rows.move_to_end(key)
            return self._cached_rows[key]
        case_rows = self._load_case_rows(key) or self._compute_case_rows(case, key)
        self._cached_rows[key] = case_rows
        self._num_cached_bytes += _num_bytes(case_rows)
        while (
            self._num_cached_bytes > self._config.prefix_cache_bytes and len(self._cached_rows) > 1
        ):
            self._num_cached_bytes -= _num_bytes(self._cached_rows.popitem(last=False)[1])
        return case_rows

    def _compute_case_rows(self, case: Case, key: str) -> CaseRows:
        names = [name for name in self._probe_names if name != "edit"]
        queries = [case.edit, *(query for name in names for query in case.probes[name])]
        num_locality_rows = sum(
            len(case.probes[name]) for name in names if name in self._locality_names
        )
        model = self._model
        inputs = (
            model.preprocess(queries, append_eos=True)
            if self._append_eos
            else model.preprocess(queries)
        )
        batch = cast(Batch, prefix.run_prefix(model, inputs, self._edit_depth))
        with torch.no_grad():
            locality_rows = rows.take_rows(
                batch, slice(batch.num_rows - num_locality_rows, batch.num_rows)
            )
            base_logits = model.decode(model.params, locality_rows)
        case_rows = CaseRows(batch, base_logits.float())
        if (
            self._disk_folder
            and self._num_written_bytes + _num_bytes(case_rows) <= self._config.prefix_disk_bytes
        ):
            path = self._disk_folder / f"{key}.safetensors"
            tensors = checkpoint.named_tensors(case_rows)
            checkpoint.save_checkpoint(path, tensors, {"case": key, "depth": batch.depth})
            self._num_written_bytes += path.stat().st_size
        return case_rows

    def _load_case_rows(self, key: str) -> CaseRows | None:
        path = self._disk_folder / f"{key}.safetensors" if self._disk_folder else None
        if path is None or not path.is_file():
            return None
        try:
            metadata, tensors = checkpoint.open_checkpoint(path)
        except InvalidInputError:
            return None  # not whole: computed again
        if metadata is None or metadata.get("case") != key:
            return None
        return _rows_from_tensors(tensors, int(metadata["depth"]))


def _rows_from_tensors(tensors: Mapping[str, Tensor], depth: int) -> CaseRows:
    batch_tensors = {
        n.removeprefix("batch/"): t for n, t in tensors.items() if n.startswith("batch/")
    }
    layer_inputs = {
        n.removeprefix("layer_inputs/"): t
        for n, t in batch_tensors.items()
        if n.startswith("layer_inputs/")
    }
    fields: dict[str, Any] = {
        n: t for n, t in batch_tensors.items() if not n.startswith("layer_inputs/")
    }
    return CaseRows(Batch(**fields, layer_inputs=layer_inputs, depth=depth), tensors["base_logits"])


def _pad_base_logits(
    base_logits: Sequence[Tensor], num_scored: int, vocab_size: int, device: torch.device
) -> Tensor:
    padded_logits = torch.zeros(
        sum(len(base) for base in base_logits),
        num_scored,
        vocab_size,
        device=device,
        dtype=torch.float32,
    )
    row_offset = 0
    for case_logits in base_logits:
        padded_logits[row_offset : row_offset + len(case_logits), : case_logits.shape[1]] = (
            case_logits
        )
        row_offset += len(case_logits)
    return padded_logits


def _case_key(case: Case, *context: Any) -> str:
    return hashlib.sha256(repr((case.id, *context)).encode()).hexdigest()[:24]


def _num_bytes(case_rows: CaseRows) -> int:
    return sum(
        t.numel() * t.element_size() for t in pytree.tree_leaves(case_rows) if isinstance(t, Tensor)
    )
