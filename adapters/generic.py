"""The generic path: a model whose parts were found by structure proves that cutting it is exact.

A cut forward must be the whole forward, at several depths, on real input; a later token must not
change an earlier one's logits (labels would leak into their own prediction); rows must not depend
on their neighbours or their padding. What fails is refused with what was measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from errata.functional import Batch, Inputs, Params, Query
from errata.functional.errors import ErrataError, ModelUnsupported
from errata.functional.rows import concat, earlier, later, pad, take

from .anatomy import HUGGING_FACE
from .family import Family
from .plan import Sizes
from .probe import tokens
from .skeleton import EXPLICIT, Skeletons
from .structure import text_config

__all__ = ["ATTENTIONS", "Proof", "arguments", "generic", "prove", "proven", "samples"]

ATTENTIONS = (EXPLICIT, "eager")
"""How the decoder may attend, in order of preference; eager for models with caps or sinks."""

_LENGTHS = Sizes(rows=3, query=9, keys=9)


class Proof(NamedTuple):
    """Largest differences of logits, in units of the largest logit of the whole forward."""

    attention: str
    whole: float  # whole decode against the module's own forward
    cut: float  # cut at 0, 1, middle, last against whole decode
    causal: float  # logits before a token that was changed
    company: float  # rows alone against rows padded and together
    thin: float | None  # thinned against whole; None where it can not be done
    past: float | None  # cut in time, and going on from a past, against whole; None likewise


def arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Ids, mask and pixels; token types where the forward takes them and nobody gave any."""
    kwargs: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": inputs.mask.long()}
    taken = inspect.signature(module.forward).parameters
    if "mm_token_type_ids" in taken and inputs.image.any():
        config: Any = module.config
        video = getattr(config, "video_token_id", None)
        kinds = inputs.image.int()
        kwargs["mm_token_type_ids"] = kinds + (inputs.ids == video).int() if video else kinds
    pixels = {name: value for name, value in inputs.pixels.items() if name != "labels"}
    return {**kwargs, **pixels}


def generic(model_type: str) -> Family:
    """The family of a model type that has no line of its own."""
    return Family(model_type, arguments=arguments, positions=None, explicit=False)


def proven(
    module: nn.Module, decoder: str, samples: Sequence[Inputs], make: Callable[[str], Any]
) -> Any:
    """The first of `make(attention)` that proves itself on every sample.

    Raises ModelUnsupported with what each attempt came to.
    """
    reasons = []
    for attention in ATTENTIONS:
        try:
            made = make(attention)
            made.proofs = tuple(prove(module, decoder, made, given) for given in samples)
            return made
        except ErrataError as error:
            reasons.append(str(error))
        except HUGGING_FACE as error:
            reasons.append(f"{type(module).__name__} fails when it is run ({_first_line(error)}).")
    raise ModelUnsupported(" ".join(dict.fromkeys(reasons)))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def samples(card: Any, module: nn.Module, read: Callable | None) -> list[Inputs]:
    """What to prove a model on: synthetic text, and a picture read by its processor if there is."""
    text = tokens(card, module, _LENGTHS)
    given = [text._replace(mask=_ragged(text.mask))]
    if read is not None and card.images:
        shade = Image.linear_gradient("L").resize((56, 56)).convert("RGB")
        given.append(read([Query("What is this?", "a shade", (shade,))]))
    return given


