"""How WISE trains a side memory: rows and unrelated prompts up to the site once, then its values.

Legend: E memories trained side by side · R rows that are edited · U unrelated prompts per row · n
tokens of a prompt · K values of a memory · O, I of the map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from errata.functional import Batch, EditRecord, Inputs, Model, Query, optim, prefix, rows
from errata.functional.entries import Activation, GateStatistic
from errata.functional.errors import InvalidSettingsError, UnknownSiteError
from errata.functional.grouped import grouped_linear
from errata.functional.losses import nll
from errata.functional.masked import ACTIVATIONS, activation_distance, gate_statistic, gated_tokens
from errata.functional.stacks import mean_per_edit
from errata.functional.taps import record_activations

from .wise_merge import MergeMethod
from .wise_texts import UNRELATED_QUESTIONS, UNRELATED_TEXTS

__all__ = [
    "PreparedRows",
    "EditSite",
    "WiseConfig",
    "sample_mask",
    "edit_generator",
    "last_rows",
    "margin_terms",
    "wise_loss",
    "take_prepared",
    "prepare_rows",
    "resolve_edit_site",
    "concat_rows",
    "train_values",
]

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
OwnNegative = Literal["image", "question"]


class WiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="wise"):
    """Settings of WISE; the defaults are EasyEdit's where they do not depend on the model."""

    site: str = "mlp.down"  # a linear map of a layer
    layer: Annotated[float, msgspec.Meta(ge=0, lt=1)] | int = 0.8  # number, or share of the depth
    mask_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 1.0
    weight_decay: NonNegative = 1e-5
    num_steps: Count = 70
    norm_constraint: Positive | None = 1.0  # bound on |D|, per element
    alpha: NonNegative = 5.0  # unrelated prompts stay below it
    beta: NonNegative = 20.0  # edits rise above it
    gamma: NonNegative = 10.0  # and are as far apart
    act_ratio: Positive = 0.88  # of an edit's own activation: the threshold
    activation: Activation | Literal["auto"] = "auto"  # phi; "auto": the model's own
    gate_statistic: GateStatistic = "mean"
    unrelated_texts: tuple[str, ...] = ()  # unrelated prompts; (): the packaged ones
    unrelated_questions: tuple[str, ...] = ()  # of any picture; (): the packaged ones
    num_unrelated: Count = 4  # of each per edit
    own_negatives: tuple[
        OwnNegative, ...
    ] = ()  # questions about the edit's picture; its question without it
    stop_loss: NonNegative = 0.02  # an edit stops below it, once a step changes it by less than
    stop_improvement: NonNegative = 1e-4
    num_replayed: Annotated[int, msgspec.Meta(ge=0)] = 0  # earlier edits of a memory trained along
    save_freq: Count = 500  # edits of one memory
    merge_freq: Count = 1000  # edits after which full memories are merged into one
    merge_alg: MergeMethod = "ties"
    density: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.53  # of what a merge keeps
    mode: Literal["retrieve", "merge"] = "retrieve"  # merged memories stay apart, or become one
    append_eos: bool = True  # teach the end of the answer too, so that free generation stops there


class EditSite(NamedTuple):
    """The linear map with the memories, and how its outputs are compared."""

    path: str
    layer: int
    size: tuple[int, int]  # O, I
    transposed: bool
    activation: Activation

    @property
    def weight(self) -> str:
        return f"{self.path}.weight"


class PreparedRows(NamedTuple):
    """The edited rows before the site's layer, and what the site is given at prompts' tokens.

    Of each row's U + 1 prompts the first is its own.
    """

    batch: Batch  # R rows; `edit`: the memory that each trains
    inputs: Tensor  # [R U+1 n I]
    outputs: Tensor  # [R U+1 n O] of the map as it is
    token_mask: Tensor  # [R U+1 n] bool: those that count


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
    return PreparedRows(rows.concat_batches([earlier.batch, later.batch]), *parts)


def last_rows(ready: PreparedRows, count: int) -> PreparedRows | None:
    """The last rows, as many as are there; none of none."""
    if not count:
        return None
    return take_prepared(ready, slice(max(0, len(ready.inputs) - count), None))


def take_prepared(ready: PreparedRows, index: Tensor | slice) -> PreparedRows:
    """Some of the rows."""
    return PreparedRows(rows.take_rows(ready.batch, index), *(part[index] for part in ready[1:]))


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
    make_optimizer = optim.sgd if config.optimizer == "sgd" else optim.adam
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
            tensors = optim.clip_elements(tensors, config.norm_constraint)
    values = tensors["values"]
    with torch.no_grad():
        inside = loss_terms(maps(values), with_answers=False)[1]
    min_activations = torch.full((count,), torch.inf, device=initial_values.device)
    return values, min_activations.scatter_reduce(0, edit_index, inside, "amin")


