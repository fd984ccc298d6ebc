"""Metrics by name: what a score is made of, and which of the field's conventions it follows.

The same predictions get different numbers in different papers, so a number here carries the name
of its *scorer*. A scorer is data: how an answer succeeds, and how two models agree on a probe of
locality.

    scorer          success         text locality         image locality        source
    errata          token accuracy  top-1, answer         top-1, answer         our default
    easyedit        token accuracy  top-1, all positions  top-10, all positions  EasyEdit editor
    vlkeb           token accuracy  top-1, all positions  top-10, all positions  VLKEB trainer
    mmke            token accuracy  top-1, all positions  top-10, all positions  MMKE-Bench trainer
    comprehendedit  token accuracy  top-1, answer         top-10, answer        HICE's evaluator
    liveedit        token accuracy  top-1, answer         top-1, answer         LiveEdit evaluator
    ice             token accuracy  top-1, answer         (text only)           ICE, EasyEdit text

Top-k agreement is rank by rank ("ordered") in every peer. Averaging is micro inside a record, then
macro over records: the peers evaluate one record at a time, and tokens are never pooled over rows.

Probe names are metric names (`PROBES`): a case's probes and result rows use these keys.
Legend: B rows, T scored positions, L positions, K ranks kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from errata.functional.errors import InvalidSettingsError
from errata.functional.metrics.conventions import Agreement, Scorer, get_probe
from errata.functional.metrics.readout import Readout, _masked_mean
from errata.functional.types import IGNORE_INDEX

__all__ = [
    "ProbeScore",
    "agreement",
    "exact_match",
    "locality",
    "mean_nll",
    "neighbor_match",
    "perplexity",
    "perplexity_ratio",
    "score_probe",
    "success_score",
    "token_accuracy",
]


def token_accuracy(ids: Tensor, labels: Tensor) -> Tensor:
    """Share of answer tokens predicted under teacher forcing, per row: sum(ids = y) / |y|.

    EasyEdit `evaluate/multimodal_evaluate.py:416-445`, LiveEdit `vllm_editor_eval.py:142-149`.

    >>> token_accuracy(torch.tensor([[5, 7, 1]]), torch.tensor([[5, 6, -100]])).tolist()
    [0.5]

    Args:
        ids: Predicted ids, [B T].
        labels: Target ids, -100 where a position does not count, [B T].

    Returns:
        [B]; NaN for a row without labels.
    """
    return _masked_mean(ids == labels, labels != IGNORE_INDEX)


def exact_match(ids: Tensor, labels: Tensor) -> Tensor:
    """1 where every answer token is predicted under teacher forcing, else 0.

    EasyEdit's `exact_match=True`, the first number of MMEdit's "EM/Acc" pairs.

    >>> exact_match(torch.tensor([[5, 7], [5, 6]]), torch.tensor([[5, 6], [5, -100]])).tolist()
    [0.0, 1.0]

    Args:
        ids: Predicted ids, [B T].
        labels: Target ids, -100 where a position does not count, [B T].

    Returns:
        [B]; NaN for a row without labels.
    """
    scored = labels != IGNORE_INDEX
    right = ((ids == labels) | ~scored).all(-1).float()
    return torch.where(scored.any(-1), right, torch.nan)


def mean_nll(nll: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of a row's answer tokens, in nats.

    Args:
        nll: Per position, [B T].
        labels: Target ids, -100 where a position does not count, [B T].

    Returns:
        [B].
    """
    return _masked_mean(nll, labels != IGNORE_INDEX)


def perplexity(nll: Tensor, mask: Tensor) -> Tensor:
    """PPL = exp(mean -log p(x_i | x_<i)) over the kept positions.

    >>> perplexity(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, False]])).tolist()
    [1.0]

    Args:
        nll: Per position, in nats, [B T].
        mask: Positions to keep, [B T].

    Returns:
        [B].
    """
    return _masked_mean(nll, mask).exp()


def perplexity_ratio(continuation: Tensor, context: Tensor) -> Tensor:
    """PPL_r = PPL(x | q, x*) / PPL(q, x*): how fluently the text x continues after the edit x*.

    The formula of ICE (arXiv 2406.11194). Its released code reads p(x_i) off position i instead of
    i - 1 and masks other tokens, so its printed figures cannot be had from this formula.

    >>> perplexity_ratio(torch.tensor([6.0]), torch.tensor([4.0])).tolist()
    [1.5]

    Args:
        continuation: Perplexity of the continuation, [B].
        context: Perplexity of question and edit, [B].

    Returns:
        [B].
    """
    return continuation / context


def agreement(base: Tensor, edited: Tensor, mask: Tensor, ordered: bool = True) -> Tensor:
    """Share of top-k tokens on which two models agree.

    Ordered: mean over positions and ranks of [base_r = edited_r]; a newcomer at the front makes
    every rank differ. As sets: mean over positions of |base & edited| / K.

    >>> base, edited = torch.tensor([[[1, 2, 3]]]), torch.tensor([[[3, 1, 2]]])
    >>> keep = torch.tensor([[True]])
    >>> agreement(base, edited, keep), agreement(base, edited, keep, ordered=False)
    (tensor([0.]), tensor([1.]))

    Args:
        base: Top ids before the edit, [B T K].
        edited: Top ids after it, [B T K].
        mask: Positions to keep, [B T].
        ordered: Compare rank by rank, not as sets.

    Returns:
        [B].
    """
    if ordered:
        same = (base == edited).float().mean(-1)
    else:
        same = (base[..., :, None] == edited[..., None, :]).any(-1).float().mean(-1)
    return _masked_mean(same, mask)


