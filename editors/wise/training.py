"""How WISE trains a side memory: rows and unrelated prompts up to the site once, then its values.

Legend: E memories trained side by side · R rows that are edited · U unrelated prompts per row · n
tokens of a prompt · K values of a memory · O, I of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from errata.editors.wise.config import WiseConfig
from errata.editors.wise.objective import (
    EditSite,
    PreparedRows,
    margin_terms,
    take_prepared,
    wise_loss,
)
from errata.editors.wise.unrelated import UNRELATED_QUESTIONS, UNRELATED_TEXTS
from errata.functional import Batch, EditRecord, Inputs, Model, Query
from errata.functional.errors import InvalidSettingsError, UnknownSiteError
from errata.functional.forward import batches, prefix
from errata.functional.forward.activations import record_activations
from errata.functional.forward.batches import mean_per_edit
from errata.functional.gradients import optimizers, schedules
from errata.functional.kinds.masked.apply import ACTIVATIONS, gated_tokens

__all__ = [
    "concat_rows",
    "edit_generator",
    "last_rows",
    "prepare_rows",
    "resolve_edit_site",
    "sample_mask",
    "train_values",
]


def resolve_edit_site(model: Model, config: WiseConfig) -> EditSite:
    """The map that the settings mean."""
    count, layer = model.card.num_layers, config.layer
    if isinstance(layer, float):
        layer = min(int(count * layer), count - 1)
    path = model.card.resolve_linear(f"layers.{layer}.{config.site}")
    number = model.card.layer_of(path)
    if number is None:
        raise UnknownSiteError(
            f"WISE's site must be a linear map of a decoder layer, {path!r} is none."
        )
    phi: Any = config.activation if config.activation != "auto" else model.card.activation or "silu"
    if phi not in ACTIVATIONS:
        raise InvalidSettingsError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, and that of {model.card.id} is "
            f"{phi!r}: name the nearest."
        )
    size = model.card.linear_shapes[path]
    return EditSite(path, number, size, path in model.card.transposed, phi)


def prepare_rows(
    model: Model,
    site: EditSite,
    queries: Sequence[Query],
    records: Sequence[EditRecord],
    seed: int,
    config: WiseConfig,
    unrelated_queries: Sequence[Query] = (),
) -> PreparedRows:
    """Read the rows and run them up to the site: what does not change is run once."""
    inputs = (
        model.preprocess(queries, append_eos=True)
        if config.append_eos
        else model.preprocess(queries)
    )
    own_tokens, batch = _site_activations(model, site, inputs, config)
    negatives = [
        _sample_unrelated(query, record, seed, config, unrelated_queries)
        for query, record in zip(queries, records)
    ]
    flat_negatives = [rival for row in negatives for rival in row]
    # Rows alike in pictures are read together; a prompt that several edits share is run once.
    query_keys = list(dict.fromkeys(map(_query_key, flat_negatives)))
    index_by_key = {key: number for number, key in enumerate(query_keys)}
    query_by_key = {
        key: query
        for query, key in zip(reversed(flat_negatives), map(_query_key, reversed(flat_negatives)))
    }
    activations: list[Any] = [None] * len(query_keys)
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(query_keys):
        query = query_by_key[key]
        groups.setdefault((len(query.images), query.video), []).append(number)
    for numbers in groups.values():
        group_activations, _ = _site_activations(
            model, site, model.preprocess([query_by_key[query_keys[n]] for n in numbers]), config
        )
        for row, number in enumerate(numbers):
            activations[number] = tuple(part[row] for part in group_activations)
    longest = max([own_tokens[0].shape[1], *(x.shape[0] for x, _, _ in activations)])
    prompts = [
        [
            tuple(part[r] for part in own_tokens),
            *(activations[index_by_key[_query_key(rival)]] for rival in row),
        ]
        for r, row in enumerate(negatives)
    ]
    site_inputs, site_outputs, token_mask = (
        torch.stack([torch.stack([_pad_tokens(one[i], longest) for one in row]) for row in prompts])
        for i in range(3)
    )
    edit_index = torch.arange(len(queries), device=batch.edit_index.device)
    return PreparedRows(
        batch._replace(edit_index=edit_index), site_inputs, site_outputs, token_mask
    )


def concat_rows(earlier: PreparedRows | None, later: PreparedRows) -> PreparedRows:
    """The rows of both, prompts padded to the longest."""
    if earlier is None:
        return later
    longest = max(earlier.token_mask.shape[2], later.token_mask.shape[2])
    parts = [
        torch.cat(
            [F.pad(part, (*(0, 0) * (part.ndim - 3), 0, longest - part.shape[2])) for part in pair]
        )
        for pair in zip(earlier[1:], later[1:])
    ]
    return PreparedRows(batches.concat_batches([earlier.batch, later.batch]), *parts)


def last_rows(ready: PreparedRows, count: int) -> PreparedRows | None:
    """The last rows, as many as are there; none of none."""
    if not count:
        return None
    return take_prepared(ready, slice(max(0, len(ready.inputs) - count), None))


def _site_activations(
    model: Model, site: EditSite, inputs: Inputs, config: WiseConfig
) -> tuple[tuple[Tensor, Tensor, Tensor], Batch]:
    """What the site is given and gives at the tokens that count, and the rows before its layer."""
    depth = prefix.edit_depth(model.card, [site.weight])
    batch_at_layer = cast(
        Batch, prefix.run_prefix(model, inputs, depth._replace(scored_only=False))
    )
    with torch.no_grad():
        _, activations = record_activations(
            model.decode, model.params, batch_at_layer, [site.path], stop=site.layer + 1
        )
        tokens = gated_tokens(batch_at_layer, config.gate_statistic)
        order = (~tokens).int().argsort(dim=1, stable=True)[:, : max(1, int(tokens.sum(1).max()))]
        parts = [
            part.reshape(*tokens.shape, -1).float().gather(1, order[..., None].expand(-1, -1, size))
            for part, size in zip(activations[site.path], reversed(site.size))
        ]
        batch = cast(Batch, prefix.run_prefix(model, batch_at_layer, depth))
    return (parts[0], parts[1], tokens.gather(1, order)), batch


def _pad_tokens(part: Tensor, length: int) -> Tensor:
    """Tokens first, `length` of them: zeros (and False) behind the last."""
    return torch.cat([part, part.new_zeros(length - part.shape[0], *part.shape[1:])])


def _query_key(query: Query) -> Any:
    return query.prompt, tuple(map(id, query.images)), query.video


def _sample_unrelated(
    query: Query,
    record: EditRecord,
    seed: int,
    config: WiseConfig,
    unrelated_queries: Sequence[Query],
) -> list[Query]:
    """The prompts one edit's gate stays shut for, drawn by the edit's name."""
    generator = edit_generator(seed, record, "unrelated")

    def sample(candidates: Sequence[Query]) -> list[Query]:
        candidates = [one for one in candidates if one.prompt != query.prompt]
        if not candidates:
            raise InvalidSettingsError(
                "unrelated prompts must be other ones than the edit's: name more."
            )
        order = torch.randperm(len(candidates), generator=generator).tolist()
        return [candidates[order[k % len(order)]] for k in range(config.num_unrelated)]

    texts = unrelated_queries or [Query(text) for text in config.unrelated_texts or UNRELATED_TEXTS]
    negatives = sample(texts)
    if "image" in config.own_negatives:  # of an edit without one: about nothing, as texts are
        questions = config.unrelated_questions or UNRELATED_QUESTIONS
        images_and_video = query.images, query.video
        negatives += sample(
            [
                Query(text, images=images_and_video[0], video=images_and_video[1])
                for text in questions
            ]
        )
    if "question" in config.own_negatives:  # without its picture; where it has none, one more text
        without_images = query._replace(target="", images=(), video=False)
        negatives.append(without_images if query.images else sample(texts)[0])
    return negatives


def train_values(
    model: Model,
    site: EditSite,
    prepared: PreparedRows,
    positions: Tensor,
    initial_values: Tensor,
    config: WiseConfig,
) -> tuple[Tensor, Tensor]:
    """The values [E K] that make each row say its target, and each memory's nearest edit [E]."""
    lr, decay = config.lr, config.weight_decay
    make_optimizer = optimizers.sgd if config.optimizer == "sgd" else optimizers.adam
    optimizer = make_optimizer(lr, weight_decay=decay)
    loss_terms, (out, inner) = wise_loss(model, site, prepared, config), site.size
    edit_index, count = prepared.batch.edit_index, len(positions)
    weight = model.params[site.weight].detach()
    weight = (weight.mT if site.transposed else weight).reshape(-1)
    decay_reference = {"values": weight[positions].float()} if decay else None

    dense = initial_values.new_zeros(
        count, out * inner, dtype=torch.float32
    )  # zero but at `positions`

    def maps(values: Tensor) -> Tensor:
        return dense.scatter_(1, positions, values).view(-1, out, inner)

    def loss(maps):
        answer, inside, outside = loss_terms(maps)
        margin = margin_terms(inside[:, None], outside, config.alpha, config.beta, config.gamma)
        edit_losses = mean_per_edit(answer + margin, edit_index, count)
        return edit_losses.sum(), edit_losses.detach()

    step = torch.func.grad(loss, has_aux=True)
    tensors = {"values": initial_values.float()}
    optimizer_state = optimizer.init(tensors, num_edits=count)
    previous_losses = torch.full((count,), torch.inf, device=initial_values.device)
    active = torch.ones(count, dtype=torch.bool, device=initial_values.device)
    for number in range(config.num_steps):
        dense_grad, each = step(maps(tensors["values"]))
        grads = {"values": dense_grad.flatten(1).gather(1, positions)}
        done = ((each - previous_losses).abs() <= config.stop_improvement) & (
            each <= config.stop_loss
        )
        active, previous_losses = active & ~done, each
        if not bool(active.any()):
            break
        if number == 0 and not bool(grads["values"].any()):
            raise InvalidSettingsError(
                "a side memory must act on the answer, and its gradient is zero: name another "
                "site or a larger mask_ratio."
            )
        tensors, optimizer_state = optimizer.update(
            grads, optimizer_state, tensors, mask=active, decay_reference=decay_reference
        )
        if config.norm_constraint is not None:
            tensors = schedules.clip_elements(tensors, config.norm_constraint)
    values = tensors["values"]
    with torch.no_grad():
        inside = loss_terms(maps(values), with_answers=False)[1]
    min_activations = torch.full((count,), torch.inf, device=initial_values.device)
    return values, min_activations.scatter_reduce(0, edit_index, inside, "amin")


def edit_generator(seed: int, record: EditRecord, purpose: str) -> torch.Generator:
    """A generator named by the edit: the same in any order and in any company."""
    name = hashlib.sha256(f"{seed} {record.id} {purpose}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(name, "little") >> 1)


def sample_mask(size: tuple[int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """[O I] flat: True at round(ratio O I) positions, in each row as many as in any other or one
    fewer.

    >>> sample_mask((4, 5), 0.3, torch.Generator().manual_seed(0)).view(4, 5).sum(1)
    tensor([2, 2, 1, 1])
    """
    out, inner = size
    least, more = divmod(max(1, round(ratio * out * inner)), out)
    mask = torch.zeros(out, inner, dtype=torch.bool)
    for begin in range(0, out, 512):
        batches = mask[begin : begin + 512]
        order = torch.rand(batches.shape, generator=generator).topk(min(least + 1, inner)).indices
        longer = max(0, min(more - begin, len(batches)))
        batches[:longer].scatter_(1, order[:longer], True)
        batches[longer:].scatter_(1, order[longer:, :least], True)
    return mask.flatten()
