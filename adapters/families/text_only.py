"""Decoders without vision: GPT-2, Llama, Qwen2 and Qwen3, OPT. They read prompts, no images."""

from __future__ import annotations

from typing import Any

from errata.adapters.families.base import Family, mask_positions
from errata.adapters.families.tiny_configs import (
    HEAD_DIM,
    MAX_POSITIONS,
    TinyModel,
    TinySize,
    decoder_config,
)

__all__ = ["gpt2", "llama", "opt", "qwen2", "qwen3"]


def _tiny_gpt2_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.GPT2Config(
        vocab_size=len(size.tokenizer),
        n_embd=size.hidden_size,
        n_layer=size.num_layers,
        n_head=size.hidden_size // HEAD_DIM,
        n_positions=MAX_POSITIONS,
        initializer_range=0.08,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=size.tokenizer.bos_token_id,
        eos_token_id=size.tokenizer.eos_token_id,
    )


def _tiny_llama_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.LlamaConfig(**decoder_config(size))


def _tiny_qwen2_config(size: TinySize) -> Any:
    import transformers as hf

    return hf.Qwen2Config(**decoder_config(size))


def _use_tokenizer(tokenizer: Any) -> Any:
    return tokenizer


gpt2: Family = Family(
    "gpt2",
    title="GPT-2 (text)",
    tiny=TinyModel("GPT2LMHeadModel", _tiny_gpt2_config, _use_tokenizer),
    takes_images=False,
    takes_several_images=False,
    known_attributes=frozenset({"n_ctx"}),
)
llama: Family = Family(
    "llama",
    title="Llama, Vicuna (text)",
    tiny=TinyModel("LlamaForCausalLM", _tiny_llama_config, _use_tokenizer, add_bos=True),
    takes_images=False,
    takes_several_images=False,
)
qwen2: Family = Family(
    "qwen2",
    title="Qwen2 and Qwen2.5 (text)",
    tiny=TinyModel("Qwen2ForCausalLM", _tiny_qwen2_config, _use_tokenizer),
    takes_images=False,
    takes_several_images=False,
    known_attributes=frozenset({"use_mrope"}),
    required_values={"use_mrope": (None, False)},
)
qwen3: Family = Family(
    "qwen3", title="Qwen3 (text)", takes_images=False, takes_several_images=False
)
opt: Family = Family(
    "opt",
    title="OPT (text)",
    takes_images=False,
    takes_several_images=False,
    position_ids=mask_positions,
)
