"""MiniGPT-4's original checkpoint files as one Hugging Face folder.

The original comes in four parts, three of them `.pth` files:

    eva_vit_g.pth                   EVA-CLIP-g, no prefix; LAVIS uses the first 39 of its 40 blocks
    blip2_pretrained_flant5xxl.pth  {"model": query_tokens, ln_vision, Qformer.bert; t5_proj unused}
    prerained_minigpt4_7b.pth       {"model": llama_proj}
    Vicuna-7B                       a Hugging Face folder with safetensors

They are read by torch's restricted reader (`weights_only=True`, memory-mapped), which rebuilds
tensors and nothing else; this is the one place in errata that reads a `.pth`. Every tensor must
find its place and every place its tensor, or nothing is written.

Names: salesforce/LAVIS `lavis/models/eva_vit.py`, `blip2_models/Qformer.py`; Vision-CAIR/MiniGPT-4
`minigpt4/models/mini_gpt4.py`; transformers `convert_blip_2_original_to_pytorch.py`.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.functional.errors import InvalidInputError, join_messages

__all__ = ["convert_minigpt4", "rename_state_dict"]

_RENAMES = (
    (r"^(visual_encoder\.)?cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^(visual_encoder\.)?pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^(visual_encoder\.)?patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^(visual_encoder\.)?blocks\.(\d+)\.", r"vision_model.encoder.layers.\2."),
    (r"(layers\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"(layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"\.attention\.self\.", ".attention.attention."),
    (r"\.crossattention\.self\.", ".crossattention.attention."),
    (r"^llama_proj\.", "language_projection."),
)

_UNUSED = (
    # heads and texts of the parts' own training, which no forward of MiniGPT-4 runs
    r"^(visual_encoder\.)?(norm|fc_norm|head|mask_token|rel_pos_bias)\b",
    r"^Qformer\.cls\.",
    r"^Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)",
    r"^Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.",
    r"^(t5_proj|opt_proj|vision_proj|text_proj|itm_head|temp)\b",
    r"^(t5_model|opt_model|llama_model)\.",
)


def rename_state_dict(
    state_dict: Mapping[str, Tensor], num_vision_layers: int
) -> dict[str, Tensor]:
    """Original names to those of `MiniGPT4ForConditionalGeneration`.

    The vision tower's separate biases of queries and values become the one of its fused map:
    qkv.bias = [q_bias, 0, v_bias]. Blocks from `depth` on are left out, as LAVIS does.

    >>> list(rename_state_dict({"ln_vision.weight": torch.ones(2), "t5_proj.bias": torch.ones(2)}, 39))
    ['vision_model.post_layernorm.weight']

    Args:
        state_dict: Weights under their original names.
        num_vision_layers: Blocks of the vision tower to keep.

    Returns:
        Weights under the new names.
    """  # noqa: E501
    named: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if any(re.search(pattern, name) for pattern in _UNUSED):
            continue
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name)
        if block is None or int(block.group(1)) < num_vision_layers:
            named[name] = tensor
    for name in [name for name in named if name.endswith(".self_attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        query, value = named.pop(name), named.pop(stem + "v_bias")
        named[stem + "qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return named


def _read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, out of its `model` entry where it has one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise InvalidInputError(f"checkpoint {os.fspath(path)!r} must exist.") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise InvalidInputError(
            f"checkpoint {os.fspath(path)!r} must be a torch file of plain tensors: {error}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InvalidInputError(f"checkpoint {os.fspath(path)!r} must map names to tensors.")
    return state


def _find_mismatches(module: Any, named: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    expected = {
        name: tensor.shape for name, tensor in module.named_parameters() if name in set(names)
    }
    wrong = [f"{name} is missing" for name in expected if name not in named]
    wrong += [f"{name} has no place in the model" for name in named if name not in expected]
    return wrong + [
        f"{name} must have shape {tuple(expected[name])}, has {tuple(tensor.shape)}"
        for name, tensor in named.items()
        if name in expected and tensor.shape != expected[name]
    ]


def _set_parameter(module: Any, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, torch.nn.Parameter(tensor, requires_grad=False))


def convert_minigpt4(
    vision: str | os.PathLike[str],
    qformer: str | os.PathLike[str],
    minigpt4: str | os.PathLike[str],
    llama: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    vision_config: Mapping[str, Any] | None = None,
    qformer_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Convert the released MiniGPT-4 files to a folder that `adapters.from_pretrained` reads.

    The default configs are those of the released model: EVA-CLIP-g of 39 blocks at 224 pixels and a
    BERT-base Q-Former of 32 queries, both with Hugging Face's default sizes. Q-Former and queries
    stay in fp32, as Hugging Face keeps them; the rest becomes `dtype`.

    Args:
        vision: EVA-CLIP-g weights, a `.pth` file.
        qformer: BLIP-2's Q-Former weights, a `.pth` file.
        minigpt4: MiniGPT-4's projection weights, a `.pth` file.
        llama: Folder of the language model.
        output_dir: Folder to write.
        vision_config: Overrides of the vision config.
        qformer_config: Overrides of the Q-Former's config.
        dtype: Dtype of the written weights.

    Returns:
        `output_dir`.

    Raises:
        InvalidInputError: With every name that does not fit; nothing is written then.
    """
    import transformers as hf

    from errata.adapters.families.minigpt4_model import (
        MiniGPT4Config,
        MiniGPT4ForConditionalGeneration,
        MiniGPT4Processor,
    )

    target = Path(output_dir)
    if target.exists():
        raise InvalidInputError(f"output folder {os.fspath(output_dir)!r} must not exist yet.")
    state_dict = {
        **_read_state_dict(vision),
        **_read_state_dict(qformer),
        **_read_state_dict(minigpt4),
    }
    text = hf.LlamaForCausalLM.from_pretrained(llama, dtype=dtype, use_safetensors=True)
    tower = hf.Blip2VisionConfig(**(vision_config or {}))
    config = MiniGPT4Config(
        vision_config=tower.to_dict(),
        qformer_config=hf.Blip2QFormerConfig(**(qformer_config or {})).to_dict(),
        text_config=text.config.to_dict(),
        num_query_tokens=state_dict["query_tokens"].shape[1]
        if "query_tokens" in state_dict
        else 32,
    )
    named = rename_state_dict(state_dict, tower.num_hidden_layers)
    with torch.device("meta"):
        module = MiniGPT4ForConditionalGeneration(config)
    names = [n for n, _ in module.named_parameters() if not n.startswith("language_model.")]
    wrong = _find_mismatches(module, named, names)
    if wrong:
        raise InvalidInputError(
            "the checkpoint files must hold MiniGPT-4's vision tower, Q-Former and projection: "
            f"{join_messages(wrong)}."
        )
    for name, tensor in named.items():
        exact = name == "query_tokens" or name.startswith("qformer.")
        _set_parameter(module, name, tensor.to(torch.float32 if exact else dtype))
    module.language_model = text
    side: Any = tower.image_size
    size = {"height": side, "width": side}
    processor = MiniGPT4Processor(
        image_processor=hf.BlipImageProcessorPil(size=size),
        tokenizer=hf.AutoTokenizer.from_pretrained(llama, trust_remote_code=False),
    )
    module.config.dtype = dtype
    partial_folder = target.with_name(target.name + ".part")
    try:
        module.save_pretrained(partial_folder)
        processor.save_pretrained(partial_folder)
        partial_folder.rename(target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return target