def prove(module: nn.Module, decoder: str, made: Any, given: Inputs) -> Proof:
    """Measure a decoder against its module on one input; raise ModelUnsupported if it is wrong."""
    params = {name: tensor.detach() for name, tensor in module.named_parameters()}
    with torch.no_grad():
        base = Skeletons(module, decoder, None).get()
        wanted = made.body.family.enter(base, made.body.arguments(base, given)[0]).logits
        batch = made.embed(params, given)
        whole = made.decode(params, batch, at="all")
        measure = _Measure(wanted, whole, given.mask, type(module).__name__)
        last = made.card.num_layers - 1
        proof = Proof(
            attention=made.attention_name,
            whole=measure.must("a cut forward must be the whole forward", whole, wanted),
            cut=max(_cut(made, params, batch, depth, measure) for depth in {0, 1, last // 2, last}),
            causal=_causal(made, params, given, whole, measure),
            company=_company(made, params, given, whole, measure),
            thin=_thin(made, params, batch, whole, measure),
            past=_past(made, params, batch, given.ids, whole, measure),
        )
    return proof


class _Measure(NamedTuple):
    wanted: Tensor
    whole: Tensor
    mask: Tensor
    name: str

    def difference(self, got: Tensor, want: Tensor, mask: Tensor | None = None) -> float:
        mask = self.mask if mask is None else mask
        apart = (got.float() - want.float())[mask].abs().max()
        return float(apart / self.wanted.float()[self.mask].abs().max())

    def bound(self) -> float:
        return 1e-4 if self.wanted.dtype in (torch.float32, torch.float64) else 5e-2

    def must(self, law: str, got: Tensor, want: Tensor, mask: Tensor | None = None) -> float:
        apart = self.difference(got, want, mask)
        if not apart <= self.bound():
            raise ModelUnsupported(
                f"{law}; for {self.name} logits differ by {apart:.1e} of the largest."
            )
        return apart


def _cut(made: Any, params: Params, batch: Batch, depth: int, measure: _Measure) -> float:
    half = made.decode(params, batch, stop=depth)
    got = made.decode(params, half, at="all")
    return measure.must(f"a cut at layer {depth} must change nothing", got, measure.whole)


def _causal(made: Any, params: Params, given: Inputs, whole: Tensor, measure: _Measure) -> float:
    """Change each row's last real token: what comes before must not notice."""
    last = given.mask.sum(1, keepdim=True) - 1
    other = given.ids.roll(1, 0) if len(given.ids) > 1 else given.ids.roll(1, 1)
    other = torch.where(given.image.gather(1, last), given.ids, other)
    changed = given.ids.scatter(1, last, other.gather(1, last))
    changed = torch.where(given.image.gather(1, last), given.ids, changed)
    got = made.decode(params, made.embed(params, given._replace(ids=changed)), at="all")
    before = given.mask.scatter(1, last, False)
    return measure.must("attention must be causal, or answers leak", got, whole, before)


def _company(made: Any, params: Params, given: Inputs, whole: Tensor, measure: _Measure) -> float:
    """Rows alone, of their own length, joined again in another order."""
    law = "rows must not depend on company or padding"
    if given.pixels:  # pixels are not by rows: only the padding can change
        batch = pad(made.embed(params, given), whole.shape[1] + 3)
        got = made.decode(params, batch, at="all")[:, : whole.shape[1]]
        return measure.must(law, got, whole)
    alone = []
    for row, real in enumerate(given.mask):
        cut = slice(0, int(real.sum()))
        ids, mask, image, labels, at = (value[row : row + 1] for value in given[:5])
        one = Inputs(ids, mask, image, labels, at)
        alone.append(
            made.embed(
                params,
                one._replace(ids=one.ids[:, cut], mask=one.mask[:, cut], image=one.image[:, cut]),
            )
        )
    order = torch.arange(len(alone) - 1, -1, -1)
    joined = made.decode(params, take(concat(alone), order), at="all")
    return measure.must(law, joined[order], whole)


def _thin(
    made: Any, params: Params, batch: Batch, whole: Tensor, measure: _Measure
) -> float | None:
    last = made.card.num_layers - 1
    at = torch.stack([torch.zeros_like(batch.mask[:, 0]).long(), batch.mask.sum(1) - 1], 1)
    half = made.decode(params, batch._replace(at=at, labels=torch.zeros_like(at)), stop=last)
    want = whole.gather(1, at[..., None].expand(-1, -1, whole.shape[-1]))
    everywhere = torch.ones_like(at, dtype=torch.bool)
    try:
        got = made.decode(params, made.thin(params, half))
    except (ErrataError, *HUGGING_FACE):
        made.no_thin("its last layer does not run with a saved attention")
    if made.unthinnable:
        return None
    apart = measure.difference(got, want, everywhere)
    if not apart <= measure.bound():
        made.no_thin(f"its last layer is not position-wise behind attention ({apart:.1e})")
        return None
    return apart


def _past(
    made: Any, params: Params, batch: Batch, ids: Tensor, whole: Tensor, measure: _Measure
) -> float | None:
    if made.body.plan.cached is None:
        return None
    if made.attention_name == "eager" and getattr(text_config(made.config), "sliding_window", None):
        made.no_past("its sliding window counts padding under its own attention")
        return None
    t = max(1, int(batch.mask.sum(1).min()) - 2)
    if batch.image[:, t:].any():
        return None
    try:
        _, past = made.decode(params, earlier(batch, t), keep=True)
        got = made.decode(params, later(batch, t), past=past, at="all")
        step = made.extend(params, ids[:, t:], past)
        grown = made.decode(params, step, past=past, at="all")
    except (ErrataError, *HUGGING_FACE) as error:
        made.no_past(f"it fails with keys and values of earlier tokens ({_first_line(error)})")
        return None
    keep = batch.mask[:, t:]
    apart = max(measure.difference(logits, whole[:, t:], keep) for logits in (got, grown))
    if not apart <= measure.bound():
        made.no_past(f"its layers do not go on exactly from keys and values ({apart:.1e})")
        return None
    return apart


def _ragged(mask: Tensor) -> Tensor:
    """Rows of different lengths, all at least half as long."""
    lengths = mask.shape[1] - torch.arange(len(mask), device=mask.device) % (mask.shape[1] // 2)
    return torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
