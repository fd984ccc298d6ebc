"""Training of a side memory: rows and unrelated prompts run once up to the site, then its values.

Legend: E memories trained at once · R edited rows · U unrelated prompts per row · n tokens of a
prompt · K values of a memory · O, I output and input width of the map.
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
from errata.functional.errors import EditDivergedError, InvalidSettingsError, UnknownSiteError
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
    """Find the linear map that the settings name.

    Args:
        model: The model.
        config: The settings. A fraction as `layer` counts from the first layer, rounded down.

    Returns:
        The site.

    Raises:
        UnknownSiteError: If the site is not in the model, or is no linear map of a decoder layer.
        InvalidSettingsError: If the activation function of the model has no counterpart here.
    """
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
    """Preprocess edits and their unrelated prompts, and run them up to the site.

    Unrelated prompts are sampled per edit, by a seed that depends on `seed` and the edit's id only.

    Args:
        model: The base model.
        site: The map with the memories.
        queries: The edits, R of them.
        records: The record of each edit.
        seed: Seed of the editor's state.
        config: The settings.
        unrelated_queries: Unrelated prompts to sample from. Empty: those of the settings.

    Returns:
        The rows. Row r trains memory r.

    Raises:
        InvalidSettingsError: If every unrelated prompt equals the edit's.
    """
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
    # One batch per number of images and kind of vision input. Prompts that edits share run once.
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
    edit_index = torch.arange(len(queries), device=batch.edit_index.device, dtype=torch.int64)
    return PreparedRows(
        batch._replace(edit_index=edit_index), site_inputs, site_outputs, token_mask
    )


def concat_rows(earlier: PreparedRows | None, later: PreparedRows) -> PreparedRows:
    """Concatenate prepared rows. Prompts are padded to the longest.

    Args:
        earlier: The first rows. None: none.
        later: The rows after them.

    Returns:
        All rows.
    """
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
    """Select the last rows.

    Args:
        ready: The rows.
        count: Number of rows to keep. More than there are: all.

    Returns:
        The rows, or None if `count` is 0.
    """
    if not count:
        return None
    return take_prepared(ready, slice(max(0, len(ready.inputs) - count), None))


def _site_activations(
    model: Model, site: EditSite, inputs: Inputs, config: WiseConfig
) -> tuple[tuple[Tensor, Tensor, Tensor], Batch]:
    """Record inputs and outputs of the site at the tokens that the gate counts.

    Also returns the mask of these tokens, and the rows before the site's layer.
    """
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
    """Pad the first axis to `length`, with zeros (False) at the end."""
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
    """Sample the unrelated prompts of one edit, seeded by its id."""
    generator = edit_generator(seed, record, "unrelated")

    def sample(candidates: Sequence[Query]) -> list[Query]:
        candidates = [one for one in candidates if one.prompt != query.prompt]
        if not candidates:
            raise InvalidSettingsError(
                "unrelated prompts must be other ones than the edit's: name more."
            )
        order = torch.randperm(
            len(candidates), generator=generator, dtype=torch.int64, device="cpu"
        ).tolist()
        return [candidates[order[k % len(order)]] for k in range(config.num_unrelated)]

    texts = unrelated_queries or [Query(text) for text in config.unrelated_texts or UNRELATED_TEXTS]
    negatives = sample(texts)
    if "image" in config.own_negatives:
        questions = config.unrelated_questions or UNRELATED_QUESTIONS
        images_and_video = query.images, query.video
        negatives += sample(
            [
                Query(text, images=images_and_video[0], video=images_and_video[1])
                for text in questions
            ]
        )
    if "question" in config.own_negatives:  # a text if it has no image
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
    """Train the values of side memories until each edited row gives its target.

    A memory keeps its values once its loss is at most `stop_loss` and changes by at most
    `stop_improvement` per step.

    Args:
        model: The base model.
        site: The map with the memories.
        prepared: The rows, R of them. `batch.edit_index` is the memory of each.
        positions: Positions of the values in the flat map [E K] int64.
        initial_values: Values to start from [E K].
        config: The settings.

    Returns:
        The values [E K] in fp32, and the smallest activation among each memory's own edits [E].

    Raises:
        InvalidSettingsError: If the gradient of the first step is zero everywhere.
    """
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
    )  # nonzero only at `positions`

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
    previous_losses = torch.full(
        (count,), torch.inf, device=initial_values.device, dtype=torch.float32
    )
    active = torch.ones(count, dtype=torch.bool, device=initial_values.device)
    for number in range(config.num_steps):
        dense_grad, each = step(maps(tensors["values"]))
        grads = {"values": dense_grad.flatten(1).gather(1, positions)}
        if not bool(each.isfinite().all()):
            raise EditDivergedError("wise", (~each.isfinite()).nonzero()[:, 0].tolist(), count)
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
    min_activations = torch.full(
        (count,), torch.inf, device=initial_values.device, dtype=torch.float32
    )
    return values, min_activations.scatter_reduce(0, edit_index, inside, "amin")


def edit_generator(seed: int, record: EditRecord, purpose: str) -> torch.Generator:
    """Make a generator seeded by an edit's id, so samples do not depend on the order of edits.

    Args:
        seed: Seed of the editor's state.
        record: The edit.
        purpose: What is sampled. Each purpose has a stream of its own.

    Returns:
        A generator on the CPU.
    """
    name = hashlib.sha256(f"{seed} {record.id} {purpose}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(name, "little") >> 1)


def sample_mask(size: tuple[int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """Sample round(ratio O I) elements of a map, at least one, spread evenly over its rows.

    Counts of two rows differ by one at most.

    Args:
        size: (O, I).
        ratio: Fraction of the elements.
        generator: Source of the samples, on the CPU.

    Returns:
        The mask [O I], flat, bool.

    Example:
        >>> sample_mask((4, 5), 0.3, torch.Generator().manual_seed(0)).view(4, 5).sum(1)
        tensor([2, 2, 1, 1])
    """
    out, inner = size
    least, more = divmod(max(1, round(ratio * out * inner)), out)
    mask = torch.zeros(out, inner, dtype=torch.bool, device="cpu")
    for begin in range(0, out, 512):
        batches = mask[begin : begin + 512]
        order = (
            torch.rand(batches.shape, generator=generator, dtype=torch.float32, device="cpu")
            .topk(min(least + 1, inner))
            .indices
        )
        longer = max(0, min(more - begin, len(batches)))
        batches[:longer].scatter_(1, order[:longer], True)
        batches[longer:].scatter_(1, order[longer:, :least], True)
    return mask.flatten()
