"""Processors that Hugging Face cannot build without torchvision.

`Qwen2VLProcessor`, `Qwen3VLProcessor` and `LlavaOnevisionProcessor` demand a video processor, and
that needs torchvision. These subclasses leave it out: images, text and chat templates go through
the stock code, and video frames are read by `adapters/inputs/video.py`. Any other family's stock
class is given a dummy video processor, which is enough for images.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from errata.adapters.loading.checkpoint_files import _find_file, _quiet_transformers, _read_json
from errata.adapters.loading.sources import CheckpointSource
from errata.functional.errors import InvalidInputError

__all__ = ["build_hf_processor", "load_processor"]


class _WithoutVideoProcessor:
    """Lets a processor be built around a video processor that is none."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


def build_hf_processor(name: str, config: Any, settings: dict[str, Any], **hub_options: Any) -> Any:
    """Build the Hugging Face processor of a checkpoint's model type.

    A video processor, which would need torchvision, is replaced by a dummy: families analysed by
    structure take no videos.

    Args:
        name: Hub id or folder.
        config: The model's config.
        settings: Settings of the processor.
        **hub_options: Passed to `from_pretrained`.

    Returns:
        The processor.
    """
    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None or set(processor_class.get_attributes()) != {
        "image_processor",
        "tokenizer",
        "video_processor",
    }:
        return AutoProcessor.from_pretrained(name, **hub_options)
    return type(
        processor_class.__name__,
        (_WithoutVideoProcessor, processor_class),
        {"__init__": processor_class.__init__},
    )(
        image_processor=AutoImageProcessor.from_pretrained(name, backend="pil", **hub_options),
        tokenizer=AutoTokenizer.from_pretrained(name, **hub_options),
        video_processor=SimpleNamespace(),
        **settings,
    )


VIDEO_FILES = ("video_preprocessor_config.json",)
PROCESSOR_FILE = "processor_config.json"


# ---- processors


def load_processor(source: CheckpointSource, config: Any) -> Any:
    """Load the processor of a checkpoint, or its tokenizer if the model takes no images.

    Families whose stock processor needs torchvision get one that does not, and keep the settings of
    the checkpoint's video processor. Images are prepared with Pillow whether torchvision is
    installed or not, so that the same file gives the same pixels everywhere.

    Args:
        source: The checkpoint.
        config: The model's config.

    Returns:
        The processor.

    Raises:
        InvalidInputError: For files that are missing or cannot be read.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    from errata.adapters.families.table import FAMILIES
    from errata.adapters.loading.processors import build_hf_processor

    name, hub_options = source.name, source.options
    try:
        with _quiet_transformers():
            family = FAMILIES.get(config.model_type)
            if family and family.processor:
                settings = _read_json(source, PROCESSOR_FILE)
                tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
                images = AutoImageProcessor.from_pretrained(name, backend="pil", **hub_options)
                processor = family.processor()(
                    image_processor=images,
                    tokenizer=tokenizer,
                    **_own_settings(settings),
                    chat_template=_read_chat_template(source, tokenizer),
                )
                processor.video_settings = _read_video_settings(source, settings)
                return processor
            if not hasattr(config, "vision_config"):
                return AutoTokenizer.from_pretrained(name, **hub_options)
            settings = _own_settings(_read_json(source, PROCESSOR_FILE))
            template = _read_chat_template(source, None)
            return build_hf_processor(
                name, config, settings | {"chat_template": template}, **hub_options
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError) as error:
        raise InvalidInputError(
            f"the processor of {name!r} must load (tokenizer and image processor files): {error}"
        ) from error


def _own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The processor's own settings, without those of its parts."""
    nested = {"image_processor", "video_processor", "tokenizer", "feature_extractor"}
    other = nested | {"processor_class", "chat_template"}
    return {name: value for name, value in settings.items() if name not in other}


def _read_chat_template(source: CheckpointSource, tokenizer: Any) -> str | None:
    """A chat template of its own file, in the new or the old spelling, or a tokenizer's."""
    path = _find_file(source, "chat_template.jinja")
    if path:
        return Path(path).read_text("utf-8")
    old = _read_json(source, "chat_template.json").get("chat_template")
    return old or getattr(tokenizer, "chat_template", None)


def _read_video_settings(
    source: CheckpointSource, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Settings of the video processor; None where the checkpoint has none of its own."""
    if "video_processor" in settings:
        return settings["video_processor"]
    for file in VIDEO_FILES:
        settings_of_file = _read_json(source, file)
        if settings_of_file:
            return settings_of_file
    return None
