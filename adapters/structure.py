"""Find a model's parts by structure: decoder, layers, head, attention, linear maps, ties."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from errata.functional import ModelCard
from errata.functional.errors import ModelUnsupported

from .checkpoint import checkpoint_names
from .family import Family

__all__ = [
    "attention_path",
    "decoder_path",
    "describe",
    "fingerprint",
    "layers_path",
    "path_of",
    "text_config",
]

_PARTS: Mapping[str, tuple[str, ...]] = {
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "attn.q": ("attn.q_proj", "attn.query", "attn.q"),
    "attn.k": ("attn.k_proj", "attn.key", "attn.k"),
    "attn.v": ("attn.v_proj", "attn.value", "attn.v"),
    "attn.qkv": ("attn.c_attn", "attn.qkv_proj", "attn.query_key_value", "attn.Wqkv", "attn.qkv"),
    "attn.o": (
        "attn.o_proj",
        "attn.out_proj",
        "attn.c_proj",
        "attn.dense",
        "attn.Wo",
        "attn.wo",
    ),
    "mlp.gate": ("mlp.gate_proj", "mlp.w1"),
    "mlp.gate_up": ("mlp.gate_up_proj",),
    "mlp.up": ("mlp.up_proj", "mlp.w3", "fc1", "mlp.fc1", "mlp.c_fc", "mlp.dense_h_to_4h"),
    "mlp.down": ("mlp.down_proj", "mlp.w2", "fc2", "mlp.fc2", "mlp.c_proj", "mlp.dense_4h_to_h"),
}
"""Neutral part of a layer -> where families keep it; `attn.` and `mlp.` stand for their modules."""

_VOLATILE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
"""Config entries that name no property of the weights."""

_VISION = (
    "vision_tower",
    "visual",
    "vision_model",
    "vision_encoder",
    "image_tower",
    "image_encoder",
    "vqmodel",
)
_PROJECTOR = (
    "multi_modal_projector",
    "mm_projector",
    "connector",
    "aligner",
    "language_projection",
    "image_to_text_projection",
    "projector",
    "vision_embed_tokens",
    "embed_vision",
    "merger",
)


def path_of(module: nn.Module, part: nn.Module) -> str:
    """The dotted path of a submodule, "" for the module itself."""
    for path, other in module.named_modules():
        if other is part:
            return path
    raise ModelUnsupported(f"{type(part).__name__} must be a part of {type(module).__name__}.")


def text_config(config: Any) -> Any:
    """The config of the decoder: the model's own, or its text part."""
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if getter else config


def decoder_path(module: Any) -> str:
    """The innermost text decoder: what holds the layers and takes token ids or embeddings."""
    part: Any = module
    for _ in range(8):
        inner = part.get_decoder() if hasattr(part, "get_decoder") else part
        if inner is part or not isinstance(inner, nn.Module):
            break
        part = inner
    return path_of(module, part)


def layers_path(module: Any, decoder: str) -> str:
    """The decoder's list of layers: the longest list of modules that lies in no other list.

    Raises ModelUnsupported where there is none.
    """
    best, size = "", 0
    lists = []
    for path, part in module.get_submodule(decoder).named_modules():
        if not isinstance(part, nn.ModuleList) or any(path.startswith(f"{p}.") for p in lists):
            continue
        lists.append(path)
        if len(part) > size and all(isinstance(layer, nn.Module) for layer in part):
            best, size = path, len(part)
    if not size:
        raise ModelUnsupported(
            f"a decoder must keep its layers in a list; {type(module).__name__} has none below "
            f"{decoder!r}."
        )
    return f"{decoder}.{best}" if decoder else best


def attention_path(layer: nn.Module) -> str:
    """The path of a layer's one self-attention inside the layer, "" where there is not just one."""
    found = [
        name
        for name, part in layer.named_children()
        if "attn" in name.lower() or "attention" in name.lower()
        if any(True for _ in part.children())  # a norm beside it has no parts
    ]
    return found[0] if len(found) == 1 else ""


