"""Find a model's parts by structure: decoder, layers, head, attention, linear maps, ties."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from errata.adapters.families.base import Family
from errata.adapters.hf.checkpoint_names import map_checkpoint_names
from errata.functional import ModelCard
from errata.functional.errors import UnsupportedModelError

__all__ = [
    "attention_path",
    "config_hash",
    "decoder_path",
    "describe_module",
    "layers_path",
    "module_path",
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

_IGNORED_CONFIG_KEYS = (
    "transformers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
)
"""Config entries that name no property of the weights."""

_VISION_NAMES = (
    "vision_tower",
    "visual",
    "vision_model",
    "vision_encoder",
    "image_tower",
    "image_encoder",
    "vqmodel",
)
_PROJECTOR_NAMES = (
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


def module_path(module: nn.Module, part: nn.Module) -> str:
    """The dotted path of a submodule, "" for the module itself.

    Args:
        module: The model.
        part: The submodule.

    Returns:
        Its path.

    Raises:
        UnsupportedModelError: If it is no part of the module.
    """
    for path, other in module.named_modules():
        if other is part:
            return path
    raise UnsupportedModelError(f"{type(part).__name__} must be a part of {type(module).__name__}.")


def text_config(config: Any) -> Any:
    """The config of the decoder: the model's own, or its text part.

    Args:
        config: The model's config.

    Returns:
        The text config.
    """
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if getter else config


def decoder_path(module: Any) -> str:
    """The path of the innermost text decoder, which holds the layers and takes ids or embeddings.

    Args:
        module: The model.

    Returns:
        Its path.
    """
    part: Any = module
    for _ in range(8):
        inner = part.get_decoder() if hasattr(part, "get_decoder") else part
        if inner is part or not isinstance(inner, nn.Module):
            break
        part = inner
    return module_path(module, part)


def layers_path(module: Any, decoder: str) -> str:
    """The path of the decoder's list of layers: the longest list of modules inside no other list.

    Args:
        module: The model.
        decoder: Path of the decoder.

    Returns:
        Its path.

    Raises:
        UnsupportedModelError: If there is none.
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
        raise UnsupportedModelError(
            f"a decoder must keep its layers in a list; {type(module).__name__} has none below "
            f"{decoder!r}."
        )
    return f"{decoder}.{best}" if decoder else best


def attention_path(layer: nn.Module) -> str:
    """The path of a layer's one self-attention inside the layer.

    Args:
        layer: A decoder layer.

    Returns:
        The path; "" unless there is exactly one.
    """
    paths = [
        name
        for name, part in layer.named_children()
        if "attn" in name.lower() or "attention" in name.lower()
        if any(True for _ in part.children())  # a norm of its own has no parts
    ]
    return paths[0] if len(paths) == 1 else ""


def describe_module(
    module: Any,
    family: Family,
    *,
    id: str = "",
    revision: str = "",
) -> ModelCard:
    """Describe a module: sizes, paths, names and a hash of its config.

    Args:
        module: The model.
        family: The family's record.
        id: Hub id or folder.
        revision: Commit.

    Returns:
        The card.

    Raises:
        UnsupportedModelError: Says which part is missing.
    """
    config = module.config
    text = text_config(config)
    if getattr(text, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "a model must be a decoder that can be cut between layers; the text model of "
            f"{type(module).__name__} ({text.model_type}) is an encoder-decoder, whose layers read "
            "an encoder's states. Take a decoder-only text model."
        )
    decoder = decoder_path(module)
    layers = layers_path(module, decoder)
    stack: Any = module.get_submodule(layers)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None:
        raise UnsupportedModelError(
            f"a model must have a language-model head; {type(module).__name__} has none. Load the "
            "class with a head (…ForConditionalGeneration or …ForCausalLM)."
        )
    token_embedding = module_path(module, module.get_input_embeddings())
    linears, transposed = _find_linears(module)
    vision_tower = family.vision_path or (
        _find_named(module, _VISION_NAMES, decoder) if family.takes_images else ""
    )
    projector = family.projector_path or (
        _find_named(module, _PROJECTOR_NAMES, decoder) if family.takes_images else ""
    )
    takes_images = family.takes_images if family.verified else bool(vision_tower or projector)
    return ModelCard(
        family=family.model_type or config.model_type,
        id=id or _model_id(config) or config.model_type,
        revision=revision or getattr(config, "_commit_hash", None) or "",
        config_hash=config_hash(config),
        num_layers=len(stack),
        hidden_size=text.hidden_size,
        vocab_size=head.weight.shape[0],
        max_positions=_max_positions(text),
        activation=_activation_name(text),
        layers=layers,
        head=module_path(module, head),
        token_embedding=token_embedding,
        vision_tower=vision_tower,
        num_vision_layers=_num_vision_layers(config),
        projector=projector,
        part_names=_find_parts(stack),
        linear_shapes=linears,
        transposed=transposed,
        tied=_find_tied(module),
        checkpoint_names=map_checkpoint_names(module),
        takes_images=takes_images,
        takes_several_images=takes_images and family.takes_several_images,
        takes_videos=family.takes_videos,
        stop_ids=_stop_ids(module, text),
    )


