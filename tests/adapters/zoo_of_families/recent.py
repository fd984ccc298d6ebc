"""Families with patches, grids, experts, chunks or convolutions."""

from __future__ import annotations

import torch
import transformers as hf

from errata.functional import Inputs
from tests.adapters.zoo_of_families.parts import (
    IMAGE,
    QWEN_TOKENS,
    QWEN_TOWER,
    ROPE,
    SIGLIP,
    TEXT,
    TOWER,
    VIDEO,
    VOCAB,
    Sample,
    family,
    noise,
    rows,
    squares,
)


@family()
def ovis2() -> Sample:
    vision = hf.Ovis2VisionConfig(
        **TOWER, vocab_size=20, hidden_stride=1, num_visual_indicator_tokens=5
    )
    config = hf.Ovis2Config(
        vision_config=vision,
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[91, 92, 93, 94, 95],
        vocab_size=VOCAB,
        hidden_size=32,
    )
    return hf.Ovis2ForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def glm4v() -> Sample:
    config = hf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**QWEN_TOWER, "image_size": 16},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=95,
        image_end_token_id=96,
        video_start_token_id=94,
        video_end_token_id=93,
    )
    return hf.Glm4vForConditionalGeneration(config), patches()


def patches() -> Inputs:
    grid = torch.tensor([[1, 2, 2]] * 2)
    return rows(4, pixel_values=noise(8, 3 * 2 * 64), image_grid_thw=grid)


@family()
def qwen3_vl_moe() -> Sample:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    tower = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = hf.Qwen3VLMoeConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE, **experts},
        vision_config={**QWEN_TOWER, **tower},
        **QWEN_TOKENS,
    )
    return hf.Qwen3VLMoeForConditionalGeneration(config), patches()


@family()
def qwen3_5() -> Sample:
    """Linear attention in two of three layers: cut by depth, not in time."""
    linear = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    rope = {**ROPE, "partial_rotary_factor": 1.0}
    config = hf.Qwen3_5Config(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, **linear},
        vision_config={**QWEN_TOWER, "num_position_embeddings": 16},
        **QWEN_TOKENS,
    )
    return hf.Qwen3_5ForConditionalGeneration(config), patches()


@family()
def fuyu() -> Sample:
    flat = {name: TEXT[name] for name in TEXT if name != "num_key_value_heads"}
    config = hf.FuyuConfig(
        **flat,
        text_config={**TEXT, "model_type": "persimmon"},
        image_size=16,
        patch_size=8,
        num_channels=3,
        image_token_id=IMAGE,
    )
    return hf.FuyuForCausalLM(config), rows(4, image_patches=noise(2, 4, 192))


@family()
def cohere2_vision() -> Sample:
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config=hf.Cohere2Config(**TEXT, sliding_window=8),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(config), rows(1, pixel_values=squares())


@family()
def aya_vision() -> Sample:
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config=hf.CohereConfig(**TEXT),
        image_token_index=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
        vision_feature_layer=-1,
    )
    return hf.AyaVisionForConditionalGeneration(config), rows(1, pixel_values=squares())


@family()
def deepseek_vl() -> Sample:
    config = hf.DeepseekVLConfig(
        vision_config={**SIGLIP, "model_type": "siglip_vision_model"},
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return hf.DeepseekVLForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def janus() -> Sample:
    picture_maker = hf.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=32,
        image_token_embed_dim=32,
        num_patches=2,
    )
    config = hf.JanusConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.JanusVisionConfig(**TOWER, projection_dim=32, mlp_ratio=2.0),
        vq_config=picture_maker,
        image_token_id=IMAGE,
    )
    return hf.JanusForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def llama4() -> Sample:
    """Experts, chunked attention, layers without positions."""
    experts = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    vision = {
        **TOWER,
        "intermediate_size": 128,
        "patch_size": 4,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    }
    config = hf.Llama4Config(
        text_config={**TEXT, "head_dim": 8, "attention_chunk_size": 8, **experts},
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=96,
        eoi_token_index=97,
    )
    return hf.Llama4ForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def got_ocr2() -> Sample:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
        "mlp_dim": 64,
        "global_attn_indexes": [1],
        "window_size": 2,
    }
    config = hf.GotOcr2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_index=IMAGE
    )
    return hf.GotOcr2ForConditionalGeneration(config), rows(1, pixel_values=noise(2, 3, 64, 64))


@family()
def lfm2_vl() -> Sample:
    """Convolutions between attention layers: cut by depth, not in time."""
    vision = {**TOWER, "patch_size": 4, "num_patches": 16, "vision_use_head": False}
    del vision["image_size"]
    layers = ["full_attention", "conv", "full_attention"]
    config = hf.Lfm2VlConfig(
        vision_config=vision,
        text_config=hf.Lfm2Config(**TEXT, layer_types=layers),
        image_token_id=IMAGE,
        downsample_factor=2,
    )
    shapes = torch.tensor([[4, 4]] * 2)
    seen = torch.ones(2, 16, dtype=torch.long)
    given = rows(4, pixel_values=noise(2, 16, 48), spatial_shapes=shapes, pixel_attention_mask=seen)
    return hf.Lfm2VlForConditionalGeneration(config), given
