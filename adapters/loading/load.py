"""From a folder or hub id, or from a module in memory, to a Model.

Weights are read by transformers' own loader: the skeleton is built on the meta device and the
safetensors files are memory-mapped, so that on a CPU and in the checkpoint's own dtype the mapped
file *is* the one copy of the weights. Everything that can be wrong with a folder is said before a
weight is read. Safetensors come first; pickles are read with weights_only=True. No code that a
checkpoint brings is run.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from errata.adapters.loading.checkpoint_files import (
    _check_files,
    _load_config,
    _quiet_transformers,
    load_pickles,
)
from errata.adapters.loading.processors import load_processor
from errata.adapters.loading.sources import CheckpointSource, resolve_source
from errata.functional.errors import (
    ErrataError,
    InvalidInputError,
    InvalidSettingsError,
    UnsupportedModelError,
    join_messages,
)

if TYPE_CHECKING:
    from errata.adapters.inputs.prompt_format import PromptTemplate
    from errata.functional import Model

__all__ = ["from_module", "from_pretrained", "load_parts"]


def from_module(
    module: Any,
    processor: Any,
    *,
    template: str | PromptTemplate = "default",
    id: str = "",
    revision: str = "",
    cache: int = 256 << 20,
    encoders: Mapping[str, str | Path] = MappingProxyType({}),
    verify: bool = True,
) -> Model:
    """Turn a Hugging Face module and its processor into a Model.

    Parameters are shared, not copied, and never written to.

    Args:
        module: The module.
        processor: Its processor, or a tokenizer for a text-only model.
        template: A prompt template or the name of one.
        id: The model's name in deltas and results.
        revision: Its revision.
        cache: Memory for preprocessed images, in bytes.
        encoders: Folder or hub id of sentence encoders, by the name that deltas hold.
        verify: Whether a model whose config has unknown attributes must prove, by two forwards of a
            few tokens and an image, that its forward is Hugging Face's.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: If the module cannot be cut between layers, with the reason.
        InvalidSettingsError: If the template is unknown.

    Example:
        >>> from errata import adapters
        >>> model = adapters.from_module(*adapters.tiny_model("llava"))
        >>> model.card.family, model.card.num_layers
        ('llava', 3)
    """
    from errata.adapters.families.table import family_of
    from errata.adapters.hf.functional_model import functionalize
    from errata.adapters.hf.structure import describe_module
    from errata.adapters.inputs.images import encode_png
    from errata.adapters.inputs.prompt_format import make_detokenizer
    from errata.adapters.inputs.sentence_encoders import load_sentence_encoder
    from errata.adapters.loading.query_processor import make_processor

    refuse_encoder_decoder(module.config)
    family = family_of(module.config.model_type)
    card = describe_module(module, family, id=id, revision=revision)
    preprocess = make_processor(processor, module.config, card, template, cache)
    tokenizer = getattr(processor, "tokenizer", processor)
    end_id = tokenizer.convert_tokens_to_ids(getattr(preprocess, "eos_suffix", "") or None)
    if isinstance(end_id, int) and end_id != tokenizer.unk_token_id:
        stop_ids = tuple(dict.fromkeys((*card.stop_ids, end_id)))
        card = msgspec.structs.replace(card, stop_ids=stop_ids)
    model = functionalize(
        card, module, preprocess, make_detokenizer(tokenizer), family, verify=verify
    )
    load_encoder = partial(load_sentence_encoder, places=encoders)
    return model._replace(encode_image=encode_png, load_text_encoder=load_encoder)


def refuse_encoder_decoder(config: Any) -> None:
    """Raise UnsupportedModelError for an encoder-decoder, whose layers cannot be cut."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, getattr(config, "text_config", None), text):
        if getattr(part, "is_encoder_decoder", False):
            kind = getattr(getattr(config, "text_config", None), "model_type", config.model_type)
            raise UnsupportedModelError(
                f"a model must answer with a decoder alone; {config.model_type!r} over {kind!r} is "
                "an encoder-decoder, whose layers attend to an encoder's states. Take "
                "a checkpoint with a decoder-only text model (for BLIP-2: one of the OPT ones)."
            )


