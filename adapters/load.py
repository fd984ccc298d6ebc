"""From a folder or hub id, or from a module in memory, to a Model.

Weights are read by transformers' own loader: the skeleton is built on the meta device and the
safetensors files are memory-mapped, so that on a CPU and in the checkpoint's own dtype the mapped
file *is* the one copy of the weights. Everything that can be wrong with a folder is said before a
weight is read. Only safetensors are read, and no code that a checkpoint brings is run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.functional.errors import (
    ErrataError,
    InvalidInputError,
    InvalidSettingsError,
    UnsupportedModelError,
    join_messages,
)

if TYPE_CHECKING:
    import torch

    from errata.functional import Model

    from .text import PromptTemplate

__all__ = ["from_module", "from_pretrained", "load_parts", "load_processor"]

VIDEO_FILES = ("video_preprocessor_config.json",)
PROCESSOR_FILE = "processor_config.json"


def from_module(
    module: Any,
    processor: Any,
    *,
    template: str | PromptTemplate = "default",
    id: str = "",
    revision: str = "",
    cache: int = 256 << 20,
) -> Model:
    """A Hugging Face module and its processor (or tokenizer) as a Model.

    The module's parameters are shared, not copied, and never written to. `template` is a preset's
    name or a Template; `cache` bounds the preprocessed pictures kept, in bytes. Raises
    ModelUnsupported with the reason, BadSettings for an unknown template.

    >>> from errata import adapters
    >>> model = adapters.from_module(*adapters.tiny_model("llava"))
    >>> model.card.family, model.card.num_layers
    ('llava', 3)
    """
    from . import core
    from .families import family_of
    from .read import make_detokenizer, make_processor
    from .structure import describe_module

    refuse_encoder_decoder(module.config)
    family = family_of(module.config.model_type)
    card = describe_module(module, family, id=id, revision=revision)
    preprocess = make_processor(processor, module.config, card, template, cache)
    tokenizer = getattr(processor, "tokenizer", processor)
    return core.functionalize(card, module, preprocess, make_detokenizer(tokenizer), family)


def refuse_encoder_decoder(config: Any) -> None:
    """Raise ModelUnsupported for an encoder-decoder, whose layers can not be cut."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, getattr(config, "text_config", None), text):
        if getattr(part, "is_encoder_decoder", False):
            kind = getattr(getattr(config, "text_config", None), "model_type", config.model_type)
            raise UnsupportedModelError(
                f"a model must answer with a decoder alone; {config.model_type!r} over {kind!r} is "
                "an encoder-decoder, whose layers read an encoder's states beside the stream. Take "
                "a checkpoint with a decoder-only text model (for BLIP-2: one of the OPT ones)."
            )


def from_pretrained(
    id_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    template: str | PromptTemplate = "default",
    revision: str | None = None,
    check: bool = True,
    cache: int = 256 << 20,
) -> Model:
    """Load a checkpoint: a folder, or a hub id that is in the local cache or can be reached.

    `dtype` None keeps the checkpoint's own. `device_map` is Hugging Face's, for a model larger than
    one device. `check` looks for values that are not finite, which reads every weight once.

    Raises BadInput (no such folder, no config, no safetensors, a truncated or incomplete file, NaN
    weights, offline), ModelUnsupported, BadSettings.
    """
    module, processor, commit = load_parts(
        id_or_path,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        check=check,
    )
    name = os.fspath(id_or_path)
    id = Path(name).resolve().name if os.path.isdir(name) else name
    return from_module(module, processor, template=template, id=id, revision=commit, cache=cache)


def load_parts(
    id_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    check: bool = True,
) -> tuple[Any, Any, str]:
    """The module, the processor and the commit (empty for a plain folder) of a checkpoint."""
    name = os.fspath(id_or_path)
    config = _load_config(name, revision)
    refuse_encoder_decoder(config)
    commit = _find_commit(name, revision)
    if os.path.isdir(name):
        _check_files(Path(name))
    processor = load_processor(name, config, revision=commit or revision)
    module = _load_module(
        name, config, _resolve_dtype(dtype), device, device_map, commit or revision
    )
    if check:
        _check_finite(module, name)
    module.requires_grad_(False)
    return module.eval(), processor, commit


# ---- config and files


def _load_config(name: str, revision: str | None) -> Any:
    from transformers import AutoConfig

    from . import minigpt4

    minigpt4.register()
    local = os.path.isdir(name)
    if not local and (
        os.path.exists(name) or name.startswith((".", "/", "~")) or os.sep * 2 in name
    ):
        problem = "a file" if os.path.exists(name) else "not there"
        raise InvalidInputError(f"model {name!r} must be a folder or a hub id, and is {problem}.")
    if local and not os.path.isfile(os.path.join(name, "config.json")):
        raise InvalidInputError(
            f"model folder {name!r} must hold config.json, as save_pretrained writes it; it has "
            f"{join_messages(sorted(os.listdir(name))) or 'nothing'}."
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise InvalidInputError(
            f"model {name!r} must be a folder, or a hub id in the cache or within reach: {error}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the config of {name!r} must be one that the installed transformers knows: {error}"
        ) from error


def _find_commit(name: str, revision: str | None) -> str:
    """The commit of a hub snapshot, from the cache's own layout; empty for a plain folder."""
    if os.path.isdir(name):
        return ""
    match = re.search(
        r"[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]", _find_file(name, "config.json", revision)
    )
    return match.group(1) if match else ""


def _check_files(folder: Path) -> None:
    """Say everything that is wrong with the weights' files before any weight is read."""
    from safetensors import SafetensorError, safe_open

    wrong = []
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            indexed_files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidInputError(
                f"{index} must map weights to files, and can not be read: {error}"
            ) from error
        missing = sorted(indexed_files - {file.name for file in files})
        wrong += [f"{name} is named in the index and not there" for name in missing]
        files = [file for file in files if file.name in indexed_files]
    if not files and not wrong:
        other = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".h5")
        )
        raise InvalidInputError(
            f"model folder {os.fspath(folder)!r} must hold *.safetensors, and has "
            f"{', '.join(other[:4]) or 'no weights'}: save the model again with save_pretrained."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError, ValueError) as error:
            wrong.append(f"{file.name} is truncated or no safetensors file ({error})")
    if wrong:
        raise InvalidInputError(
            f"the weights in {os.fspath(folder)!r} must be whole: {join_messages(wrong)}. Fetch them anew."
        )