def wise_loss(
    model: Model, site: EditSite, prepared: PreparedRows, config: WiseConfig
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """maps [E O I] -> rows' losses [R], activations [R], and those of unrelated prompts [R U]."""
    batch = prepared.batch
    count, length = batch.hidden_states.shape[:2]
    # EasyEdit edits by the mean, and takes the largest of long prompts when it answers only.
    statistic = "mean" if config.gate_statistic == "easyedit" else config.gate_statistic
    own_mask, own_prompts, unrelated_prompts = (
        gated_tokens(batch, statistic),
        _pack_prompts(prepared, 0),
        _pack_prompts(prepared, 1),
    )
    # Where the rows stand whole, their own prompts' tokens are among them: multiplied once.
    covers_own_prompt = own_mask.shape[1] == length and torch.equal(
        own_mask.sum(1), prepared.token_mask[:, 0].sum(1)
    )

    def activations(added: Tensor, prompts: _PackedPrompts) -> Tensor:
        token_distances = activation_distance(prompts.outputs, added, site.activation)
        padded_distances = token_distances.new_zeros(count, prompts.token_mask[0].numel()).scatter(
            1, prompts.token_index, token_distances
        )
        return gate_statistic(
            padded_distances.view(prompts.token_mask.shape), prompts.token_mask, statistic
        )

    def loss_terms(maps: Tensor, with_answers: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        gate_activations: list[Tensor] = []

        def hook(x: Tensor, y: Tensor) -> Tensor:
            inputs = x.reshape(count, length, -1).float()
            if covers_own_prompt:
                product = grouped_linear(
                    torch.cat([inputs, unrelated_prompts.inputs], 1), maps, batch.edit_index
                )
                added, unrelated_added = product[:, :length], product[:, length:]
                token_distances = activation_distance(
                    y.reshape(added.shape), added, site.activation
                )
                inside = gate_statistic(token_distances, own_mask, statistic)
                gate_activations.append(
                    torch.cat([inside[:, None], activations(unrelated_added, unrelated_prompts)], 1)
                )
            else:
                added = grouped_linear(inputs, maps, batch.edit_index)
            return (y + added.reshape(y.shape)).to(y.dtype)

        answer = None
        if with_answers:
            answer = nll(prefix.decode_scored(model, batch, {site.path: hook}), batch.labels)
        if not gate_activations:
            gate_activations.append(
                activations(grouped_linear(own_prompts.inputs, maps, batch.edit_index), own_prompts)
            )
        activations_per_prompt = gate_activations[0]  # [R U+1]
        return (
            activations_per_prompt[:, 0] if answer is None else answer,
            activations_per_prompt[:, 0],
            activations_per_prompt[:, 1:],
        )

    return loss_terms


class _PackedPrompts(NamedTuple):
    """Prompts of a row one behind the other, without the padding between them."""

    inputs: Tensor  # [R T I]
    outputs: Tensor  # [R T O]
    token_index: Tensor  # [R T] where each token stands among the P n of `tokens`
    token_mask: Tensor  # [R P n] bool


def _pack_prompts(prepared: PreparedRows, first: int) -> _PackedPrompts:
    """The prompts from `first` on."""
    token_mask = prepared.token_mask[:, first:]
    flat_mask = token_mask.flatten(1)
    token_index = (
        (~flat_mask).int().argsort(dim=1, stable=True)[:, : max(1, int(flat_mask.sum(1).max()))]
    )
    inputs, outputs = (
        part[:, first:]
        .flatten(1, 2)
        .gather(1, token_index[..., None].expand(*token_index.shape, part.shape[-1]))
        for part in (prepared.inputs, prepared.outputs)
    )
    return _PackedPrompts(inputs, outputs, token_index, token_mask)


def margin_terms(
    inside: Tensor, outside: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """The three terms that hold edits [... P] and unrelated prompts [... U] apart: [...].

        mean [out - in + gamma]_+ + mean [out - alpha]_+ + mean [beta - in]_+

    each a mean over its terms above zero, the first over all pairs (Wang et al. 2024, eq. 6).

    >>> margin_terms(torch.tensor([15.0]), torch.tensor([7.0, 4.0]), 5.0, 20.0, 10.0)
    tensor(9.)
    """
    pairs = (outside[..., None] - inside[..., None, :] + gamma).flatten(-2)
    return _mean_positive(pairs) + _mean_positive(outside - alpha) + _mean_positive(beta - inside)


def _mean_positive(values: Tensor) -> Tensor:
    """The mean over the last axis of what lies above zero; 0 where nothing does."""
    return values.clamp_min(0).sum(-1) / (values > 0).sum(-1).clamp_min(1)


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
        rows = mask[begin : begin + 512]
        order = torch.rand(rows.shape, generator=generator).topk(min(least + 1, inner)).indices
        longer = max(0, min(more - begin, len(rows)))
        rows[:longer].scatter_(1, order[:longer], True)
        rows[longer:].scatter_(1, order[longer:, :least], True)
    return mask.flatten()
