"""One implementation of embed, decode, select_scored and embed_next for every decoder.

embed runs the module's own forward with the decoder's layers intercepted: the layers do not run,
but their arguments are recorded. decode then calls the layers itself, with the given parameters.
No family has code here: the differences are data (`adapters/families/table.py`) and what the probe
finds.
"""

from __future__ import annotations

from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from errata.adapters.families.base import Family
from errata.adapters.hf.attention import EXPLICIT_ATTENTION
from errata.adapters.hf.capture import run_until
from errata.adapters.hf.kv_cache import FunctionalKVCache
from errata.adapters.hf.layout import ATTENTION_OUTPUT
from errata.adapters.hf.runner import ModuleRunner
from errata.adapters.hf.verification import VerificationReport
from errata.adapters.hf.vision_cache import VisionFeatureCache
from errata.functional import IGNORE_INDEX, Batch, Hooks, Inputs, KVCache, ModelCard, Params
from errata.functional.errors import ShapeError, UnsupportedModelError
from errata.functional.forward.batches import gather_tokens, prompt_end_mask
from errata.functional.forward.hooks import forward_hooks
from errata.functional.forward.spans import spanned

__all__ = ["FunctionalDecoder"]


class FunctionalDecoder:
    """The functions of a `Model`, over what is known about one module.

    Nothing in it changes once it is built (and, on the generic path, proven) but the skeletons,
    of which each thread has its own.
    """

    def __init__(
        self, card: ModelCard, module: Any, family: Family, attention: str = EXPLICIT_ATTENTION
    ) -> None:
        self.runner = ModuleRunner(card, module, family, attention)
        self.attention_name = attention
        self.config = module.config
        self.select_refusal = ""  # why the last layer cannot run on scored positions only
        self.verification: tuple[VerificationReport, ...] = ()
        first = self.runner.tail[0]
        is_norm = "norm" in type(module.get_submodule(first)).__name__.lower()
        self.card = replace(card, norm=first) if is_norm and not card.norm else card

    # The four functions of a model.

    @spanned("images and embedding")
    def embed(
        self,
        params: Params,
        inputs: Inputs,
        hooks: Hooks | None = None,
        edit_index: Tensor | None = None,
        *,
        vision_cache: VisionFeatureCache | None = None,
    ) -> Batch:
        """Run vision tower, projector and token embeddings.

        Args:
            params: Parameters by name.
            inputs: Preprocessed rows.
            hooks: Hooks on outputs of modules, by path.
            edit_index: The edit of a stacked delta each row runs under, [B].
            vision_cache: Cache of image features.

        Returns:
            The batch at depth 0.
        """
        replica = self.runner.replica()
        captured, position_ids, inputs = self.runner.capture_inputs(
            replica, params, inputs, hooks, vision_cache
        )
        return Batch(
            hidden_states=captured.hidden_states,
            attention_mask=inputs.attention_mask,
            position_ids=position_ids,
            image_mask=inputs.image_mask,
            prompt_end=prompt_end_mask(inputs),
            labels=inputs.labels,
            logit_positions=inputs.logit_positions,
            edit_index=torch.zeros_like(inputs.input_ids[:, 0])
            if edit_index is None
            else edit_index,
            layer_inputs=self.runner.layout.pack(captured),
        )

    def decode(
        self,
        params: Params,
        batch: Batch,
        hooks: Hooks | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
        logit_positions: Tensor | str | None = None,
        kv_cache: KVCache | None = None,
        return_cache: bool = False,
    ) -> Any:
        """Run layers from `batch.depth` up to `stop`; see `Model`.

        Args:
            params: Parameters by name.
            batch: Rows at some depth.
            hooks: Hooks on outputs of modules, by path.
            start: The batch's depth, if it is to be checked.
            stop: First layer not to run. None: run to the logits.
            logit_positions: Positions [B T] to give logits at; "all" for every position. None: the
                batch's.
            kv_cache: Cached keys and values of the layers that are run, or of all.
            return_cache: Whether to return the keys and values of the layers that were run.

        Returns:
            The batch at depth `stop`, or logits [B T V]; with the cache if asked for.

        Raises:
            ShapeError: If `start` is not the batch's depth, or the cache holds other layers.
        """
        card = self.card
        stop = card.num_layers if stop is None else stop
        if start not in (None, batch.depth) or not batch.depth <= stop <= card.num_layers:
            raise ShapeError(
                f"decode continues from the batch's depth {batch.depth} to at most layer "
                f"{card.num_layers}; asked for start={start}, stop={stop}."
            )
        scored_only = ATTENTION_OUTPUT in batch.layer_inputs
        replica = self.runner.replica()
        hf_cache = (
            self._make_hf_cache(kv_cache, batch, stop)
            if kv_cache is not None or return_cache
            else None
        )
        hidden_states = batch.hidden_states
        with forward_hooks(replica, self.runner.decoder_hooks(hooks or {}, scored_only)):
            for number in range(batch.depth, stop):
                if hf_cache is not None and kv_cache is not None:
                    hf_cache.past_states = _layer_cache(
                        kv_cache, number, batch.depth, card.num_layers
                    )
                hidden_states = self.runner.run_layer(
                    replica, params, number, hidden_states, batch.layer_inputs, hf_cache
                )
            if stop < card.num_layers:
                result = batch._replace(hidden_states=hidden_states, depth=stop)
            else:
                if not isinstance(logit_positions, str):
                    hidden_states = _gather_positions(
                        hidden_states,
                        batch.logit_positions if logit_positions is None else logit_positions,
                    )
                result = self.runner.run_head(replica, params, hidden_states)
        return (
            (result, _make_kv_cache(hf_cache, batch, kv_cache))
            if return_cache and hf_cache is not None
            else result
        )

    def select_scored(
        self,
        params: Params,
        batch: Batch,
        hooks: Hooks | None = None,
        *,
        kv_cache: KVCache | None = None,
    ) -> Batch:
        """Run the last layer's attention on whole rows and keep the scored positions; see `Model`.

        A model whose last layer cannot run that way returns the batch unchanged; `select_refusal`
        says why.

        Args:
            params: Parameters by name.
            batch: Rows before the last layer.
            hooks: Hooks on outputs of modules, by path.
            kv_cache: Cached keys and values.

        Returns:
            The batch at scored positions.

        Raises:
            ShapeError: If the batch is not before the last layer.
        """
        last = self.card.num_layers - 1
        if batch.depth != last or ATTENTION_OUTPUT in batch.layer_inputs:
            raise ShapeError(
                f"select_scored takes a whole batch before the last layer, at depth {last}; got "
                "one at "
                f"depth {batch.depth}: decode(params, batch, stop={last}) first."
            )
        if not self.runner.attention_paths[last]:
            self.disable_select_scored("its last layer has no one self-attention")
        if self.select_refusal:
            return batch  # more positions than needed, and the same logits
        replica = self.runner.replica()
        hf_cache = None if kv_cache is None else self._make_hf_cache(kv_cache, batch, last + 1)
        if hf_cache is not None and kv_cache is not None:
            hf_cache.past_states = _layer_cache(kv_cache, last, last, self.card.num_layers)
        attention_path = f"{self.card.layers}.{last}.{self.runner.attention_paths[last]}"
        last_layer_hooks = {
            path: rewrite
            for path, rewrite in self.runner.decoder_hooks(hooks or {}, False).items()
            if path.startswith(f"{self.card.layers}.{last}.")
        }
        with forward_hooks(replica, last_layer_hooks):
            attention_output = run_until(
                replica.get_submodule(attention_path),
                lambda: self.runner.run_layer(
                    replica, params, last, batch.hidden_states, batch.layer_inputs, hf_cache
                ),
            )
        selected = gather_tokens(batch, batch.logit_positions)
        logit_positions = torch.arange(
            batch.logit_positions.shape[1], device=batch.logit_positions.device, dtype=torch.int64
        ).expand_as(batch.logit_positions)
        return selected._replace(
            logit_positions=logit_positions,
            layer_inputs={
                **selected.layer_inputs,
                ATTENTION_OUTPUT: _gather_positions(attention_output, batch.logit_positions),
            },
        )

    def embed_next(
        self,
        params: Params,
        input_ids: Tensor,
        kv_cache: KVCache,
        hooks: Hooks | None = None,
        edit_index: Tensor | None = None,
    ) -> Batch:
        """Embed new tokens that follow cached ones.

        Args:
            params: Parameters by name.
            input_ids: New token ids, [B n].
            kv_cache: Keys and values of the earlier tokens.
            hooks: Hooks on outputs of modules, by path.
            edit_index: The edit of a stacked delta each row runs under, [B].

        Returns:
            The batch at depth 0, scored at its last token.

        Raises:
            UnsupportedModelError: If the model cannot continue from cached keys and values.
        """
        if self.runner.layout.cached_templates is None:
            raise UnsupportedModelError(
                f"{self.card.id} cannot continue from cached keys and values: "
                f"{self.runner.layout.cache_refusal}."
            )
        replica = self.runner.replica()
        captured, position_ids, attention_mask = self.runner.capture_next_inputs(
            replica, params, input_ids, kv_cache, hooks
        )
        last = torch.full_like(input_ids[:, :1], input_ids.shape[1] - 1)
        return Batch(
            hidden_states=captured.hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            image_mask=torch.zeros_like(attention_mask),
            prompt_end=torch.zeros_like(attention_mask),
            labels=torch.full_like(last, IGNORE_INDEX),
            logit_positions=last,
            edit_index=torch.zeros_like(input_ids[:, 0]) if edit_index is None else edit_index,
            layer_inputs=self.runner.layout.pack(captured),
            routing=kv_cache.routing,
        )

    def disable_select_scored(self, reason: str) -> None:
        """Leave batches whole in `select_scored` from now on."""
        self.select_refusal = reason

    def disable_cache(self, reason: str) -> None:
        """Refuse caches of keys and values from now on."""
        self.runner.layout = self.runner.layout._replace(
            cached_templates=None, cache_refusal=reason
        )

    def _make_hf_cache(
        self, kv_cache: KVCache | None, batch: Batch, stop: int
    ) -> FunctionalKVCache:
        if self.runner.layout.cached_templates is None:
            raise UnsupportedModelError(
                f"{self.card.id} keeps no keys and values: {self.runner.layout.cache_refusal}."
            )
        if ATTENTION_OUTPUT in batch.layer_inputs:
            raise ShapeError("a batch of scored positions has no keys and values to cache.")
        if kv_cache is None:
            return FunctionalKVCache(self.card.num_layers)
        accepted_lengths = {
            stop - batch.depth,
            self.card.num_layers - batch.depth,
            self.card.num_layers,
        }
        if len(kv_cache.keys) not in accepted_lengths:
            raise ShapeError(
                f"a past must hold the layers {batch.depth} to {stop} that are run, or all "
                f"{self.card.num_layers}; it holds {len(kv_cache.keys)}."
            )
        return FunctionalKVCache(self.card.num_layers, kv_cache.attention_mask.shape[1])


