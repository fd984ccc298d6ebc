"""The generic path: a model whose parts were found by structure proves that cutting it is exact.

A cut forward must be the whole forward, at several depths, on real input; a later token must not
change an earlier one's logits (labels would leak into their own prediction); rows must not depend
on their neighbours or their padding. What fails is refused with what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from errata.adapters.hf.attention import EXPLICIT_ATTENTION
from errata.adapters.hf.layout import ProbeShape
from errata.adapters.hf.replicas import ThreadReplicas
from errata.adapters.hf.runner import HF_ERRORS
from errata.adapters.hf.structure import decoder_path as find_decoder
from errata.adapters.hf.structure import text_config
from errata.adapters.hf.synthetic_inputs import synthetic_tokens
from errata.functional import Batch, Inputs, Params, Query
from errata.functional.errors import ErrataError, UnsupportedModelError
from errata.functional.forward.batches import (
    concat_batches,
    pad_batch,
    take_rows,
    tokens_before,
    tokens_from,
)

__all__ = [
    "ATTENTIONS",
    "VerificationReport",
    "first_verified",
    "require_same_forward",
    "sample_inputs",
    "verify",
]

ATTENTIONS = (EXPLICIT_ATTENTION, "eager")
"""How the decoder may attend, in order of preference; eager for models with caps or sinks."""

_SAMPLE_SHAPE = ProbeShape(num_rows=3, query_length=9, key_length=9)


class VerificationReport(NamedTuple):
    """Largest differences of logits, in units of the largest logit of the whole forward."""

    attention: str
    full_forward: float  # whole decode against the module's own forward
    layer_cut: float  # cut at 0, 1, middle, last against whole decode
    causality: float  # logits before a token that was changed
    batch_invariance: float  # rows alone against rows padded and together
    scored_only: float | None  # thinned against whole; None where it cannot be done
    kv_cache: float | None  # cut in time, and going on from a past, against whole; None likewise


def first_verified(
    module: nn.Module,
    decoder_path: str,
    inputs: Sequence[Inputs],
    make_decoder: Callable[[str], Any],
) -> Any:
    """The first decoder, over attention implementations, that is verified on every input.

    Args:
        module: The model.
        decoder_path: Path of its decoder.
        inputs: Inputs to verify on.
        make_decoder: Makes a decoder with a given attention implementation.

    Returns:
        The decoder.

    Raises:
        UnsupportedModelError: With the reason of each attempt.
    """
    reasons = []
    for attention in ATTENTIONS:
        try:
            decoder = make_decoder(attention)
            decoder.verification = tuple(
                verify(module, decoder_path, decoder, given) for given in inputs
            )
            return decoder
        except ErrataError as error:
            reasons.append(str(error))
        except HF_ERRORS as error:
            reasons.append(f"{type(module).__name__} fails when it is run ({_first_line(error)}).")
    raise UnsupportedModelError(" ".join(dict.fromkeys(reasons)))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def sample_inputs(card: Any, module: nn.Module, preprocess: Callable | None) -> list[Inputs]:
    """Inputs to verify a model on: synthetic text, and an image if the model has a processor.

    Args:
        card: The model's card.
        module: The model.
        preprocess: Turns queries into inputs, or None.

    Returns:
        Inputs.
    """
    text = synthetic_tokens(card, module, _SAMPLE_SHAPE)
    inputs = [text._replace(attention_mask=_vary_lengths(text.attention_mask))]
    if preprocess is not None and card.takes_images:
        gradient = Image.linear_gradient("L").resize((56, 56)).convert("RGB")
        inputs.append(preprocess([Query("What is this?", "a shade", (gradient,))]))
    return inputs


def verify(
    module: nn.Module, decoder_path: str, decoder: Any, inputs: Inputs
) -> VerificationReport:
    """Compare a decoder with its module on one input.

    Args:
        module: The model.
        decoder_path: Path of its decoder.
        decoder: The functional decoder.
        inputs: The input.

    Returns:
        Largest differences of each comparison.

    Raises:
        UnsupportedModelError: If one is too large.
    """
    params = {name: tensor.detach() for name, tensor in module.named_parameters()}
    with torch.no_grad():
        comparison, batch = _run_both(module, decoder_path, decoder, params, inputs)
        reference, full_logits = comparison.reference, comparison.full_logits
        last = decoder.card.num_layers - 1
        report = VerificationReport(
            attention=decoder.attention_name,
            full_forward=comparison.require_equal(
                "a cut forward must be the whole forward", full_logits, reference
            ),
            layer_cut=max(
                _measure_layer_cut(decoder, params, batch, depth, comparison)
                for depth in {0, 1, last // 2, last}
            ),
            causality=_measure_causality(decoder, params, inputs, full_logits, comparison),
            batch_invariance=_measure_batch_invariance(
                decoder, params, inputs, full_logits, comparison
            ),
            scored_only=_measure_scored_only(decoder, params, batch, full_logits, comparison),
            kv_cache=_measure_kv_cache(
                decoder, params, batch, inputs.input_ids, full_logits, comparison
            ),
        )
    return report


def require_same_forward(module: nn.Module, decoder: Any, inputs: Inputs) -> float:
    """Require that a decoder gives the logits of its module's own forward. Two forwards.

    Args:
        module: The model.
        decoder: The functional decoder.
        inputs: The input.

    Returns:
        The largest difference, in units of the largest logit.

    Raises:
        UnsupportedModelError: If it is too large.
    """
    params = {name: tensor.detach() for name, tensor in module.named_parameters()}
    with torch.no_grad():
        comparison, _ = _run_both(module, find_decoder(module), decoder, params, inputs)
    return comparison.require_equal(
        "a cut forward must be the whole forward", comparison.full_logits, comparison.reference
    )


def _run_both(
    module: nn.Module, decoder_path: str, decoder: Any, params: Params, inputs: Inputs
) -> tuple[_LogitComparison, Batch]:
    """Hugging Face's own forward and the decoder's."""
    replica = ThreadReplicas(module, decoder_path, None).get()
    reference = decoder.runner.family.enter(
        replica, decoder.runner.forward_arguments(replica, inputs)[0]
    ).logits
    batch = decoder.embed(params, inputs)
    full_logits = decoder.decode(params, batch, logit_positions="all")
    comparison = _LogitComparison(
        reference, full_logits, inputs.attention_mask, type(module).__name__
    )
    return comparison, batch


class _LogitComparison(NamedTuple):
    reference: Tensor
    full_logits: Tensor
    attention_mask: Tensor
    module_name: str

    def difference(self, actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
        mask = self.attention_mask if mask is None else mask
        max_difference = (actual.float() - expected.float())[mask].abs().max()
        return float(max_difference / self.reference.float()[self.attention_mask].abs().max())

    def tolerance(self) -> float:
        return 1e-4 if self.reference.dtype in (torch.float32, torch.float64) else 5e-2

    def require_equal(
        self, rule: str, actual: Tensor, expected: Tensor, mask: Tensor | None = None
    ) -> float:
        difference = self.difference(actual, expected, mask)
        if not difference <= self.tolerance():
            raise UnsupportedModelError(
                f"{rule}; for {self.module_name} logits differ by {difference:.1e} of the largest."
            )
        return difference


def _measure_layer_cut(
    decoder: Any, params: Params, batch: Batch, depth: int, comparison: _LogitComparison
) -> float:
    prefix = decoder.decode(params, batch, stop=depth)
    actual = decoder.decode(params, prefix, logit_positions="all")
    return comparison.require_equal(
        f"a cut at layer {depth} must change nothing", actual, comparison.full_logits
    )


def _measure_causality(
    decoder: Any, params: Params, inputs: Inputs, full_logits: Tensor, comparison: _LogitComparison
) -> float:
    """Change each row's last real token: what comes before must not notice."""
    last = inputs.attention_mask.sum(1, keepdim=True) - 1
    other_ids = (
        inputs.input_ids.roll(1, 0) if len(inputs.input_ids) > 1 else inputs.input_ids.roll(1, 1)
    )
    other_ids = torch.where(inputs.image_mask.gather(1, last), inputs.input_ids, other_ids)
    changed_ids = inputs.input_ids.scatter(1, last, other_ids.gather(1, last))
    changed_ids = torch.where(inputs.image_mask.gather(1, last), inputs.input_ids, changed_ids)
    actual = decoder.decode(
        params, decoder.embed(params, inputs._replace(input_ids=changed_ids)), logit_positions="all"
    )
    earlier_mask = inputs.attention_mask.scatter(1, last, False)
    return comparison.require_equal(
        "attention must be causal, or answers leak", actual, full_logits, earlier_mask
    )


