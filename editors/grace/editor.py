"""GRACE: a codebook of activations at one linear map; the weights do not change.

With q the map's input at the last token of the prompt, keys k_n, radii r_n and values v_n:

    n = argmin |k_n - q|;   the map's output there is v_n if |k_n - q| <= r_n

An edit adds its q as a key, unless a key of the same target is near enough to be expanded, and
trains its value to predict the target:

    min over v of mean_j -log p(x*_j | image, prompt, x*_<j ; v)

Sources: Hartvigsen et al. 2023 (arXiv 2211.11031), Thartvigsen/GRACE `grace/editors/grace.py`;
EasyEdit `models/grace/GRACE.py` for its settings on vision-language models. Different from both:

* Targets are compared by content. They compare the mean of the label row, padding of the prompt
  included, so that two answers can look equal and one answer can look like two.
* An edit whose key equals that of another target replaces it. There the radii become -1e-5 and 0
  and the first key wins the tie: neither edit acts any more.
* The key is read at each row's own last prompt token; EasyEdit reads it at the position where the
  *last edit* had its own, mostly another token.
* An expanded radius leaves room for rounding, so that another batch shape still matches the edit.

Cost of an edit: the rows once up to the site; tokens before the key once more, to cache their keys
and values; then `num_steps` forward and backward passes of the few tokens from the key on, through
the layers from the site on. Legend: B rows · E edits · N keys · I, O width of a key, of a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errata.editors.common.gradient_descent import DescentConfig, run_descent
from errata.editors.common.guards import guarded
from errata.editors.grace.codebook import Codebook, _pad_codebook, add_key
from errata.editors.grace.config import GraceConfig
from errata.functional import Batch, Delta, Editor, EditRecord, Header, KVCache, Model, Query
from errata.functional.deltas.records import make_header
from errata.functional.errors import InvalidSettingsError, UnsupportedModelError
from errata.functional.forward import batches, prefix
from errata.functional.forward.activations import record_activations
from errata.functional.forward.batches import mean_per_edit
from errata.functional.gradients.losses import nll
from errata.functional.kinds.codebook.apply import last_prompt_input, replace_at, replaced_tokens
from errata.functional.kinds.schema import Codebook as CodebookEntry

__all__ = ["GraceState", "grace_editor"]


class GraceState(NamedTuple):
    """State: the book, the edits so far, and the key of each."""

    codebook: Codebook
    edits: tuple[EditRecord, ...] = ()
    edit_slots: tuple[int, ...] = ()
    seed: int = 0  # of cold values


class PreparedRows(NamedTuple):
    """Rows before the site's layer, from the first prompt's end on, and what the site is given."""

    batch: Batch
    kv_cache: KVCache | None  # of the tokens before
    inputs: Tensor  # [B I] at each row's last prompt token
    outputs: Tensor  # [B O] there


class EditSite(NamedTuple):
    """The linear map with the codebook."""

    path: str
    layer: int

    @property
    def weight(self) -> str:
        return f"{self.path}.weight"


def grace_editor(config: GraceConfig = GraceConfig()) -> Editor:
    """GRACE as an editor: a `codebook` at one linear map.

    The state is the codebook. A sequence grows it, and `remove` takes edits out of the delta by id.
    Radii that a removed edit narrowed stay narrow.

    Args:
        config: The settings.

    Returns:
        The editor.

    Raises:
        UnknownSiteError: If the site is not in the model.
        InvalidSettingsError: If the value could not act on the answer.

    References:
        Hartvigsen et al. 2023, "Aging with GRACE", arXiv:2211.11031. An edit of the same question
        with another answer takes over its key; in the original the dead key wins the tie.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> editor = grace_editor(GraceConfig(num_steps=2))
        >>> state = editor.init(model, torch.Generator().manual_seed(0))
        >>> delta, state = editor.edit(model, state, [Query("who is it?", "bo")])
        >>> delta.header.entries[0].num_keys
        1
    """

    def init(model: Model, generator: torch.Generator) -> GraceState:
        return _init_state(model, config, generator)

    def edit(model: Model, state: GraceState, queries: Sequence[Query]):
        site = resolve_edit_site(model, config)
        prepared = prepare_rows(model, site, queries, config)
        codebook, edit_slots = state.codebook, state.edit_slots
        records = _make_header(model, config, queries, 1, (), (), 0).edits
        for row, record in enumerate(records):
            targets = codebook.targets
            codebook, key = _add_edit(codebook, prepared, row, record, state.seed, config)
            if key < len(targets) and targets[key] != record.target:  # taken over
                edit_slots = tuple(-1 if owner == key else owner for owner in edit_slots)
            edit_slots = (*edit_slots, key)
        new_slots = edit_slots[len(state.edit_slots) :]
        trained_keys = sorted(set(new_slots) - {-1})
        value_slots = [trained_keys.index(key) if key >= 0 else -1 for key in new_slots]
        values = codebook.values.clone()
        values[trained_keys] = train_values(
            model, site, prepared, value_slots, codebook.values[trained_keys], config
        )
        state = GraceState(
            codebook._replace(values=values), state.edits + records, edit_slots, state.seed
        )
        delta_header = _make_header(
            model,
            config,
            queries,
            len(codebook.targets),
            edit_slots,
            state.edits[: -len(records)],
            0,
        )
        return _make_delta(delta_header, [state.codebook]), state

    def edit_each(model: Model, state: GraceState, queries: Sequence[Query]) -> Delta:
        site = resolve_edit_site(model, config)
        prepared = prepare_rows(model, site, queries, config)
        records = _make_header(model, config, queries, 1, (), (), 0).edits
        extended = [
            _add_edit(state.codebook, prepared, row, record, state.seed, config)
            for row, record in enumerate(records)
        ]
        edit_slots = tuple(key for _, key in extended)
        initial_values = torch.stack([book.values[key] for book, key in extended])
        values = train_values(model, site, prepared, range(len(queries)), initial_values, config)
        longest = max(len(book.targets) for book, _ in extended)
        own_targets = state.codebook.targets
        replaced = [
            [n for n, slot in enumerate(state.edit_slots) if slot == key]
            if key < len(own_targets) and own_targets[key] != record.target
            else []
            for (_, key), record in zip(extended, records)
        ]
        codebooks = []
        for (codebook, key), value in zip(extended, values):
            edit_values = codebook.values.clone()
            edit_values[key] = value
            codebooks.append(_pad_codebook(codebook._replace(values=edit_values), longest))
        header = _make_header(
            model,
            config,
            queries,
            longest,
            edit_slots,
            state.edits,
            len(queries),
            state.edit_slots,
            replaced,
        )
        return _make_delta(header, codebooks)

    return guarded(Editor("grace", config, init, edit, edit_each))


def _init_state(model: Model, config: GraceConfig, generator: torch.Generator) -> GraceState:
    site = resolve_edit_site(model, config)
    weight = model.params[site.weight]
    out_dim, in_dim = model.card.linear_shapes[site.path]
    options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    codebook = Codebook(
        torch.zeros(0, in_dim, **options),
        torch.zeros(0, out_dim, **options),
        torch.zeros(0, **options),
        (),
    )
    return GraceState(
        codebook,
        seed=int(torch.randint(0, 2**62, (), generator=generator, dtype=torch.int64, device="cpu")),
    )


def _make_header(
    model: Model,
    config: GraceConfig,
    queries: Sequence[Query],
    num_keys: int,
    edit_slots: tuple[int, ...],
    earlier: tuple[EditRecord, ...],
    stack: int,
    shared_slots: tuple[int, ...] = (),
    replaced_edits: Sequence[Sequence[int]] = (),
) -> Header:
    site = resolve_edit_site(model, config)
    entry = CodebookEntry(
        name=site.weight,
        checkpoint_name=model.card.checkpoint_name(site.weight),
        shape=tuple(model.params[site.weight].shape),
        num_keys=num_keys,
        edit_slots=edit_slots,
        shared_slots=shared_slots,
        replacement=config.replacement,
        transposed=site.path in model.card.transposed,
    )
    return make_header(
        model,
        "grace",
        config,
        (entry,),
        queries,
        earlier_edits=earlier,
        stack=stack,
        replaced_edits=replaced_edits,
    )


def resolve_edit_site(model: Model, config: GraceConfig) -> EditSite:
    """Find the linear map that the settings name.

    A fraction of the depth leaves two layers above the site: later tokens of an answer see the
    value only through the attention of layers above, and one layer is too few for answers of
    several tokens (reliability 87 there, 99 with two, on the micro models).

    Args:
        model: Model to edit.
        config: Settings.

    Returns:
        Path and layer of the map.

    Raises:
        InvalidSettingsError: If `replacement="prompt"` is asked of the last layer.
    """
    count, layer = model.card.num_layers, config.layer
    if isinstance(layer, float):
        layer = max(0, min(int(count * layer), count - 3))
    path = model.card.resolve_linear(f"layers.{layer}.{config.site}")
    number = model.card.layer_of(path)
    assert number is not None
    if config.replacement == "prompt" and number == count - 1:
        raise InvalidSettingsError(
            'replacement="prompt" replaces tokens before the one that predicts the answer, which see '  # noqa: E501
            f"nothing of each other after layer {number - 1}: choose a lower layer or another "
            "`replacement`."
        )
    return EditSite(path, number)


def prepare_rows(
    model: Model, site: EditSite, queries: Sequence[Query], config: GraceConfig
) -> PreparedRows:
    """Run the edits' rows up to the site's layer once, before the optimisation.

    Args:
        model: Model to edit.
        site: The map to edit.
        queries: Edits.
        config: Settings.

    Returns:
        The batch at the site, its cached keys and values, and the map's inputs and outputs.
    """
    inputs = (
        model.preprocess(queries, append_eos=True)
        if config.append_eos
        else model.preprocess(queries)
    )
    batch = prefix.run_prefix(model, inputs, prefix.edit_depth(model.card, [site.weight]))
    assert isinstance(batch, Batch)
    kv_cache = None
    is_scored_only = batch.hidden_states.shape[1] != inputs.input_ids.shape[1]
    with torch.no_grad():
        if config.replacement == "last" and not is_scored_only:
            batch, kv_cache = _cut_at_prompt_end(model, batch)
        stop = site.layer + 1
        _, activations = record_activations(
            model.decode, model.params, batch, [site.path], stop=stop, kv_cache=kv_cache
        )
    site_activation = activations[site.path]
    return PreparedRows(
        batch,
        kv_cache,
        last_prompt_input(batch, site_activation.input).float(),
        last_prompt_input(batch, site_activation.output).float(),
    )


def train_values(
    model: Model,
    site: EditSite,
    prepared: PreparedRows,
    value_slots: Sequence[int],
    initial_values: Tensor,
    config: GraceConfig,
) -> Tensor:
    """Optimise the values until each row predicts its target.

    Args:
        model: Model to edit.
        site: The map to edit.
        prepared: Rows from `prepare_rows`.
        value_slots: The value of each row, -1 for none.
        initial_values: [S O].
        config: Settings.

    Returns:
        [S O].
    """
    batch = prepared.batch
    row_slots = torch.tensor(
        list(value_slots), device=initial_values.device, dtype=torch.int64
    )  # [B]
    replaced_mask = replaced_tokens(batch, config.replacement)

    def loss(tensors):
        row_values = tensors["values"][row_slots.clamp_min(0)]  # [B O]
        hooks = {site.path: lambda x, y: replace_at(y, row_values, replaced_mask)}
        logits = model.decode(model.params, batch, hooks, kv_cache=prepared.kv_cache)
        edit_losses = mean_per_edit(nll(logits, batch.labels), row_slots, initial_values.shape[0])
        return edit_losses.sum(), edit_losses.detach()

    descent_config = DescentConfig(
        optimizer="adam", lr=config.lr, num_steps=config.num_steps, stop_loss=config.stop_loss
    )
    return run_descent(
        torch.func.grad(loss, has_aux=True), {"values": initial_values}, descent_config, None
    )["values"]


def _cut_at_prompt_end(model: Model, batch: Batch) -> tuple[Batch, KVCache | None]:
    """The tokens from the earliest prompt's end on, and the keys and values of those before."""
    first = int(batch.prompt_end.int().argmax(1).min())
    if first == 0:
        return batch, None
    before = batches.tokens_before(batch, first)
    try:
        _, kv_cache = model.decode(
            model.params, before, logit_positions=before.logit_positions[:, :1], return_cache=True
        )
    except (
        UnsupportedModelError
    ):  # a family whose layers take no cache of ours: whole rows in each step
        return batch, None
    return batches.tokens_from(batch, first), kv_cache


def _add_edit(
    codebook: Codebook,
    prepared: PreparedRows,
    row: int,
    record: EditRecord,
    seed: int,
    config: GraceConfig,
) -> tuple[Codebook, int]:
    value = prepared.outputs[row]
    if config.value_init == "cold":
        # Drawn by the edit's own name: the same in any order and in any company.
        edit_digest = hashlib.sha256(f"{seed} {record.id}".encode()).digest()[:8]
        edit_generator = torch.Generator().manual_seed(int.from_bytes(edit_digest, "little") >> 1)
        value = torch.rand(
            value.shape, generator=edit_generator, dtype=torch.float32, device="cpu"
        ).to(value.device)
    noise = 4 * torch.finfo(prepared.batch.hidden_states.dtype).eps
    return add_key(codebook, prepared.inputs[row], value, record.target, config.radius, noise)


def _make_delta(header, codebooks: Sequence[Codebook]) -> Delta:
    parts = ("keys", "values", "radii")
    name = header.entries[0].name
    stacked = {part: torch.stack([getattr(book, part) for book in codebooks]) for part in parts}
    tensors = {f"{name}.{p}": x if header.stack else x[0] for p, x in stacked.items()}
    return Delta(header, tensors)