def _gather_positions(hidden_states: Tensor, logit_positions: Tensor) -> Tensor:
    index = logit_positions[..., None].expand(*logit_positions.shape, hidden_states.shape[-1])
    return hidden_states.gather(1, index)


def _layer_cache(
    kv_cache: KVCache, number: int, depth: int, num_layers: int
) -> tuple[Tensor, Tensor]:
    index = number if len(kv_cache.keys) == num_layers else number - depth
    return kv_cache.keys[index], kv_cache.values[index]


def _make_kv_cache(hf_cache: FunctionalKVCache, batch: Batch, kv_cache: KVCache | None) -> KVCache:
    """Keys and values of a decode and what came before it; `next` is one past the last position."""
    last = (
        batch.position_ids.masked_fill(~batch.attention_mask[:, None], -1).amax((1, 2))[:, None] + 1
    )
    next_position = last.expand(-1, batch.position_ids.shape[1])
    if kv_cache is not None:
        next_position = torch.maximum(next_position, kv_cache.next_position)
    attention_mask = (
        batch.attention_mask
        if kv_cache is None
        else torch.cat([kv_cache.attention_mask, batch.attention_mask], 1)
    )
    return KVCache(
        tuple(keys for keys, _ in hf_cache.layer_states),
        tuple(values for _, values in hf_cache.layer_states),
        attention_mask,
        next_position,
        batch.routing,
    )
