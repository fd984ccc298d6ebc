"""Tiny random models of families that have no line in the table, for the generic path.

Each entry makes a module and rows with pictures, by the model's own input names (None: text only).
`write_families.py` beside this runs them all and writes adapters/FAMILIES.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

from errata.functional import Inputs

IMAGE, VIDEO, VOCAB = 98, 97, 99

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = {**TOWER, "projection_dim": 32}
SIGLIP = {**TOWER, "vision_use_head": False}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 32,
    "spatial_merge_size": 1,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 95,
    "vision_end_token_id": 96,
}

Sample = tuple[Any, Inputs | None]


class Other(NamedTuple):
    """One family: how to make it, and whether it must pass or be refused for a reason."""

    make: Callable[[], Sample]
    refused: str = ""  # a part of the reason


OTHERS: dict[str, Other] = {}


def family(refused: str = "") -> Callable[[Callable[[], Sample]], Callable[[], Sample]]:
    def enrol(make: Callable[[], Sample]) -> Callable[[], Sample]:
        OTHERS[make.__name__] = Other(make, refused)
        return make

    return enrol


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def rows(pictures: int, **pixels: Tensor) -> Inputs:
    """Two rows with a picture of so many tokens each, the second two tokens shorter."""
    length = 3 + pictures + 7
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 90, (2, length), generator=generator)
    ids[:, 3 : 3 + pictures] = IMAGE
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -2:] = False
    at = torch.tensor([[length - 3, length - 2], [length - 5, length - 4]])
    return Inputs(ids, mask, ids == IMAGE, ids.gather(1, at + 1), at, pixels)


def squares() -> Tensor:
    return noise(2, 3, 16, 16)


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


@family()
def paligemma() -> Sample:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER),
        text_config=hf.GemmaConfig(**TEXT, head_dim=8),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config), rows(4, pixel_values=squares())


@family()
def gemma3() -> Sample:
    """Full and sliding layers, two rotary tables, pictures that attend in both directions."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**SIGLIP),
        text_config={**TEXT, "head_dim": 8, "sliding_window": 8, "layer_types": layers},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    given = rows(4, pixel_values=squares())
    kinds = {"token_type_ids": given.image.long()}
    given = given._replace(pixels={**given.pixels, **kinds})
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


@family("Mllama")
def mllama() -> Sample:
    vision = {
        **TOWER,
        "num_global_layers": 1,
        "attention_heads": 4,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = hf.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1]},
        vision_config=vision,
        image_token_index=IMAGE,
    )
    return hf.MllamaForConditionalGeneration(config), None


@family("fails when it is run")
def kosmos2() -> Sample:
    text = {
        "vocab_size": VOCAB,
        "embed_dim": 32,
        "layers": 3,
        "ffn_dim": 64,
        "attention_heads": 4,
        "max_position_embeddings": 128,
    }
    config = hf.Kosmos2Config(vision_config=CLIP, text_config=text, latent_query_num=3)
    return hf.Kosmos2ForConditionalGeneration(config), None


@family("fails when it is run")
def instructblip() -> Sample:
    qformer = {**TOWER, "encoder_hidden_size": 32, "vocab_size": VOCAB}
    del qformer["image_size"], qformer["patch_size"]
    config = hf.InstructBlipConfig(
        vision_config=TOWER,
        qformer_config=qformer,
        text_config=opt_config(),
        num_query_tokens=3,
        image_token_index=IMAGE,
    )
    return hf.InstructBlipForConditionalGeneration(config), None


@family("logits that are its head's output")
def chameleon() -> Sample:
    quantizer = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "resolution": 16,
        "latent_channels": 8,
    }
    codes = {f"IMGIMG{chr(65 + i)}Z": 40 + i for i in range(8)}
    config = hf.ChameleonConfig(
        **TEXT, vocabulary_map={"<image>": IMAGE, **codes}, vq_config=quantizer
    )
    return hf.ChameleonForConditionalGeneration(config), None


@family("encoder-decoder")
def florence2() -> Sample:
    config = hf.Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        },
        vision_config={
            "embed_dim": [8, 8, 8, 16],
            "num_heads": [1, 1, 1, 2],
            "num_groups": [1, 1, 1, 2],
            "depths": [1, 1, 1, 1],
            "projection_dim": 32,
        },
        image_token_id=IMAGE,
    )
    return hf.Florence2ForConditionalGeneration(config), None


@family("logits that are its head's output")
def gemma3n() -> Sample:
    config = hf.Gemma3nTextConfig(
        **{**TEXT, "intermediate_size": [64] * 3},
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        activation_sparsity_pattern=[0.0, 0.0, 0.0],
    )
    return hf.Gemma3nForCausalLM(config), None


@family("dimensions of 'alibi'")
def bloom() -> Sample:
    config = hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4)
    return hf.BloomForCausalLM(config), None


def opt_config(**more: Any) -> hf.OPTConfig:
    return hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{"word_embed_proj_dim": 32, **more},
    )


@family()
def opt_350m() -> Sample:
    """Norms behind the sublayers, projections around the decoder, no final norm."""
    return hf.OPTForCausalLM(opt_config(word_embed_proj_dim=16, do_layer_norm_before=False)), None


@family()
def gptj() -> Sample:
    config = hf.GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=128,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return hf.GPTJForCausalLM(config), None


TEXT_ONLY: Mapping[str, Mapping[str, Any]] = {
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Phi3": {},
    "GPTNeoX": {},
    "Cohere": {},
    "Granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "Mixtral": {"num_local_experts": 4},
    "Olmo2": {},
    "Falcon": {"alibi": False},
    "StableLm": {},
    "Qwen3": {"head_dim": 8},
}


def _text_only(name: str, more: Mapping[str, Any]) -> Callable[[], Sample]:
    def make() -> Sample:
        config = getattr(hf, f"{name}Config")(**TEXT, **more)
        return getattr(hf, f"{name}ForCausalLM")(config), None

    return make


for _name, _more in TEXT_ONLY.items():
    OTHERS[_name.lower()] = Other(_text_only(_name, _more))
