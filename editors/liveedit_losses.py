"""How LiveEdit is trained: what its routing is held to, and its course for `fit`.

With a_bm = scale <f_b, E_m> the similarity of question b to expert m, t_b that to the sentinel, and
s_bm = scale <g_b, G_m>, for questions that their own edit e should reach, and for localities:

    soft    -log softmax_m(s_b)_e - log sigmoid(s_be),    - mean_m log(1 - sigmoid(s_bm)) of others
    hard    -log softmax over [a_b1 .. a_bE, t_b] at e,   at the sentinel for a locality
    apart   REACH log(1 + e^(t_b - a_be)),                log(1 + sum_m e^(a_bm - t_b)) of others

Source: qizhou000/LiveEdit `editor/vllm_editors/liveedit/liveedit.py`, `train_a_batch`.
Legend: B questions · E edits of a lesson.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Batch, Model, prefix, rows
from errata.functional.experts import EPS, Features, cleared, features, scale_of, tokens_of
from errata.functional.losses import kl, nll
from errata.kernels import lora_moe

from .fit import Lesson, combined
from .liveedit_net import Nets, Pool, absorbed, pool_of

if TYPE_CHECKING:
    from .liveedit import LiveEditConfig

__all__ = ["Likeness", "apart", "hard", "lesson_loss", "likeness", "soft"]


FAINT = 1e-4  # the weight of all experts together below which a row is as the base's


REACH = 6.0  # how much worse it is to shut out a question than to let in one that the soft
# weights still turn away
BLIND = 0.5  # the share of edits whose makers see the answer alone, and can not learn it by heart


class Likeness(NamedTuple):
    """How alike questions are to edits, in the units of the gate."""

    vision: Tensor  # [B E]
    sentinel: Tensor  # [B]
    query: Tensor  # [B E]


def soft(query: Tensor, own: Tensor, reach: Tensor, kin: Tensor) -> Tensor:
    """[B] what the weights of experts are held to; `kin` [B E]: experts a row can be routed to."""
    mine = F.one_hot(own, query.shape[1]).bool() & reach[:, None]
    among = torch.where(kin, query, -torch.inf)
    relative = torch.where(reach, -torch.where(mine, among.log_softmax(1), 0).sum(1), 0)
    yes = -torch.where(mine, F.logsigmoid(query), 0).sum(1)
    others = kin & ~mine
    no = -torch.where(others, F.logsigmoid(-query), 0).sum(1) / others.sum(1).clamp_min(1)
    return relative + yes + no


def hard(like: Likeness, own: Tensor, reach: Tensor) -> Tensor:
    """[B] cross-entropy of the gate's choice: the own expert, or the sentinel for localities."""
    every = torch.cat([like.vision, like.sentinel[:, None]], 1)  # [B E+1]
    return F.cross_entropy(every, torch.where(reach, own, like.vision.shape[1]), reduction="none")


def apart(like: Likeness, own: Tensor, reach: Tensor, margin: float = 0.0) -> Tensor:
    """[B] how far the own expert is above the sentinel, and all others below it."""
    above = like.vision - like.sentinel[:, None]  # [B E]
    mine = F.one_hot(own, above.shape[1]).bool() & reach[:, None]
    yes = F.softplus(margin - torch.where(mine, above, 0).sum(1)) * reach
    no = F.softplus(margin + torch.where(mine, -torch.inf, above).logsumexp(1))
    return REACH * yes + no


def lesson_loss(
    config: LiveEditConfig, model: Model, nets: Nets, lesson: Lesson
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a lesson, whose rows stand behind the edited layer, and its terms."""
    asks, heads = lesson.asks, config.heads
    dice = torch.Generator().manual_seed(lesson.seed)
    blind = torch.rand(len(lesson.queries), generator=dice) < (BLIND if lesson.seed else 0)
    pool = pool_of(nets, config, lesson.edit.hidden, lesson.edit, blind.to(asks.hidden.device))
    found = features(
        absorbed(nets.ask, heads), asks.hidden, tokens_of(asks), heads,
        (nets.sentinel, nets.sentinel_text),
    )  # fmt: skip
    like = likeness(config, found, pool)
    own = asks.edit
    reach = torch.arange(asks.rows, device=own.device) < asks.rows - lesson.base.shape[0]
    kin = found.pictured[:, None] == (pool.vision_keys[:, -2] > 0)
    routing = {
        "soft": soft(like.query, own, reach, kin).mean(),
        "hard": hard(like, own, reach).mean(),
        "apart": apart(like, own, reach, config.margin).mean(),
    }
    weights = lora_moe.weigh(like.query, _company(lesson, own, reach, dice) & kin)
    hidden = _with_experts(nets, pool, weights, asks.hidden)
    felt = weights.detach().sum(1) > FAINT
    values = _answers(model, lesson, asks._replace(hidden=hidden), felt)
    total, terms = combined(values, lesson)
    total = total + sum(routing.values())
    return total, {**terms, **{name: value.detach() for name, value in routing.items()}}


def _with_experts(nets: Nets, pool: Pool, weights: Tensor, hidden: Tensor) -> Tensor:
    """h + sum_m w_m relu(LN(h) A_m^T) B_m, all rows with the same pool, as two products."""
    given = F.layer_norm(hidden.float(), hidden.shape[-1:], nets.norm[0], nets.norm[1], EPS)
    inner = F.relu(given @ pool.down.flatten(0, 1).mT)  # [B L ER]
    inner = inner * weights.repeat_interleave(pool.down.shape[1], 1)[:, None]
    return (hidden + inner @ pool.up.flatten(0, 1)).to(hidden.dtype)


def _answers(model: Model, lesson: Lesson, asks: Batch, felt: Tensor) -> Tensor:
    """[B] NLL where edits should reach, KL of localities; 0 for rows that need not be run.

    These are localities whose experts are not felt, most of them once routing is learned, and rows
    of a probe that weighs nothing: those train routing alone.
    """
    first = asks.rows - lesson.base.shape[0]
    weights = torch.tensor(list(lesson.weights.values()), device=felt.device)[lesson.probe]
    reach = torch.arange(asks.rows, device=felt.device) < first
    run = ((reach | felt) & (weights > 0)).nonzero()[:, 0]
    some = rows.take(asks, run)
    logits, labels = prefix.narrow(model, some), some.labels
    here = int((reach & (weights > 0)).sum())
    base = lesson.base[run[here:] - first]
    found = [nll(logits[:here], labels[:here]), kl(base, logits[here:], labels[here:])]
    return logits.new_zeros(asks.rows).index_copy(0, run, torch.cat(found))


def likeness(config: LiveEditConfig, found: Features, pool: Pool) -> Likeness:
    """How alike questions are to the edits of a pool; -1e28 and less where the kinds differ."""
    scale = scale_of(config.slots, config.width)
    query = found.query
    if config.blend == "both":
        query = torch.cat([query, found.vision], 1)
    return Likeness(
        vision=scale * cleared(found.vision, found.pictured) @ pool.vision_keys.mT,
        sentinel=scale * (found.vision * found.sentinel).sum(1),
        query=scale * query @ pool.query_keys.mT,
    )


def _company(lesson: Lesson, own: Tensor, reach: Tensor, dice: torch.Generator) -> Tensor:
    """[B E] the experts that act on each row: 0 to E random ones, and its own where it should."""
    count = len(lesson.queries)
    order = torch.rand(len(own), count, generator=dice).argsort(1)
    some = torch.randint(0, count + 1, (len(own), 1), generator=dice)
    mine = F.one_hot(own, count).bool() & reach[:, None]
    return (order < some).to(own.device) | mine
