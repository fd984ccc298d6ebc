"""`Family`: one record per model type, and functions that most records share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errata.adapters.families.tiny_configs import TinyModel
from errata.adapters.inputs.prompt_format import PromptTemplate
from errata.adapters.inputs.vision_inputs import ProcessorParts, VisionFormat
from errata.functional import Inputs

__all__ = [
    "CHANGES_MATHEMATICS",
    "Family",
    "enter",
    "forward_arguments",
    "mask_positions",
    "sequential_positions",
]


def forward_arguments(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments that most families' Hugging Face forward takes, without positions.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        Keyword arguments.
    """
    del module
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.long(),
        **inputs.vision_inputs,
    }


def enter(module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """Run the module's own forward; a family that enters elsewhere has its own function.

    Args:
        module: The model.
        kwargs: Keyword arguments of the forward.

    Returns:
        Hugging Face's output, with logits.
    """
    return module(**kwargs, use_cache=False, return_dict=True)


def sequential_positions(module: nn.Module, inputs: Inputs) -> Tensor:
    """Positions 0, 1, 2, ... of every row, as most decoders count.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        [B 1 L].
    """
    del module
    num_rows, length = inputs.input_ids.shape
    return torch.arange(length, device=inputs.input_ids.device, dtype=torch.int64).expand(
        num_rows, 1, length
    )


def mask_positions(module: nn.Module, inputs: Inputs) -> Tensor:
    """Positions that count real tokens, as in OPT; padding repeats the last.

    Args:
        module: The model.
        inputs: Preprocessed rows.

    Returns:
        [B 1 L].
    """
    del module
    return (inputs.attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, None]


CHANGES_MATHEMATICS: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "dim_model_base": (),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "lm_head_multiplier": (1, 1.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "mup_width_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "scale_depth": (),
    "scale_emb": (1, 1.0),
    "use_alibi": (False,),
    "use_qk_norm": (False,),
}
"""Config keys that name a scale, a cap or another attention, and the values that change nothing.

A family whose config class does not declare such a key has a forward without it: Hugging Face's
would be wrong as well, so that being equal to it proves nothing.
"""


class Family(NamedTuple):
    """One Hugging Face `model_type`: everything errata knows about it.

    The defaults fit the usual Hugging Face layout.

    Attributes:
        model_type: `config.model_type`.
        title: What `errata models` prints.
        vision: How images stand in the prompt and become tensors. None: read by the model's own
            processor, or text only.
        processor: Returns the processor class that is built from its parts. None: Hugging Face's.
        tiny: A tiny random model of the family, for tests and documentation.
        templates: Prompt templates that differ from the default of their name.
        forward_arguments: (module, inputs) -> arguments of the module's forward, without positions.
        enter: Runs the forward with these arguments.
        position_ids: (module, inputs) -> position ids [B P L]. None: those of the module are
            recorded.
        vision_path: Path of the vision tower.
        projector_path: Path of the module that maps its features to the decoder.
        vision_features_path: Path of the module whose `get_image_features` runs both.
        takes_images: Whether a query may have an image.
        takes_several_images: Whether a query may have more than one.
        takes_videos: Whether a query may have a video.
        known_attributes: Config attributes that are handled or change nothing, in addition to those
            that the config class declares.
        refused_attributes: Undeclared config attributes that change the mathematics, and the values
            that do not.
        required_values: Config attributes (dotted) and the values that are supported.
        verified: Whether the family is tested. False: found by structure, verified numerically on
            loading.
    """

    model_type: str
    title: str = ""
    vision: VisionFormat | None = None
    processor: Callable[[], type] | None = None
    tiny: TinyModel | None = None
    templates: Mapping[str, PromptTemplate] = {}
    forward_arguments: Callable[[nn.Module, Inputs], dict[str, Any]] = forward_arguments
    enter: Callable[[nn.Module, Mapping[str, Any]], Any] = enter
    position_ids: Callable[[nn.Module, Inputs], Tensor] | None = sequential_positions
    vision_path: str = ""
    projector_path: str = ""
    vision_features_path: str | None = None
    takes_images: bool = True
    takes_several_images: bool = True
    takes_videos: bool = False
    known_attributes: frozenset[str] = frozenset()
    refused_attributes: Mapping[str, tuple[Any, ...]] = CHANGES_MATHEMATICS
    required_values: Mapping[str, tuple[Any, ...]] = {}
    verified: bool = True


def image_token(parts: ProcessorParts) -> str:
    """The text that stands for one image in a prompt.

    Args:
        parts: Parts of the processor.

    Returns:
        The placeholder token.
    """
    return parts.processor.image_token


def video_token(parts: ProcessorParts) -> str:
    """The text that stands for one video in a prompt.

    Args:
        parts: Parts of the processor.

    Returns:
        The placeholder token.
    """
    return parts.processor.video_token


def set_special_tokens(processor: Any, tokenizer: Any, **default: str) -> None:
    """Give a processor its special tokens and their ids.

    Args:
        processor: Processor to complete.
        tokenizer: Tokenizer whose own token of that name takes precedence.
        **default: Token text by attribute name.
    """
    for name, token in default.items():
        token = getattr(tokenizer, name, None) or token
        setattr(processor, name, token)
        setattr(processor, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
