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

Probe names are metric names (`PROBES`): a case's probes and a ledger's rows use these keys.
Legend: B rows, T scored positions, L positions, K ranks kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from .errors import InvalidSettingsError
from .types import IGNORE_INDEX

__all__ = [
    "PROBES",
    "SCORERS",
    "Agreement",
    "Probe",
    "Readout",
    "ProbeScore",
    "Scorer",
    "agreement",
    "mean_kl",
    "exact_match",
    "locality",
    "mean_nll",
    "neighbor_match",
    "perplexity",
    "perplexity_ratio",
    "get_probe",
    "make_readout",
    "score_probe",
    "get_scorer",
    "success_score",
    "token_accuracy",
]


class Probe(msgspec.Struct, frozen=True):
    """What a probe key stands for: its name in prose and in tables, and how it is scored."""

    title: str
    column: str
    kind: Literal["success", "locality"]


PROBES: Mapping[str, Probe] = {
    "reliability": Probe("Reliability", "Rel", "success"),
    "text_reliability": Probe("Text reliability", "T-Rel", "success"),
    "image_reliability": Probe("Image reliability", "I-Rel", "success"),
    "rephrase": Probe("Text generality", "T-Gen", "success"),
    "image_rephrase": Probe("Image generality", "M-Gen", "success"),
    "text_locality": Probe("Text locality", "T-Loc", "locality"),
    "image_locality": Probe("Image locality", "M-Loc", "locality"),
    "same_entity_locality": Probe("Same-entity locality", "E-Loc", "locality"),
    "hard_locality": Probe("Hard locality", "H-Loc", "locality"),
    "portability": Probe("Portability", "Port", "success"),
    "kgi": Probe("Knowledge generalization", "KGI", "success"),
    "kpi": Probe("Knowledge preservation", "KPI", "success"),
}


def get_probe(name: str) -> Probe:
    """What a probe key means; suffixed keys follow their family, a key of your own is a success.

    `portability_2hop` is a portability, `text_locality_forgetfulness` a text locality.

    >>> get_probe("portability_2hop").column, get_probe("image_locality").kind, get_probe("humour").kind
    ('Port 2hop', 'locality', 'success')
    """
    if name in PROBES:
        return PROBES[name]
    known = [stem for stem in PROBES if name.startswith(f"{stem}_")]
    if known:
        stem = max(known, key=len)
        rest = name[len(stem) + 1 :].replace("_", " ")
        family = PROBES[stem]
        return Probe(f"{family.title} ({rest})", f"{family.column} {rest}", family.kind)
    title = name.replace("_", " ").capitalize()
    return Probe(title, title, "locality" if "locality" in name else "success")


class Agreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How two models are compared: their k likeliest tokens, at some positions."""

    k: int = 1
    ordered: bool = True
    positions: Literal["answer", "all"] = "answer"


class Scorer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the field's conventions, as data; `SCORERS` holds them by name."""

    name: str
    source: str
    success: Literal["token_accuracy", "exact_match"] = "token_accuracy"
    text: Agreement = Agreement()
    image: Agreement = Agreement()
    pools_kinds: bool = False
    """Kinds of portability, and of locality, are averaged as one pool of a case's questions."""

    @property
    def num_ranks(self) -> int:
        """How many of the likeliest tokens a reading must keep."""
        return max(self.text.k, self.image.k)

    @property
    def needs_all_positions(self) -> bool:
        """Whether locality needs every position of the row, not only the answer's."""
        return "all" in (self.text.positions, self.image.positions)


_TOP_1, _TOP_10 = Agreement(k=1, positions="all"), Agreement(k=10, positions="all")

SCORERS: Mapping[str, Scorer] = {
    one.name: one
    for one in (
        Scorer(name="errata", source="this library: answer positions, base against edited argmax"),
        Scorer(
            name="easyedit",
            source="zjunlp/EasyEdit evaluate/multimodal_evaluate.py, util/vl_utils.py:135-159",
            text=_TOP_1,
            image=_TOP_10,
        ),
        Scorer(
            name="vlkeb",
            source="VLKEB/VLKEB trainer/MultimodalTrainer.py",
            text=_TOP_1,
            image=_TOP_10,
        ),
        Scorer(
            name="mmke",
            source="mmke-bench-bigai/mmke-bench trainer/MultimodalTrainer.py:502-582",
            text=_TOP_1,
            image=_TOP_10,
        ),
        Scorer(
            name="comprehendedit",
            source="yaohui120/ComprehendEdit editors/multimodal_editor.py:400-427",
            image=Agreement(k=10),
        ),
        Scorer(name="liveedit", source="qizhou000/LiveEdit evaluation/vllm_editor_eval.py:108-173"),
        Scorer(
            name="ice",
            source="bigai-ai/ICE eval.py:60-107; EasyEdit evaluate_utils.py:242-317",
            pools_kinds=True,
        ),
    )
}