def _measure_batch_invariance(
    decoder: Any, params: Params, inputs: Inputs, full_logits: Tensor, comparison: _LogitComparison
) -> float:
    """Rows alone, of their own length, joined again in another order."""
    rule = "rows must not depend on company or padding"
    if inputs.vision_inputs:  # pixels are not by rows: only the padding can change
        batch = pad_batch(decoder.embed(params, inputs), full_logits.shape[1] + 3)
        actual = decoder.decode(params, batch, logit_positions="all")[:, : full_logits.shape[1]]
        return comparison.require_equal(rule, actual, full_logits)
    single_rows = []
    for row, real in enumerate(inputs.attention_mask):
        token_slice = slice(0, int(real.sum()))
        input_ids, attention_mask, image_mask, labels, logit_positions = (
            value[row : row + 1] for value in inputs[:5]
        )
        row_inputs = Inputs(input_ids, attention_mask, image_mask, labels, logit_positions)
        single_rows.append(
            decoder.embed(
                params,
                row_inputs._replace(
                    input_ids=row_inputs.input_ids[:, token_slice],
                    attention_mask=row_inputs.attention_mask[:, token_slice],
                    image_mask=row_inputs.image_mask[:, token_slice],
                ),
            )
        )
    order = torch.arange(len(single_rows) - 1, -1, -1, dtype=torch.int64, device="cpu")
    reordered = decoder.decode(
        params, take_rows(concat_batches(single_rows), order), logit_positions="all"
    )
    return comparison.require_equal(rule, reordered[order], full_logits)


