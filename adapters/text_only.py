"""Decoders without vision: GPT-2, Llama, Qwen2 and Qwen3, OPT. They read prompts, no images."""

from .family import Family, mask_positions

__all__ = ["gpt2", "llama", "opt", "qwen2", "qwen3"]

gpt2 = Family(
    "gpt2", takes_images=False, takes_several_images=False, known_attributes=frozenset({"n_ctx"})
)
llama = Family("llama", takes_images=False, takes_several_images=False)
qwen2 = Family(
    "qwen2",
    takes_images=False,
    takes_several_images=False,
    known_attributes=frozenset({"use_mrope"}),
    required_values={"use_mrope": (None, False)},
)
qwen3 = Family("qwen3", takes_images=False, takes_several_images=False)
opt = Family("opt", takes_images=False, takes_several_images=False, position_ids=mask_positions)