def get_scorer(name: str) -> Scorer:
    """The scorer of that name.

    >>> get_scorer("liveedit").image
    Agreement(k=1, ordered=True, positions='answer')

    Raises `BadSettings` for an unknown name.
    """
    if name not in SCORERS:
        raise InvalidSettingsError(f"scorer must be one of {', '.join(SCORERS)}; got {name!r}.")
    return SCORERS[name]


class Readout(NamedTuple):
    """What one forward pass says about each row: enough for every scorer, small enough to keep."""

    labels: Tensor  # [B T] int64, IGNORE where nothing is scored
    top_ids: Tensor  # [B T K] int64, likeliest tokens first
    nll: Tensor  # [B T] -log p(label), 0 where ignored
    all_top_ids: Tensor | None = None  # [B L K] the same at every position, -1 behind a row's end
    kl: Tensor | None = None  # [B] KL(base || this model), where the base's logits were at hand
    logits: Tensor | None = None  # [B T V], where they were asked for


def make_readout(
    logits: Tensor, labels: Tensor, k: int = 10, all_top_ids: Tensor | None = None
) -> Readout:
    """Reduce logits [B T V] that predict labels [B T] to what scorers need.

    Position t of `logits` predicts position t of `labels` (shift before the call). K is
    min(k, V). `whole` [B L K] is passed through, see `Reading`.

    >>> out = make_readout(torch.tensor([[[0.0, 2.0, 1.0]]]), torch.tensor([[2]]), k=2)
    >>> out.top_ids.tolist(), round(float(out.nll), 3)
    ([[[1, 2]]], 1.408)
    """
    scored = labels != IGNORE_INDEX
    log_p = torch.log_softmax(logits.float(), dim=-1)
    gold = torch.where(scored, labels, 0)
    nll = -log_p.gather(-1, gold[..., None])[..., 0]
    top_ids = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return Readout(labels, top_ids, torch.where(scored, nll, 0.0), all_top_ids)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B T] where keep [B T]; a row that keeps nothing is NaN, never perfect."""
    mask = mask.to(torch.float32)
    return (values.float() * mask).sum(-1) / mask.sum(-1)


def token_accuracy(ids: Tensor, labels: Tensor) -> Tensor:
    """Share of answer tokens predicted under teacher forcing, per row: sum(ids = y) / |y|.

    ids [B T], labels [B T] -> [B]; a row without labels gives NaN. EasyEdit
    `evaluate/multimodal_evaluate.py:416-445`, LiveEdit `vllm_editor_eval.py:142-149`.

    >>> token_accuracy(torch.tensor([[5, 7, 1]]), torch.tensor([[5, 6, -100]])).tolist()
    [0.5]
    """
    return _masked_mean(ids == labels, labels != IGNORE_INDEX)


def exact_match(ids: Tensor, labels: Tensor) -> Tensor:
    """1 where every answer token is predicted under teacher forcing, else 0: [B T] [B T] -> [B].

    EasyEdit's `exact_match=True`, the first number of MMEdit's "EM/Acc" pairs.

    >>> exact_match(torch.tensor([[5, 7], [5, 6]]), torch.tensor([[5, 6], [5, -100]])).tolist()
    [0.0, 1.0]
    """
    scored = labels != IGNORE_INDEX
    right = ((ids == labels) | ~scored).all(-1).float()
    return torch.where(scored.any(-1), right, torch.nan)


def mean_nll(nll: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of a row's answer tokens, in nats: [B T] [B T] -> [B]."""
    return _masked_mean(nll, labels != IGNORE_INDEX)


def perplexity(nll: Tensor, mask: Tensor) -> Tensor:
    """PPL = exp(mean -log p(x_i | x_<i)) over the positions kept: [B T] [B T] bool -> [B].

    >>> perplexity(torch.tensor([[0.0, 2.0]]), torch.tensor([[True, False]])).tolist()
    [1.0]
    """
    return _masked_mean(nll, mask).exp()


def perplexity_ratio(continuation: Tensor, context: Tensor) -> Tensor:
    """PPL_r = PPL(x | q, x*) / PPL(q, x*): how fluently the text x goes on after the edit x*.

    The formula of ICE (arXiv 2406.11194). Its released code reads p(x_i) off position i instead of
    i - 1 and masks other tokens, so its printed figures can not be had from this formula.

    >>> perplexity_ratio(torch.tensor([6.0]), torch.tensor([4.0])).tolist()
    [1.5]
    """
    return continuation / context