# ---- weights


def _resolve_dtype(dtype: Any) -> Any:
    import torch

    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    resolved = getattr(torch, short.get(str(dtype), str(dtype)), None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InvalidSettingsError(
            f"dtype must be float32, bfloat16, float16 or float64, or left out; got {dtype!r}."
        )
    return resolved


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto
    raise UnsupportedModelError(
        f"a model must be an image-text-to-text or causal language model of Hugging Face; "
        f"{config.model_type!r} is neither."
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no table of missing keys: what is wrong is raised."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _load_module(
    name: str, config: Any, dtype: Any, device: Any, device_map: Any, revision: str | None
) -> Any:
    from safetensors import SafetensorError

    device_options = {"device_map": device_map} if device_map is not None else {}
    try:
        with _quiet_transformers():
            module, info = _auto_class(config).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                revision=revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **device_options,
            )
    except ErrataError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InvalidInputError(f"the weights of {name!r} can not be loaded: {error}") from error
    wrong = [f"{key} is missing" for key in sorted(info.get("missing_keys", []))]
    for key, have, want in sorted(info.get("mismatched_keys", [])):
        wrong.append(f"{key} must have shape {tuple(want)}, has {tuple(have)}")
    if wrong:
        raise InvalidInputError(
            f"the weights of {name!r} must be those of a {type(module).__name__}: {join_messages(wrong)}."
        )
    return module if device is None else module.to(device)


def _check_finite(module: Any, name: str) -> None:
    import torch

    bad = []
    for path, tensor in module.named_parameters():
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                count = int((~torch.isfinite(tensor)).sum())
                bad.append(f"{path} ({count} of {tensor.numel()} values)")
    if bad:
        raise InvalidInputError(
            f"the weights of {name!r} must be finite numbers; NaN or infinite in {join_messages(bad)}. "
            "Fetch the checkpoint again, or pass check=False if it is meant so."
        )


# ---- processors


def load_processor(name: str, config: Any, revision: str | None = None) -> Any:
    """The processor of a checkpoint, or its tokenizer where the model takes no pictures.

    Families whose stock processor needs torchvision get one that does not (`processors.py`), with
    the settings of the checkpoint's video processor kept for `frames.py`. Pictures are prepared
    with Pillow whether torchvision is there or not, so that the same file gives the same pixels
    everywhere. Raises BadInput for files that are missing or can not be read.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    from .processors import OURS, build_hf_processor

    hub_options = {"revision": revision} if revision else {}
    try:
        with _quiet_transformers():
            if config.model_type in OURS:
                settings = _read_json(name, PROCESSOR_FILE, revision)
                tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
                images = AutoImageProcessor.from_pretrained(name, backend="pil", **hub_options)
                processor = OURS[config.model_type](
                    image_processor=images,
                    tokenizer=tokenizer,
                    **_own_settings(settings),
                    chat_template=_read_chat_template(name, tokenizer, revision),
                )
                processor.video_settings = _read_video_settings(name, settings, revision)
                return processor
            if not hasattr(config, "vision_config"):
                return AutoTokenizer.from_pretrained(name, **hub_options)
            settings = _own_settings(_read_json(name, PROCESSOR_FILE, revision))
            template = _read_chat_template(name, None, revision)
            return build_hf_processor(
                name, config, settings | {"chat_template": template}, **hub_options
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InvalidInputError(
            f"the processor of {name!r} must load (tokenizer and image processor files): {error}"
        ) from error


def _find_file(name: str, file: str, revision: str | None) -> str:
    """Where a checkpoint's file is on this disk; empty where it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path or ""


def _read_json(name: str, file: str, revision: str | None) -> dict[str, Any]:
    path = _find_file(name, file, revision)
    return json.loads(Path(path).read_text("utf-8")) if path else {}


def _own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The processor's own settings, without those of its parts."""
    nested = {"image_processor", "video_processor", "tokenizer", "feature_extractor"}
    other = nested | {"processor_class", "chat_template"}
    return {name: value for name, value in settings.items() if name not in other}


def _read_chat_template(name: str, tokenizer: Any, revision: str | None) -> str | None:
    """A chat template of its own file, in the new or the old spelling, or a tokenizer's."""
    path = _find_file(name, "chat_template.jinja", revision)
    if path:
        return Path(path).read_text("utf-8")
    old = _read_json(name, "chat_template.json", revision).get("chat_template")
    return old or getattr(tokenizer, "chat_template", None)


def _read_video_settings(
    name: str, settings: dict[str, Any], revision: str | None
) -> dict[str, Any] | None:
    """Settings of the video processor; None where the checkpoint has none of its own."""
    if "video_processor" in settings:
        return settings["video_processor"]
    for file in VIDEO_FILES:
        settings_of_file = _read_json(name, file, revision)
        if settings_of_file:
            return settings_of_file
    return None
