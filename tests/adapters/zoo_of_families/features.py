"""Families whose image features replace placeholders: LLaVA's kin."""

from __future__ import annotations

import torch
import transformers as hf

from tests.adapters.zoo_of_families.parts import (
    CLIP,
    IMAGE,
    SIGLIP,
    TEXT,
    TOWER,
    VIDEO,
    Sample,
    family,
    noise,
    rows,
    squares,
)


@family()
def llava_next() -> Sample:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
    )
    sizes = torch.tensor([[16, 16]] * 2)
    given = rows(10, pixel_values=noise(2, 2, 3, 16, 16), image_sizes=sizes)
    return hf.LlavaNextForConditionalGeneration(config), given


@family()
def llava_next_video() -> Sample:
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
    )
    sizes = torch.tensor([[16, 16]] * 2)
    given = rows(10, pixel_values=noise(2, 2, 3, 16, 16), image_sizes=sizes)
    return hf.LlavaNextVideoForConditionalGeneration(config), given


@family()
def video_llava() -> Sample:
    config = hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
    )
    return hf.VideoLlavaForConditionalGeneration(config), rows(4, pixel_values_images=squares())


@family()
def vipllava() -> Sample:
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    return hf.VipLlavaForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def idefics2() -> Sample:
    config = hf.Idefics2Config(
        vision_config=TOWER,
        text_config=hf.MistralConfig(**TEXT),
        image_token_id=IMAGE,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
    )
    given = rows(3, pixel_values=noise(2, 1, 3, 16, 16))
    return hf.Idefics2ForConditionalGeneration(config), given


@family()
def idefics3() -> Sample:
    config = hf.Idefics3Config(
        vision_config=TOWER,
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    given = rows(1, pixel_values=noise(2, 1, 3, 16, 16))
    return hf.Idefics3ForConditionalGeneration(config), given


@family()
def smolvlm() -> Sample:
    config = hf.SmolVLMConfig(
        vision_config=TOWER,
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    given = rows(1, pixel_values=noise(2, 1, 3, 16, 16))
    return hf.SmolVLMForConditionalGeneration(config), given


@family("attention must be causal")
def paligemma() -> Sample:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER),
        text_config=hf.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    given = rows(4, pixel_values=squares())
    one_block = {"token_type_ids": torch.zeros_like(given.input_ids)}  # as its processor gives them
    given = given._replace(vision_inputs={**given.vision_inputs, **one_block})
    return hf.PaliGemmaForConditionalGeneration(config), given


@family()
def gemma3() -> Sample:
    """Full and sliding layers, two rotary tables, images that attend in both directions."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config={**TEXT, "head_dim": 8, "sliding_window": 8, "layer_types": layers},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    given = rows(4, pixel_values=squares())
    kinds = {"token_type_ids": given.image_mask.long()}
    given = given._replace(vision_inputs={**given.vision_inputs, **kinds})
    return hf.Gemma3ForConditionalGeneration(config), given


@family()
def internvl() -> Sample:
    tower = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**tower),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return hf.InternVLForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def mistral3() -> Sample:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**{**TOWER, "patch_size": 4}),
        text_config=hf.MistralConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    sizes = torch.tensor([[16, 16]] * 2)
    given = rows(4, pixel_values=squares(), image_sizes=sizes)
    return hf.Mistral3ForConditionalGeneration(config), given


@family()
def aria() -> Sample:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = hf.AriaConfig(
        vision_config={**TOWER, "model_type": "idefics3_vision"},
        text_config=hf.AriaTextConfig(**TEXT, **experts),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 3},
        vision_feature_layer=-1,
    )
    return hf.AriaForConditionalGeneration(config), rows(3, pixel_values=squares())
