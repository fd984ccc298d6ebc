"""`functionalize(module, ...) -> Model`; `cache_vision_features`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from errata.adapters.families.base import Family
from errata.adapters.families.table import family_of
from errata.adapters.hf.config_check import check_config
from errata.adapters.hf.decoder import FunctionalDecoder
from errata.adapters.hf.structure import decoder_path
from errata.adapters.hf.verification import first_verified, require_same_forward, sample_inputs
from errata.functional import Inputs, Model, ModelCard
from errata.functional.errors import UnsupportedModelError, join_messages
from errata.functional.types import Detokenize, Preprocess

__all__ = ["cache_vision_features", "functionalize"]


def functionalize(
    card: ModelCard,
    module: Any,
    preprocess: Preprocess,
    detokenize: Detokenize,
    family: Family | None = None,
    verification_inputs: Sequence[Inputs] = (),
    verify: bool = True,
) -> Model:
    """Turn a Hugging Face module into pure functions of its parameters.

    The module is never written to, and its parameters are shared, not copied. The arguments of its
    layers are found by two probes of a few tokens, in which one layer of each class runs. A family
    that is analysed by structure is then verified on real inputs.

    Args:
        card: The model's card.
        module: The module, in eval mode.
        preprocess: Turns queries into inputs.
        detokenize: Turns ids into text.
        family: The family's record. None: that of `card.family`.
        verification_inputs: Inputs to verify on. None: synthetic ones.
        verify: Whether a known family whose config has unknown attributes must prove that its
            forward is Hugging Face's. Families found by structure always do.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: If the module does something that a cut between layers cannot carry.
    """
    family = family or family_of(card.family)
    if family.verified:
        unknown = check_config(module.config, family)
        decoder = FunctionalDecoder(card, module, family)
        if unknown:
            inputs = (
                verification_inputs or sample_inputs(card, module, preprocess) if verify else ()
            )
            _prove(module, decoder, inputs, unknown)
    else:
        decoder = first_verified(
            module,
            decoder_path(module),
            verification_inputs or sample_inputs(card, module, preprocess),
            lambda attention: FunctionalDecoder(card, module, family, attention),
        )
    return Model(
        card=decoder.card,
        params={name: tensor.detach() for name, tensor in module.named_parameters()},
        preprocess=preprocess,
        embed=decoder.embed,
        decode=decoder.decode,
        select_scored=decoder.select_scored,
        embed_next=decoder.embed_next,
        detokenize=detokenize,
    )


def _prove(
    module: Any, decoder: FunctionalDecoder, inputs: Sequence[Inputs], unknown: Sequence[str]
) -> None:
    """Compare a decoder with Hugging Face's forward; warn of what the config says beyond both."""
    keys = join_messages(unknown)
    try:
        for given in inputs:
            require_same_forward(module, decoder, given)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the config has attributes that the {decoder.card.family} adapter does not know "
            f"({keys}), and its forward is not Hugging Face's: {error}"
        ) from error
    proof = "; its forward equals Hugging Face's on a sample" if inputs else ""
    warnings.warn(f"unknown config attributes are ignored{proof}: {keys}", stacklevel=5)


def cache_vision_features(model: Model, max_bytes: int = 256 << 20) -> Model:
    """Compute each image's features once and cache them.

    Each image runs alone, so its features are the same in any batch, and equal those of a batch up
    to rounding. Edits of the vision path and hooks in it are not served from the cache.

    Args:
        model: The model.
        max_bytes: Memory of the cache, in bytes.

    Returns:
        The model with a cache. A family without separate features is returned as it is.

    Example:
        >>> from errata import adapters
        >>> model = cache_vision_features(adapters.from_module(*adapters.tiny_model("llava")))
    """
    decoder = getattr(model.embed, "__self__", None)
    if not isinstance(decoder, FunctionalDecoder):
        return model
    vision_cache = decoder.runner.make_vision_cache(model.params, max_bytes)
    if vision_cache is None:
        return model
    return model._replace(embed=partial(decoder.embed, vision_cache=vision_cache))
