"""Video frames to tensors, as Hugging Face's video processors make them, without torchvision.

Those processors stack the frames as bytes, resize them with torchvision, and normalise. What
torchvision calls for bytes is `torch.nn.functional.interpolate`, antialiased, and so does this
file: the tensors are the same. Frames are taken as they come; choosing them is up to the caller.

Source: transformers `video_processing_utils.py`, `video_processing_qwen2_vl.py`,
`video_processing_qwen3_vl.py`, `video_processing_llava_onevision.py`.

F frames · H height · W width · N patches · C channels
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image as PILImage
from torch import Tensor

from errata.functional.errors import InvalidInputError

__all__ = ["stack_frames"]

RESAMPLE_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def stack_frames(frames: Sequence[PILImage.Image]) -> Tensor:
    """Stack frames as bytes.

    Args:
        frames: F frames.

    Returns:
        [F C H W] of uint8.

    Raises:
        InvalidInputError: If their sizes differ.
    """
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) != 1:
        raise InvalidInputError(
            "the frames of a video must have one size, got "
            + ", ".join(f"{w} x {h}" for w, h in sizes[:4])
            + ": resize them first, or pass them as separate images."
        )
    width, height = sizes[0]
    raw = bytearray().join(frame.tobytes() for frame in frames)
    pixels = torch.frombuffer(raw, dtype=torch.uint8)
    return pixels.view(len(frames), height, width, 3).permute(0, 3, 1, 2).contiguous()


def resize_frames(video: Tensor, height: int, width: int, resample: int) -> Tensor:
    """Resize frames.

    Args:
        video: Bytes, [F C H W].
        height: New height in pixels.
        width: New width in pixels.
        resample: PIL's number of the filter.

    Returns:
        [F C height width].

    Raises:
        InvalidInputError: For an unknown filter.
    """
    if video.shape[-2:] == (height, width):
        return video
    if resample not in RESAMPLE_MODES:
        raise InvalidInputError(
            f"the video processor's resample must be one of {sorted(RESAMPLE_MODES)} (nearest, "
            "bilinear, "
            f"bicubic), got {resample}."
        )
    mode = RESAMPLE_MODES[resample]
    options: dict[str, Any] = (
        {} if mode == "nearest" else {"align_corners": False, "antialias": True}
    )
    return torch.nn.functional.interpolate(video, (height, width), mode=mode, **options)


def normalize_frames(video: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Compute (x - mean) / std per channel, with the rescaling to [0, 1] folded into both.

    Args:
        video: Bytes, [F C H W].
        settings: Settings of the video processor.

    Returns:
        [F C H W], fp32.
    """
    factor = settings.get("rescale_factor") or 1 / 255
    rescale = settings.get("do_rescale", True)
    values = video.to(torch.float32)
    if not settings.get("do_normalize", True):
        return values * factor if rescale else values
    mean, std = (
        torch.tensor(settings["image_mean"], dtype=torch.float32, device="cpu"),
        torch.tensor(settings["image_std"], dtype=torch.float32, device="cpu"),
    )
    if rescale:
        mean, std = mean * (1.0 / factor), std * (1.0 / factor)
    return (values - mean[:, None, None]) / std[:, None, None]


def fit_to_pixels(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    num_padded_frames: int = 1,
) -> tuple[int, int]:
    """Round sides to multiples of `factor` so that the volume is within limits.

    Qwen's `smart_resize`: round both sides; if the volume is out of range, scale both by the same
    root and round towards the range.

    Args:
        height: In pixels.
        width: In pixels.
        factor: Divisor of both new sides.
        min_pixels: Smallest volume.
        max_pixels: Largest volume.
        num_frames: Frames.
        num_padded_frames: Frames after rounding up.

    Returns:
        (height, width).

    Raises:
        InvalidInputError: For an aspect ratio above 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise InvalidInputError(
            "a video frame's sides must differ by less than 200 to 1, "
            f"got {width} x {height}: crop it first."
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if num_padded_frames * new_height * new_width > max_pixels:
        scale = math.sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif num_padded_frames * new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (num_frames * height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def patchify(
    video: Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
) -> tuple[Tensor, list[int]]:
    """Cut frames into rows of patches.

    Patches of one merged cell are adjacent; the last frame is repeated to fill an incomplete step.

    Args:
        video: [F C H W].
        patch_size: In pixels.
        merge_size: Patches per side of a merged cell.
        temporal_patch_size: Frames per patch.

    Returns:
        [N, C * temporal * patch * patch], and the grid (t, h, w).
    """
    num_missing = -len(video) % temporal_patch_size
    video = torch.cat([video, repeat(video[-1:], "1 c h w -> f c h w", f=num_missing)])
    rows = rearrange(
        video,
        "(t k) c (h m p) (w n q) -> (t h w m n) (c k p q)",
        k=temporal_patch_size,
        m=merge_size,
        n=merge_size,
        p=patch_size,
        q=patch_size,
    )
    height, width = video.shape[-2:]
    return rows, [len(video) // temporal_patch_size, height // patch_size, width // patch_size]