def _model_id(config: Any) -> str:
    """What the model was loaded from; of a folder only its name, for deltas carry it around."""
    name = getattr(config, "_name_or_path", "")
    return os.path.basename(os.path.normpath(name)) if os.path.isabs(name) else name


def config_hash(config: Any) -> str:
    """SHA-256 of a config's canonical JSON, without entries that do not affect the weights.

    Args:
        config: The model's config.

    Returns:
        64 hexadecimal digits.
    """
    plain = _drop_ignored_keys(config.to_dict())
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _drop_ignored_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(k): _drop_ignored_keys(v) for k, v in value.items() if k not in _IGNORED_CONFIG_KEYS
        }
    return [_drop_ignored_keys(v) for v in value] if isinstance(value, list | tuple) else value


def _stop_ids(module: nn.Module, text: Any) -> tuple[int, ...]:
    """The token ids that end an answer: as the generation config has it, else the decoder's."""
    for config in (getattr(module, "generation_config", None), text):
        token_ids = getattr(config, "eos_token_id", None)
        if token_ids is not None:
            return tuple(token_ids) if isinstance(token_ids, list | tuple) else (token_ids,)
    return ()


def _activation_name(text: Any) -> str:
    names = ("hidden_act", "hidden_activation", "activation_function")
    found = [getattr(text, name, None) for name in names]
    return next((name for name in found if isinstance(name, str)), "")


def _max_positions(text: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return 2048


def _num_vision_layers(config: Any) -> int:
    """How many vision blocks the features are read through: LLaVA leaves the last ones out.

    0 where the config does not say. State k of a tower is what block k - 1 gave.
    """
    chosen = getattr(config, "vision_feature_layer", None)
    blocks = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if chosen is None or not isinstance(blocks, int):
        return 0
    states = chosen if isinstance(chosen, list | tuple) else [chosen]
    return max(k + blocks + 1 if k < 0 else k for k in states)


def _find_linears(module: nn.Module) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    sizes, transposed = {}, set()
    for path, part in module.named_modules():
        if isinstance(part, nn.Linear):
            sizes[path] = (part.out_features, part.in_features)
        elif isinstance(part, Conv1D):
            sizes[path] = (part.weight.shape[1], part.weight.shape[0])
            transposed.add(path)
    return sizes, frozenset(transposed)


def _find_parts(stack: Iterable[nn.Module]) -> dict[str, str]:
    """Neutral names that mean the same path in every layer."""
    common: dict[str, str] | None = None
    for layer in stack:
        paths = {path for path, _ in layer.named_modules()}
        module_names = {part: _first_existing(_PARTS[part], paths) for part in ("attn", "mlp")}
        part_names = {}
        for part, tries in _PARTS.items():
            if part not in module_names:
                tries = tuple(_expand_name(t, module_names) for t in tries)
            path = _first_existing(tries, paths)
            if path:
                part_names[part] = path
        common = (
            part_names
            if common is None
            else {k: v for k, v in common.items() if part_names.get(k) == v}
        )
    return common or {}


def _expand_name(path: str, module_names: Mapping[str, str]) -> str:
    head, dot, rest = path.partition(".")
    return f"{module_names[head] or head}{dot}{rest}" if head in module_names else path


def _first_existing(tries: Iterable[str], paths: set[str]) -> str:
    return next((path for path in tries if path in paths), "")


def _find_named(module: nn.Module, names: Iterable[str], decoder: str) -> str:
    """The outermost submodule with one of `names`, outside the decoder's layers."""
    outside = [p for p, _ in module.named_modules() if not decoder or not p.startswith(decoder)]
    for name in names:
        for path in outside:
            if path.rpartition(".")[2] == name:
                return path
    return ""


def _find_tied(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter -> the name under which `named_parameters` has it."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return tied
