"""Decoders without vision: GPT-2, Llama, Qwen2 and Qwen3, OPT. They read prompts, no images."""

from .family import Family, from_mask

__all__ = ["gpt2", "llama", "opt", "qwen2", "qwen3"]

gpt2 = Family("gpt2", images=False, several=False, known=frozenset({"n_ctx"}))
llama = Family("llama", images=False, several=False)
qwen2 = Family(
    "qwen2",
    images=False,
    several=False,
    known=frozenset({"use_mrope"}),
    values={"use_mrope": (None, False)},
)
qwen3 = Family("qwen3", images=False, several=False)
opt = Family("opt", images=False, several=False, positions=from_mask)