def describe(
    module: Any,
    family: Family,
    *,
    id: str = "",
    revision: str = "",
) -> ModelCard:
    """The card of a module: sizes, places, names, a fingerprint of its config.

    Raises ModelUnsupported, saying which part is missing.
    """
    config = module.config
    text = text_config(config)
    if getattr(text, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelUnsupported(
            "a model must be a decoder that can be cut between layers; the text model of "
            f"{type(module).__name__} ({text.model_type}) is an encoder-decoder, whose layers read "
            "an encoder's states beside the stream. Take a decoder-only text model."
        )
    decoder = decoder_path(module)
    layers = layers_path(module, decoder)
    stack: Any = module.get_submodule(layers)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None:
        raise ModelUnsupported(
            f"a model must have a language-model head; {type(module).__name__} has none. Load the "
            "class with a head (…ForConditionalGeneration or …ForCausalLM)."
        )
    tokens = path_of(module, module.get_input_embeddings())
    linears, transposed = _linears(module)
    vision = family.vision or (_named(module, _VISION, decoder) if family.images else "")
    projector = family.projector or (_named(module, _PROJECTOR, decoder) if family.images else "")
    images = family.images if family.explicit else bool(vision or projector)
    return ModelCard(
        family=family.model_type or config.model_type,
        id=id or _name(config) or config.model_type,
        revision=revision or getattr(config, "_commit_hash", None) or "",
        config=fingerprint(config),
        num_layers=len(stack),
        width=text.hidden_size,
        vocab=head.weight.shape[0],
        context=_context(text),
        activation=_activation(text),
        layers=layers,
        head=path_of(module, head),
        tokens=tokens,
        vision=vision,
        vision_depth=_vision_depth(config),
        projector=projector,
        parts=_parts(stack),
        linears=linears,
        transposed=transposed,
        ties=_ties(module),
        checkpoint=checkpoint_names(module),
        images=images,
        several=images and family.several,
        videos=family.videos,
        stop=_stop(module, text),
    )


def _name(config: Any) -> str:
    """What the model was loaded from; of a folder only its name, for deltas carry it around."""
    name = getattr(config, "_name_or_path", "")
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name


def fingerprint(config: Any) -> str:
    """sha256 of a config's canonical JSON, without entries that say nothing about the weights."""
    plain = _plain(config.to_dict())
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _VOLATILE}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _stop(module: nn.Module, text: Any) -> tuple[int, ...]:
    """The token ids that end an answer: as the generation config has it, else the decoder's."""
    for config in (getattr(module, "generation_config", None), text):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (found,)
    return ()


def _activation(text: Any) -> str:
    names = ("hidden_act", "hidden_activation", "activation_function")
    found = [getattr(text, name, None) for name in names]
    return next((name for name in found if isinstance(name, str)), "")


def _context(text: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 2048


def _vision_depth(config: Any) -> int:
    """How many vision blocks the features are read through: LLaVA leaves the last ones out.

    0 where the config does not say. State k of a tower is what block k - 1 gave.
    """
    chosen = getattr(config, "vision_feature_layer", None)
    blocks = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if chosen is None or not isinstance(blocks, int):
        return 0
    states = chosen if isinstance(chosen, list | tuple) else [chosen]
    return max(k + blocks + 1 if k < 0 else k for k in states)


def _linears(module: nn.Module) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    sizes, transposed = {}, set()
    for path, part in module.named_modules():
        if isinstance(part, nn.Linear):
            sizes[path] = (part.out_features, part.in_features)
        elif isinstance(part, Conv1D):
            sizes[path] = (part.weight.shape[1], part.weight.shape[0])
            transposed.add(path)
    return sizes, frozenset(transposed)


def _parts(stack: Iterable[nn.Module]) -> dict[str, str]:
    """Neutral names that mean the same path in every layer."""
    common: dict[str, str] | None = None
    for layer in stack:
        paths = {path for path, _ in layer.named_modules()}
        places = {part: _first(_PARTS[part], paths) for part in ("attn", "mlp")}
        found = {}
        for part, tries in _PARTS.items():
            if part not in places:
                tries = tuple(_expand(t, places) for t in tries)
            path = _first(tries, paths)
            if path:
                found[part] = path
        common = found if common is None else {k: v for k, v in common.items() if found.get(k) == v}
    return common or {}


def _expand(path: str, places: Mapping[str, str]) -> str:
    head, dot, rest = path.partition(".")
    return f"{places[head] or head}{dot}{rest}" if head in places else path


def _first(tries: Iterable[str], paths: set[str]) -> str:
    return next((path for path in tries if path in paths), "")


def _named(module: nn.Module, names: Iterable[str], decoder: str) -> str:
    """The outermost submodule with one of `names`, outside the decoder's layers."""
    outside = [p for p, _ in module.named_modules() if not decoder or not p.startswith(decoder)]
    for name in names:
        for path in outside:
            if path.rpartition(".")[2] == name:
                return path
    return ""


def _ties(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter -> the name under which `named_parameters` has it."""
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return ties