def from_pretrained(
    id_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    template: str | PromptTemplate = "default",
    revision: str | None = None,
    local_files_only: bool = False,
    check: bool = True,
    cache: int = 256 << 20,
    encoders: Mapping[str, str | Path] = MappingProxyType({}),
    verify: bool = True,
) -> Model:
    """Load a checkpoint.

    Args:
        id_or_path: A folder, or a hub id that is cached or can be reached.
        dtype: Of the weights. None: the checkpoint's own.
        device: Where the weights go.
        device_map: Hugging Face's, for a model larger than one device.
        template: A prompt template or the name of one.
        revision: The revision of a hub id.
        local_files_only: Whether the hub must not be asked.
        check: Whether to read every weight once and refuse values that are not finite.
        cache: Memory for preprocessed images, in bytes.
        encoders: Folder or hub id of sentence encoders, by the name that deltas hold.
        verify: Whether a model whose config has unknown attributes must prove, by two forwards of a
            few tokens and an image, that its forward is Hugging Face's.

    Returns:
        The model.

    Raises:
        InvalidInputError: If there is no such folder, a file is missing or truncated, a weight is
            NaN, or the hub cannot be reached.
        UnsupportedModelError: If the model cannot be cut between layers, with the reason.
        InvalidSettingsError: If the template is unknown.
    """
    module, processor, commit = load_parts(
        id_or_path,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        local_files_only=local_files_only,
        check=check,
    )
    name = os.fspath(id_or_path)
    id = Path(name).resolve().name if os.path.isdir(name) else name
    return from_module(
        module,
        processor,
        template=template,
        id=id,
        revision=commit,
        cache=cache,
        encoders=encoders,
        verify=verify,
    )


def load_parts(
    id_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    check: bool = True,
) -> tuple[Any, Any, str]:
    """Load the module and the processor of a checkpoint.

    Args:
        id_or_path: Hub id or folder.
        dtype: Dtype of the weights. None: that of the checkpoint.
        device: Where to put the model.
        device_map: As in `from_pretrained` of transformers.
        revision: Branch, tag or commit.
        local_files_only: Whether the hub must not be asked.
        check: Whether to refuse weights that are not finite.

    Returns:
        The module, the processor, and the commit (empty for a plain folder).
    """
    source = resolve_source(id_or_path, revision, local_files_only)
    config = _load_config(source)
    refuse_encoder_decoder(config)
    if os.path.isdir(source.name):
        _check_files(source)
    processor = load_processor(source, config)
    module = _load_module(source, config, _resolve_dtype(dtype), device, device_map)
    if check:
        _check_finite(module, source.name)
    module.requires_grad_(False)
    is_commit = re.fullmatch(r"[0-9a-f]{40}", source.revision or "")
    return module.eval(), processor, (source.revision or "") if is_commit else ""


# ---- weights


def _resolve_dtype(dtype: Any) -> Any:
    import torch

    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    resolved = getattr(torch, short.get(str(dtype), str(dtype)), None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InvalidSettingsError(
            f"dtype must be float32, bfloat16, float16 or float64, or left out; got {dtype!r}."
        )
    return resolved


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto
    raise UnsupportedModelError(
        f"a model must be an image-text-to-text or causal language model of Hugging Face; "
        f"{config.model_type!r} is neither."
    )


def _load_module(
    source: CheckpointSource, config: Any, dtype: Any, device: Any, device_map: Any
) -> Any:
    from safetensors import SafetensorError
    from transformers.models.auto.auto_factory import _get_model_class

    name = source.name
    where: dict[str, Any]
    model_class = _auto_class(config)
    if source.has_safetensors:
        where = {"pretrained_model_name_or_path": name, "use_safetensors": True, **source.options}
    else:
        where = {"pretrained_model_name_or_path": None, "state_dict": load_pickles(source)}
        model_class = _get_model_class(config, model_class._model_mapping)  # Auto wants a name
        warnings.warn(
            f"the weights of {name!r} are pickles, read with weights_only=True: `errata convert "
            "FOLDER OUT` writes safetensors, which load faster and take no copy.",
            stacklevel=4,
        )
    device_options = {"device_map": device_map} if device_map is not None else {}
    try:
        with _quiet_transformers():
            module, info = model_class.from_pretrained(
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **where,
                **device_options,
            )
    except ErrataError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InvalidInputError(f"the weights of {name!r} cannot be loaded: {error}") from error
    wrong = [f"{key} is missing" for key in sorted(info.get("missing_keys", []))]
    for key, have, want in sorted(info.get("mismatched_keys", [])):
        wrong.append(f"{key} must have shape {tuple(want)}, has {tuple(have)}")
    if wrong:
        raise InvalidInputError(
            f"the weights of {name!r} must be those of a {type(module).__name__}: "
            f"{join_messages(wrong)}."
        )
    return module if device is None else module.to(device)


def _check_finite(module: Any, name: str) -> None:
    import torch

    bad = []
    for path, tensor in module.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                count = int((~torch.isfinite(tensor)).sum())
                bad.append(f"{path} ({count} of {tensor.numel()} values)")
    if bad:
        raise InvalidInputError(
            f"the weights of {name!r} must be finite numbers; NaN or infinite in "
            f"{join_messages(bad)}. "
            "Fetch the checkpoint again, or pass check=False if it is meant so."
        )
