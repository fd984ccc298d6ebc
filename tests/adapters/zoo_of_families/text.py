"""Text decoders, and families that cannot be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers as hf

from tests.adapters.zoo_of_families.parts import (
    CLIP,
    IMAGE,
    OTHERS,
    TEXT,
    TOWER,
    VOCAB,
    Other,
    Sample,
    family,
)


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
    """Norms after the sublayers, projections around the decoder, no final norm."""
    return hf.OPTForCausalLM(opt_config(word_embed_proj_dim=16, do_layer_norm_before=False)), None


@family()
def gptj() -> Sample:
    config = hf.GPTJConfig(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    )
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
