"""Compare a config with what an adapter handles, attribute by attribute.

A value that is known to change the mathematics is refused. An attribute that nobody knows is
reported, and the model must prove that its forward is Hugging Face's: most say how a checkpoint was
made (`unsloth_version`), some would change numbers without a word. After penzai, which compares
every attribute of a Hugging Face config before it converts a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from errata.adapters.families.base import Family
from errata.functional.errors import UnsupportedModelError, join_messages

__all__ = ["check_config"]

_GENERATION = """
max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens use_cache
"""  # once kept in configs; no forward reads them
_SAVING = """
model_type architectures transformers_version auto_map torch_dtype dtype tokenizer_class
finetuning_task task_specific_params problem_type id2label label2id num_labels torchscript
return_dict output_hidden_states output_attentions prefix quantization_config
"""  # what a checkpoint is and how it was saved
_TOKENS = "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id"
_TRAINING = """
use_bfloat16 tf_legacy_loss tie_encoder_decoder tie_word_embeddings ignore_index
initializer_range initializer_factor gradient_checkpointing pretraining_tp
"""
_REDUNDANT = """
is_decoder rope_scaling rope_theta rope_parameters use_decoder_only_language_model in_chans
spatial_patch_size vision_token_id vocab_size
"""  # read by the class under another name, or told by the shapes of the weights
_HARMLESS = frozenset(" ".join((_GENERATION, _SAVING, _TOKENS, _TRAINING, _REDUNDANT)).split())
"""Attributes outside a config class that change nothing, or that the class itself has read."""

_REQUIRED = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
}
"""Attributes any config may have, with the only value that leaves a plain decoder."""


def check_config(config: PreTrainedConfig, family: Family) -> list[str]:
    """Find the attributes of a config that a family does not know.

    Args:
        config: The model's config.
        family: The family's record.

    Returns:
        "path = value" of each. Hugging Face's forward may read them, or not.

    Raises:
        UnsupportedModelError: Names every value that is known not to be handled.
    """
    wrong, unknown = [], []
    text = config.get_text_config()
    for path, part in _nested_configs(config, ""):
        known = (
            {field.name for field in dataclasses.fields(part)} | _HARMLESS | family.known_attributes
        )
        # Flat configs of older checkpoints repeat their text part at the top.
        known |= set() if part is text else {f.name for f in dataclasses.fields(text)}
        for name, value in vars(part).items():
            if name.startswith("_") or isinstance(value, PreTrainedConfig):
                continue
            if name in known or name in _REQUIRED:
                continue
            neutral = family.refused_attributes.get(name)
            if neutral is None or value is None or value in neutral:
                unknown.append(f"{path}{name} = {_short(value)}")
            else:
                wrong.append(
                    f"{path}{name} = {_short(value)} changes the mathematics, and a "
                    f"{part.model_type or family.model_type} of transformers has no such thing"
                )
    for name, (expected, value) in _required_values(text).items():
        if value != expected and not (value in (None, False, {}) and not expected):
            wrong.append(f"{name} must be {expected!r}, is {value!r}")
    for path, allowed in family.required_values.items():
        value = _nested_attribute(config, path)
        if value not in allowed:
            wrong.append(f"{path} must be one of {allowed}, is {value!r}")
    if wrong:
        raise UnsupportedModelError(
            f"every config attribute must be one the {family.model_type} adapter handles: "
            f"{join_messages(wrong)}. Delete an attribute that changes nothing, or open an issue."
        )
    return unknown


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _required_values(text: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    return {name: (want, getattr(text, name, want)) for name, want in _REQUIRED.items()}


def _nested_configs(config: PreTrainedConfig, path: str) -> Iterator[tuple[str, PreTrainedConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _nested_configs(value, f"{path}{name}.")


def _nested_attribute(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config