def mean_kl(base: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """KL(base || edited) = sum_v p (log p - log q), mean over kept positions, in nats.

    base, edited: logits [B T V]; keep [B T] bool -> [B]. The locality loss of MEND, EasyEdit and
    LiveEdit, there pooled over all kept tokens of a batch.
    """
    p, q = torch.log_softmax(base.float(), -1), torch.log_softmax(edited.float(), -1)
    return _masked_mean((p.exp() * (p - q)).sum(-1), mask)


def agreement(base: Tensor, edited: Tensor, mask: Tensor, ordered: bool = True) -> Tensor:
    """Share of top-k tokens on which two models agree: [B T K] [B T K] [B T] bool -> [B].

    Ordered: mean over positions and ranks of [base_r = edited_r]; a newcomer at the front makes
    every rank differ. As sets: mean over positions of |base & edited| / K.

    >>> base, edited = torch.tensor([[[1, 2, 3]]]), torch.tensor([[[3, 1, 2]]])
    >>> keep = torch.tensor([[True]])
    >>> agreement(base, edited, keep), agreement(base, edited, keep, ordered=False)
    (tensor([0.]), tensor([1.]))
    """
    if ordered:
        same = (base == edited).float().mean(-1)
    else:
        same = (base[..., :, None] == edited[..., None, :]).any(-1).float().mean(-1)
    return _masked_mean(same, mask)


def _align_right(base: Tensor, edited: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right-align two id tables [B L K] (-1 behind a row's end) on the last common positions."""
    sizes = (base[..., 0] >= 0).sum(-1), (edited[..., 0] >= 0).sum(-1)
    common = torch.minimum(*sizes)  # [B]
    step = torch.arange(min(base.shape[1], edited.shape[1]), device=base.device)  # [L]
    mask = step[None] < common[:, None]  # [B L]

    def tail(ids: Tensor, size: Tensor) -> Tensor:
        positions = ((size - common)[:, None] + step[None]).clamp(max=ids.shape[1] - 1)
        return ids.gather(1, positions[..., None].expand(-1, -1, ids.shape[2]))

    return tail(base, sizes[0]), tail(edited, sizes[1]), mask


def locality(rule: Agreement, base: Readout, edited: Readout) -> Tensor:
    """How much of a locality probe an edit left alone, per row, under one rule: -> [B].

    With `positions="all"` the last min(L) real positions of the two rows are compared, as EasyEdit
    does when a prompt-based editor lengthens the row (`util/vl_utils.py:135-159`); fewer than k
    ranks are compared where the vocabulary, or what was kept, is smaller.

    Raises `BadSettings` when a rule over all positions gets a reading of the answer only.
    """
    if rule.positions == "all":
        if base.all_top_ids is None or edited.all_top_ids is None:
            raise InvalidSettingsError(
                "a scorer over all positions needs readouts with `all_top_ids`; got the answer's only."
            )
        base_ids, edited_ids, mask = _align_right(base.all_top_ids, edited.all_top_ids)
    else:
        base_ids, edited_ids, mask = base.top_ids, edited.top_ids, base.labels != IGNORE_INDEX
    return agreement(base_ids[..., : rule.k], edited_ids[..., : rule.k], mask, rule.ordered)


def success_score(scorer: Scorer, readout: Readout) -> Tensor:
    """A row's success under a scorer: token accuracy or exact match, [B]."""
    measure = {"token_accuracy": token_accuracy, "exact_match": exact_match}[scorer.success]
    return measure(readout.top_ids[..., 0], readout.labels)


class ProbeScore(NamedTuple):
    """Scores of one probe's rows under one scorer; `agreement` is None where it means nothing."""

    before: Tensor  # [B] success of the unedited model
    after: Tensor  # [B] success of the edited one
    agreement: Tensor | None  # [B] of locality probes


def score_probe(scorer: Scorer, name: str, base: Readout, edited: Readout) -> ProbeScore:
    """Score the rows of one probe, named as in `PROBES`, before and after an edit.

    >>> labels = torch.tensor([[3]])
    >>> base = Readout(labels, torch.tensor([[[4]]]), torch.zeros(1, 1))
    >>> edited = Readout(labels, torch.tensor([[[3]]]), torch.zeros(1, 1))
    >>> score_probe(get_scorer("errata"), "text_locality", base, edited)
    ProbeScore(before=tensor([0.]), after=tensor([1.]), agreement=tensor([0.]))
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
    """KGI, KPI: an edit's neighbours after it, 100 sum_i sum_{j <= k} [said = wanted] / (N k).

    `said[i]` are the edited model's answers to the neighbours of edit i, nearest first;
    `last=True` takes the last k. KGI: neighbours the base got wrong, `wanted` the gold answers.
    KPI: neighbours it got right, `wanted` its own answers. Strings are compared after `.strip()`,
    and the denominator is N k even where a record has fewer neighbours (ComprehendEdit
    `multimodal_edit_our.py:48-105`).

    >>> neighbor_match([["a", "b"], ["c"]], [["a", "x"], ["c "]], k=2)
    50.0
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
