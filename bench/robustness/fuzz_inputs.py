"""Odd images, and hostile settings of runs and editors: read, or refused in one sentence."""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from errata.adapters.inputs.images import content_id, open_image
from errata.bench.robustness.fuzz_delta import FuzzReport
from errata.bench.robustness.mutations import MALICIOUS_NAMES, MALICIOUS_VALUES, flip_bits
from errata.bench.runs.settings_file import parse_settings
from errata.editors import METHODS, configure, make_editor
from errata.functional.errors import ErrataError
from errata.functional.queries import encoded_image

__all__ = ["fuzz_images", "fuzz_settings"]

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def fuzz_images(num_images: int, seed: int = 0) -> FuzzReport:
    """Open images of odd modes, sizes and values, and damaged files.

    Args:
        num_images: Images.
        seed: Seed.

    Returns:
        What was refused, loaded and found.
    """
    draw = random.Random(seed)
    report, slowest = FuzzReport(Counter(), Counter(), 0.0, []), 0.0
    with tempfile.TemporaryDirectory() as place:
        for number in range(num_images):
            kind, image = _odd_image(draw, Path(place) / f"{number % 7}.png")
            spent = time.process_time()
            fault = ""
            try:
                opened = open_image(image)
                fault = "" if opened.mode == "RGB" and 0 not in opened.size else "no RGB image"
                content_id(image)
                report.loaded[kind] += 1
            except ErrataError as error:
                report.refused[kind] += 1
                fault = "" if len(str(error)) <= 2000 else "too long an error"
            except BaseException as error:  # noqa: BLE001 - anything else is a finding
                fault = f"{type(error).__name__}: {str(error)[:200]}"
            seconds = time.process_time() - spent
            slowest = max(slowest, seconds)
            if seconds > 1:
                fault = f"took {seconds:.2f} s of processor time"
            if fault:
                report.findings.append(f"image {number} of seed {seed} ({kind}): {fault}")
    return report._replace(slowest=slowest)


def _odd_image(draw: random.Random, path: Path) -> tuple[str, Any]:
    mode = draw.choice(MODES)
    size = (draw.choice([0, 1, 2, 7, 64, 600]), draw.choice([0, 1, 2, 7, 64]))
    image = Image.new(mode, size)
    if 0 not in size:
        image = Image.frombytes(mode, size, draw.randbytes(len(image.tobytes())))
    if draw.random() < 0.4:
        return "in memory", image
    data = io.BytesIO()
    try:
        image.save(data, draw.choice(FORMATS))
    except (OSError, ValueError, KeyError, SystemError, MemoryError):
        return "in memory", image
    raw = data.getvalue()
    way = draw.randrange(5)
    if way == 0 and raw:
        raw = flip_bits(raw, draw)
    elif way == 1 and raw:
        raw = raw[: draw.randrange(len(raw))]
    elif way == 2:
        raw += draw.randbytes(50)
    elif way == 3:
        at = draw.randrange(len(raw) + 1)
        raw = raw[:at] + draw.randbytes(20) + raw[at:]
    if draw.random() < 0.3:
        return "of a delta", encoded_image(raw)
    path.write_bytes(raw)
    return "file", str(path) if draw.random() < 0.9 else draw.choice(["", "a\0b", str(path.parent)])


_RUN = """
output_dir = "out"
seed = 0
num_threads = 1
max_new_tokens = 2
memory_budget = "1 GiB"
scorers = ["errata"]
[cases]
source = "world"
num_cases = 2
seed = 0
skip = 0
[[models]]
id = "tiny/llava"
name = "m"
dtype = "auto"
device = "cpu"
[[editors]]
type = "lora"
name = "e"
rank = 4
lr = 0.01
num_steps = 2
[[protocols]]
type = "sequential"
sequence_length = 2
gaps = [1]
"""


def fuzz_settings(num_settings: int, seed: int = 0) -> FuzzReport:
    """Parse forged settings of runs, and make editors of forged settings.

    Args:
        num_settings: Settings.
        seed: Seed.

    Returns:
        What was refused, loaded and found.
    """
    draw = random.Random(seed)
    report, slowest = FuzzReport(Counter(), Counter(), 0.0, []), 0.0
    for number in range(num_settings):
        kind = draw.choice(["a run", "an editor"])
        spent = time.process_time()
        fault = ""
        try:
            if kind == "a run":
                parse_settings(_forged_toml(draw))
            else:
                _forged_editor(draw)
            report.loaded[kind] += 1
        except ErrataError as error:
            report.refused[kind] += 1
            fault = "" if len(str(error)) <= 2000 else "too long an error"
        except BaseException as error:  # noqa: BLE001 - anything else is a finding
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        seconds = time.process_time() - spent
        slowest = max(slowest, seconds)
        if seconds > 1:
            fault = f"took {seconds:.2f} s of processor time"
        if fault:
            report.findings.append(f"settings {number} of seed {seed} ({kind}): {fault}")
    return report._replace(slowest=slowest)


_TOML_VALUES = [
    *(
        [
            "-1",
            "0",
            "1",
            "9223372036854775808",
            "1e308",
            "nan",
            "-inf",
            "inf",
            "true",
            "[]",
            "[[]]",
            "{}",
        ]
    ),
    "1979-05-27",
    "0x7fffffffffffffff",
    "9" * 5000,
    "-" + "9" * 23,
    "1" + "0" * 30,
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    '"' + "x" * 5000 + '"',
    '".."',
    '"a\\u0000b"',
    '"../../x"',
    '"a\\n"',
    '"\\u202e"',
    '""',
    '"cuda:99"',
    '"micro/../../x"',
]


def _forged_toml(draw: random.Random) -> str:
    lines: list[str] = list(_RUN.strip().split("\n"))
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        key = lines[at].partition("=")[0]
        way = draw.random()
        if "=" in lines[at] and way < 0.7:
            lines[at] = f"{key}= {draw.choice(_TOML_VALUES)}"
        elif way < 0.8:
            lines[at] = ""
        elif way < 0.9:
            name = draw.choice(MALICIOUS_NAMES).encode("ascii", "replace").decode()
            lines.insert(at, f'"{name[:200]}" = {draw.choice(_TOML_VALUES)}')
        else:
            lines[at] = flip_bits(lines[at].encode() or b"x", draw).decode("utf-8", "replace")
    return "\n".join(lines)


def _forged_editor(draw: random.Random) -> None:
    name = draw.choice(sorted(METHODS))
    config = METHODS[name].config
    field = draw.choice([f for f in config.__struct_fields__ if f != "type"])
    value = draw.choice([*MALICIOUS_VALUES, float("nan"), float("inf"), 10**30, 10**9, [0] * 1000])
    editor = make_editor(configure(name, **cast(Any, {field: value})))
    if draw.random() < 0.3:
        model = _tiny()
        if isinstance(value, int) and abs(value) > 10**6:
            return  # a size that is allowed, and too large to make here
        editor.init(model, torch.Generator().manual_seed(0))


def _tiny() -> Any:
    global _MODEL
    if _MODEL is None:
        from errata import adapters

        _MODEL = adapters.from_module(*adapters.tiny_model("llava"))
    return _MODEL


_MODEL: Any = None