def _align_right(base: Tensor, edited: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right-align two id tables [B L K] (-1 after a row's end) on the last common positions."""
    sizes = (base[..., 0] >= 0).sum(-1), (edited[..., 0] >= 0).sum(-1)
    common = torch.minimum(*sizes)  # [B]
    step = torch.arange(
        min(base.shape[1], edited.shape[1]), device=base.device, dtype=torch.int64
    )  # [L]
    mask = step[None] < common[:, None]  # [B L]

    def tail(ids: Tensor, size: Tensor) -> Tensor:
        positions = ((size - common)[:, None] + step[None]).clamp(max=ids.shape[1] - 1)
        return ids.gather(1, positions[..., None].expand(-1, -1, ids.shape[2]))

    return tail(base, sizes[0]), tail(edited, sizes[1]), mask


def locality(rule: Agreement, base: Readout, edited: Readout) -> Tensor:
    """How much of a locality probe an edit left unchanged, per row, under one rule.

    With `positions="all"` the last min(L) real positions of the two rows are compared, as EasyEdit
    does when a prompt-based editor lengthens the row (`util/vl_utils.py:135-159`); fewer than k
    ranks are compared where the vocabulary, or what was kept, is smaller.

    Args:
        rule: Ranks and positions to compare.
        base: Readout before the edit.
        edited: Readout after it.

    Returns:
        [B].

    Raises:
        InvalidSettingsError: If a rule over all positions gets readouts of the answer alone.
    """
    if rule.positions == "all":
        if base.all_top_ids is None or edited.all_top_ids is None:
            raise InvalidSettingsError(
                "a scorer over all positions needs readouts with `all_top_ids`; got the answer's "
                "only."
            )
        base_ids, edited_ids, mask = _align_right(base.all_top_ids, edited.all_top_ids)
    else:
        base_ids, edited_ids, mask = base.top_ids, edited.top_ids, base.labels != IGNORE_INDEX
    return agreement(base_ids[..., : rule.k], edited_ids[..., : rule.k], mask, rule.ordered)


def success_score(scorer: Scorer, readout: Readout) -> Tensor:
    """A row's success under a scorer: token accuracy or exact match.

    Args:
        scorer: The scorer.
        readout: Readout of the rows.

    Returns:
        [B].
    """
    measure = {"token_accuracy": token_accuracy, "exact_match": exact_match}[scorer.success]
    return measure(readout.top_ids[..., 0], readout.labels)


class ProbeScore(NamedTuple):
    """Scores of one probe's rows under one scorer; `agreement` is None where it means nothing."""

    before: Tensor  # [B] success of the unedited model
    after: Tensor  # [B] success of the edited one
    agreement: Tensor | None  # [B] of locality probes


def score_probe(scorer: Scorer, name: str, base: Readout, edited: Readout) -> ProbeScore:
    """Score the rows of one probe, named as in `PROBES`, before and after an edit.

    >>> from errata.functional.metrics.conventions import get_scorer
    >>> labels = torch.tensor([[3]])
    >>> base = Readout(labels, torch.tensor([[[4]]]), torch.zeros(1, 1))
    >>> edited = Readout(labels, torch.tensor([[[3]]]), torch.zeros(1, 1))
    >>> score_probe(get_scorer("errata"), "text_locality", base, edited)
    ProbeScore(before=tensor([0.]), after=tensor([1.]), agreement=tensor([0.]))

    Args:
        scorer: The scorer.
        name: Key of the probe.
        base: Readout before the edit.
        edited: Readout after it.

    Returns:
        Success before and after, and the agreement of a locality probe.
    """
    locality_score = None
    if get_probe(name).kind == "locality":
        locality_score = locality(
            scorer.text if name.startswith("text_") else scorer.image, base, edited
        )
    return ProbeScore(success_score(scorer, base), success_score(scorer, edited), locality_score)


def neighbor_match(
    answers: Sequence[Sequence[str]],
    targets: Sequence[Sequence[str]],
    k: int,
    from_end: bool = False,
) -> float:
    """KGI, KPI: an edit's neighbours after it, 100 sum_i sum_{j <= k} [answer = target] / (N k).

    KGI: neighbours the base got wrong, with the gold answers as targets. KPI: neighbours it got
    right, with its own answers. Strings are compared after `.strip()`, and the denominator is N k
    even where a record has fewer neighbours (ComprehendEdit `multimodal_edit_our.py:48-105`).

    >>> neighbor_match([["a", "b"], ["c"]], [["a", "x"], ["c "]], k=2)
    50.0

    Args:
        answers: The edited model's answers to the neighbours of each edit, nearest first.
        targets: The answers wanted.
        k: Neighbours to count.
        from_end: Count the k farthest instead.

    Returns:
        Percent.

    Raises:
        InvalidSettingsError: If k < 1, or the lists are empty or of unequal length.
    """
    if k < 1 or not answers or len(answers) != len(targets):
        raise InvalidSettingsError(
            f"k must be at least 1 and both lists of one length >= 1; got k={k}, "
            f"{len(answers)} and {len(targets)}."
        )
    chosen = slice(-k, None) if from_end else slice(k)
    hits = sum(
        one.strip() == two.strip()
        for mine, gold in zip(answers, targets, strict=True)
        for one, two in list(zip(mine, gold, strict=True))[chosen]
    )
    return 100 * hits / (len(answers) * k)