def _measure_scored_only(
    decoder: Any, params: Params, batch: Batch, full_logits: Tensor, comparison: _LogitComparison
) -> float | None:
    last = decoder.card.num_layers - 1
    logit_positions = torch.stack(
        [torch.zeros_like(batch.attention_mask[:, 0]).long(), batch.attention_mask.sum(1) - 1], 1
    )
    prefix = decoder.decode(
        params,
        batch._replace(logit_positions=logit_positions, labels=torch.zeros_like(logit_positions)),
        stop=last,
    )
    expected = full_logits.gather(
        1, logit_positions[..., None].expand(-1, -1, full_logits.shape[-1])
    )
    all_positions = torch.ones_like(logit_positions, dtype=torch.bool)
    try:
        actual = decoder.decode(params, decoder.select_scored(params, prefix))
    except (ErrataError, *HF_ERRORS):
        decoder.disable_select_scored("its last layer does not run with a saved attention")
    if decoder.select_refusal:
        return None
    difference = comparison.difference(actual, expected, all_positions)
    if not difference <= comparison.tolerance():
        decoder.disable_select_scored(
            f"its last layer is not position-wise after attention ({difference:.1e})"
        )
        return None
    return difference


def _measure_kv_cache(
    decoder: Any,
    params: Params,
    batch: Batch,
    input_ids: Tensor,
    full_logits: Tensor,
    comparison: _LogitComparison,
) -> float | None:
    if decoder.runner.layout.cached_templates is None:
        return None
    if decoder.attention_name == "eager" and getattr(
        text_config(decoder.config), "sliding_window", None
    ):
        decoder.disable_cache("its sliding window counts padding under its own attention")
        return None
    t = max(1, int(batch.attention_mask.sum(1).min()) - 2)
    if batch.image_mask[:, t:].any():
        return None
    try:
        _, kv_cache = decoder.decode(params, tokens_before(batch, t), return_cache=True)
        actual = decoder.decode(
            params, tokens_from(batch, t), kv_cache=kv_cache, logit_positions="all"
        )
        next_batch = decoder.embed_next(params, input_ids[:, t:], kv_cache)
        next_logits = decoder.decode(params, next_batch, kv_cache=kv_cache, logit_positions="all")
    except (ErrataError, *HF_ERRORS) as error:
        decoder.disable_cache(
            f"it fails with keys and values of earlier tokens ({_first_line(error)})"
        )
        return None
    later_mask = batch.attention_mask[:, t:]
    difference = max(
        comparison.difference(logits, full_logits[:, t:], later_mask)
        for logits in (actual, next_logits)
    )
    if not difference <= comparison.tolerance():
        decoder.disable_cache(
            f"its layers do not continue exactly from cached keys and values ({difference:.1e})"
        )
        return None
    return difference


def _vary_lengths(mask: Tensor) -> Tensor:
    """Rows of different lengths, all at least half as long."""
    lengths = mask.shape[1] - torch.arange(len(mask), device=mask.device, dtype=torch.int64) % (
        mask.shape[1] // 2
    )
    return torch.arange(mask.shape[1], device=mask.device, dtype=torch.int64) < lengths[:, None]
