"""Images of the micro world, 64 x 64, drawn at three times the size and box-averaged.

Every drawing is determined by a key: the same key gives the same pixels with the same Pillow.
"""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from errata.adapters.zoo.assets import IMAGE_SIZE
from errata.bench.data.world.world import COLORS, COUNTS, SCENE_COLORS, SCENE_SHAPES, Appearance

CANVAS_SIZE = 3 * IMAGE_SIZE
FOLDER = Path(__file__).parent
DARK_OUTLINE, LIGHT_OUTLINE = (25, 25, 25, 255), (215, 215, 215, 255)
BODY_SIZE = {  # half width and half height, as fractions of the canvas
    "round": (0.29, 0.29),
    "tall": (0.20, 0.34),
    "wide": (0.38, 0.21),
    "square": (0.26, 0.26),
    "triangle": (0.33, 0.31),
    "diamond": (0.33, 0.33),
}


class Scene(NamedTuple):
    """An image of one to six equal shapes, and the answers to questions about it.

    Attributes:
        image: The RGB image [64 64].
        count: The number of shapes, as a word.
        scene_color: The name of their color.
        scene_shape: The name of their shape.
    """

    image: Image.Image
    count: str
    scene_color: str
    scene_shape: str


def jitter(color: tuple[int, ...], rng: random.Random, amount: int = 14) -> tuple[int, ...]:
    """Change a color at random.

    Args:
        color: Channels, 0 to 255.
        rng: Source of randomness.
        amount: Largest change of a channel.

    Returns:
        The color, clipped to 0 to 255.
    """
    return tuple(max(0, min(255, int(c + rng.uniform(-amount, amount)))) for c in color)


def background(rng: random.Random) -> Image.Image:
    """Draw a plain, graded or cloudy background, in some images with a floor.

    Args:
        rng: Source of randomness.

    Returns:
        An RGB image [CANVAS_SIZE CANVAS_SIZE].
    """
    kind = rng.random()
    base = [rng.uniform(90, 235) for _ in range(3)]
    gray = sum(base) / 3
    base = [gray + (b - gray) * 0.45 for b in base]
    if kind < 0.35:
        image = Image.new("RGB", (CANVAS_SIZE, CANVAS_SIZE), tuple(int(b) for b in base))
    elif kind < 0.7:
        end = [max(60, min(245, b + rng.uniform(-70, 70))) for b in base]
        t = np.linspace(0, 1, CANVAS_SIZE)[:, None, None]
        grade = np.array(base) * (1 - t) + np.array(end) * t
        grade = np.broadcast_to(grade, (CANVAS_SIZE, CANVAS_SIZE, 3))
        if rng.random() < 0.5:
            grade = grade.transpose(1, 0, 2)
        image = Image.fromarray(grade.astype(np.uint8))
    else:
        noise = np.random.RandomState(rng.randrange(1 << 30)).randn(8, 8, 1) * 22
        cloud = np.clip(np.array(base) + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(cloud).resize((CANVAS_SIZE, CANVAS_SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.4:
        floor = (int(base[0] * 0.75), int(base[1] * 0.85), int(base[2] * 0.7))
        top = int(CANVAS_SIZE * rng.uniform(0.72, 0.88))
        ImageDraw.Draw(image).rectangle([0, top, CANVAS_SIZE, CANVAS_SIZE], fill=jitter(floor, rng))
    return image


def downscale(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shrink to 64 x 64 and vary gain and bias slightly.

    Args:
        image: The drawing.
        rng: Source of randomness.

    Returns:
        The image [64 64].
    """
    pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))
    pixels = pixels.astype(np.float32) * rng.uniform(0.88, 1.1) + rng.uniform(-8, 8)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_ears(
    draw: ImageDraw.ImageDraw, appearance: Appearance, x: float, y: float, side: int, fill, line
) -> None:
    k = CANVAS_SIZE * 0.105
    if appearance.ears == "round":
        draw.ellipse([x - k, y - k * 1.25, x + k, y + k * 0.75], fill=fill, outline=line, width=4)
    elif appearance.ears == "pointed":
        corners = [(x - k, y + k * 0.4), (x + k, y + k * 0.4), (x + side * k * 0.5, y - k * 1.6)]
        draw.polygon(corners, fill=fill, outline=line, width=4)
    elif appearance.ears == "long":
        box = [x - k * 0.55, y - k * 2.1, x + k * 0.55, y + k * 0.7]
        draw.ellipse(box, fill=fill, outline=line, width=4)
    elif appearance.ears == "horned":
        bend = [(x, y + k * 0.5), (x + side * k * 0.2, y - k * 0.5)]
        bend.append((x + side * k * 1.2, y - k * 1.2))
        draw.line(bend, fill=line, width=22)
        draw.line(bend, fill=fill, width=14)
    else:
        for lean in (-0.7, 0, 0.7):
            quill = [(x, y + k * 0.5), (x + side * k * 0.4 + lean * k, y - k * 1.4)]
            draw.line(quill, fill=line, width=11)
            draw.line(quill, fill=fill, width=6)


def _draw_outline(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, w: float, h: float, **kw
):
    if shape in ("round", "tall", "wide"):
        draw.ellipse([x - w, y - h, x + w, y + h], **kw)
    elif shape == "square":
        draw.rounded_rectangle([x - w, y - h, x + w, y + h], radius=12, **kw)
    elif shape == "triangle":
        draw.polygon([(x, y - h), (x - w, y + h * 0.9), (x + w, y + h * 0.9)], **kw)
    else:
        draw.polygon([(x, y - h), (x + w, y), (x, y + h), (x - w, y)], **kw)


def _draw_coat(
    pattern: str, body, fill, box: tuple[float, float, float, float], rng
) -> Image.Image:
    x, y, w, h = box
    coat = Image.new("RGBA", (CANVAS_SIZE, CANVAS_SIZE), body + (255,))
    draw = ImageDraw.Draw(coat)
    if pattern in ("striped", "ringed"):
        start = rng.uniform(0, 20)
        for i in range(-1, 12):
            low, high = i * 30 + start - 20, i * 30 + start - 7
            across = (
                [low, 0, high, CANVAS_SIZE] if pattern == "striped" else [0, low, CANVAS_SIZE, high]
            )
            draw.rectangle(across, fill=fill)
    elif pattern == "spotted":
        start = rng.uniform(-8, 8)
        for row in range(9):
            for column in range(9):
                cx, cy = column * 30 + (15 if row % 2 else 0) + start, row * 26 + start
                draw.ellipse([cx - 7, cy - 7, cx + 7, cy + 7], fill=fill)
    elif pattern == "patched":
        draw.ellipse([x - w * 0.6, y - h * 0.05, x + w * 0.6, y + h * 1.1], fill=fill)
    return coat


def _draw_face(draw: ImageDraw.ImageDraw, shape: str, box, rng: random.Random) -> None:
    x, y, w, h = box
    eye_y = y - h * (0.28 if shape != "triangle" else -0.02)
    radius = CANVAS_SIZE * 0.052
    apart = w * (0.36 if shape in ("round", "square", "wide") else 0.28)
    dx, dy = rng.uniform(-3, 3), rng.uniform(-3, 3)
    for side in (-1, 1):
        cx, small = x + side * apart, radius * 0.45
        white = [cx - radius, eye_y - radius, cx + radius, eye_y + radius]
        draw.ellipse(white, fill=(255, 255, 255), outline=(20, 20, 20), width=3)
        pupil = [cx - small + dx, eye_y - small + dy, cx + small + dx, eye_y + small + dy]
        draw.ellipse(pupil, fill=(10, 10, 10))


def creature(appearance: Appearance, key: str) -> Image.Image:
    """Draw a creature with a random rotation, scale, position, mirroring and background.

    Args:
        appearance: The attributes that all renderings share.
        key: Key of the random rendering.

    Returns:
        The image [64 64].
    """
    rng = random.Random(f"creature-{'-'.join(appearance)}-{key}")
    ground = background(rng)
    layer = Image.new("RGBA", (CANVAS_SIZE, CANVAS_SIZE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    body, accent = jitter(COLORS[appearance.color], rng), jitter(COLORS[appearance.accent], rng)
    line = DARK_OUTLINE if appearance.color != "black" else LIGHT_OUTLINE
    x, y = CANVAS_SIZE / 2, CANVAS_SIZE * 0.56
    w = BODY_SIZE[appearance.shape][0] * CANVAS_SIZE * rng.uniform(0.95, 1.05)
    h = BODY_SIZE[appearance.shape][1] * CANVAS_SIZE * rng.uniform(0.95, 1.05)
    box = (x, y, w, h)
    for side in (-0.45, 0.45):
        foot = (x + side * w + rng.uniform(-6, 6), y + h + 0.09 * CANVAS_SIZE)
        draw.line([(x + side * w, y + h * 0.6), foot], fill=line, width=7)
    narrow = appearance.shape in ("triangle", "diamond")
    top, apart = y - h * (0.62 if narrow else 0.72), w * (0.32 if narrow else 0.55)
    for side in (-1, 1):
        _draw_ears(draw, appearance, x + side * apart, top, side, accent, line)
    mask = Image.new("L", (CANVAS_SIZE, CANVAS_SIZE), 0)
    _draw_outline(ImageDraw.Draw(mask), appearance.shape, *box, fill=255)
    layer.paste(_draw_coat(appearance.pattern, body, accent, box, rng), (0, 0), mask)
    _draw_outline(draw, appearance.shape, *box, outline=line, width=4)
    _draw_face(draw, appearance.shape, box, rng)
    if rng.random() < 0.5:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle, scale = rng.uniform(-14, 14), rng.uniform(0.82, 1.06)
    layer = layer.rotate(angle, Image.Resampling.BILINEAR)
    side = int(CANVAS_SIZE * scale)
    layer = layer.resize((side, side), Image.Resampling.BILINEAR)
    at = [int((CANVAS_SIZE - side) / 2 + rng.uniform(-0.05, 0.05) * CANVAS_SIZE) for _ in range(2)]
    ground.paste(layer, (at[0], at[1]), layer)
    return downscale(ground, rng)


def _star_points(x: float, y: float, r: float) -> list[tuple[float, float]]:
    radii = [r * 1.25, r * 0.5] * 5
    return [
        (x + radii[i] * math.sin(i * math.pi / 5), y - radii[i] * math.cos(i * math.pi / 5))
        for i in range(10)
    ]


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill, line
) -> None:
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill, outline=line, width=3)
    elif shape == "square":
        s = r * 0.9
        draw.rectangle([x - s, y - s, x + s, y + s], fill=fill, outline=line, width=3)
    elif shape == "triangle":
        corners = [(x, y - r * 1.1), (x - r, y + r * 0.8), (x + r, y + r * 0.8)]
        draw.polygon(corners, fill=fill, outline=line, width=3)
    elif shape == "star":
        draw.polygon(_star_points(x, y, r), fill=fill, outline=line, width=3)
    else:
        for inset, color in ((0, line), (3, fill)):
            thin, long = r * 0.375 - inset, r * 1.05 - inset
            draw.rectangle([x - thin, y - long, x + thin, y + long], fill=color)
            draw.rectangle([x - long, y - thin, x + long, y + thin], fill=color)


def scene(key: str) -> Scene:
    """Draw one to six equal shapes on a 3 x 3 grid.

    Args:
        key: Key of the random drawing.

    Returns:
        The image and its answers.
    """
    rng = random.Random(f"scene-{key}")
    image = background(rng)
    draw = ImageDraw.Draw(image)
    count = rng.randint(1, len(COUNTS))
    color, shape = rng.choice(SCENE_COLORS), rng.choice(SCENE_SHAPES)
    line = (20, 20, 20) if color != "black" else (200, 200, 200)
    fill = jitter(COLORS[color], rng)
    for cell in rng.sample(range(9), count):
        x = CANVAS_SIZE * (cell % 3 + 0.5) / 3 + rng.uniform(-6, 6)
        y = CANVAS_SIZE * (cell // 3 + 0.5) / 3 + rng.uniform(-6, 6)
        _draw_shape(draw, shape, x, y, CANVAS_SIZE * 0.115 * rng.uniform(0.85, 1.1), fill, line)
    return Scene(downscale(image, rng), COUNTS[count - 1], color, shape)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the handwritten digits; see LICENSES.md for their origin.

    Returns:
        Images (uint8 0..16, [1797 8 8]) and values [1797].
    """
    arrays = load_file(FOLDER / "digits.safetensors")
    return arrays["images"], arrays["values"]


def digit(index: int, key: str = "") -> Image.Image:
    """Draw a handwritten digit in dark or light ink on a random background.

    Args:
        index: Index in `digits()`.
        key: Key of the random rendering.

    Returns:
        The image [64 64].
    """
    rng = random.Random(f"digit-{index}-{key}")
    image = background(rng)
    stroke = np.clip(digits()[0][index].astype(np.float32) / 16, 0, 1) * 255
    side = int(CANVAS_SIZE * 0.8)
    mask = Image.fromarray(stroke.astype(np.uint8))
    mask = mask.resize((side, side), Image.Resampling.BICUBIC)
    mask = mask.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)
    dark = rng.random() < 0.7
    ink = tuple(rng.randint(0, 60) if dark else rng.randint(225, 255) for _ in range(3))
    image = image.point((lambda v: int(128 + v * 0.5)) if dark else (lambda v: int(v * 0.5)))
    at = [int(CANVAS_SIZE * 0.1 + rng.uniform(-0.07, 0.07) * CANVAS_SIZE) for _ in range(2)]
    image.paste(Image.new("RGB", mask.size, ink), (at[0], at[1]), mask)
    return downscale(image, rng)


@functools.cache
def photograph(label: str) -> Image.Image:
    """Load a shipped photograph, whose short side has 128 pixels; see LICENSES.md for its origin.

    Args:
        label: One of `PHOTOS`.

    Returns:
        The RGB image.
    """
    with Image.open(FOLDER / "photos" / f"{label}.png") as image:
        return image.convert("RGB")


def photo(label: str, key: str) -> Image.Image:
    """Crop a shipped photograph at random. Half of the crops are mirrored.

    Args:
        label: One of `PHOTOS`.
        key: Key of the random crop.

    Returns:
        The image [64 64].
    """
    rng = random.Random(f"photo-{label}-{key}")
    source = photograph(label)
    side = int(min(source.size) * rng.uniform(0.6, 0.98))
    x, y = rng.randint(0, source.width - side), rng.randint(0, source.height - side)
    crop = source.crop((x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return downscale(crop, rng)


NUM_TEST_DIGITS = 360


def digit_indices(split: str) -> list[int]:
    """List which of the 1,797 handwritten digits belong to a split.

    Args:
        split: "train" (1,437 digits) or "test" (360).

    Returns:
        Indices in `digits()`, in a fixed random order.
    """
    order = random.Random("digits").sample(range(1797), 1797)
    return order[:-NUM_TEST_DIGITS] if split == "train" else order[-NUM_TEST_DIGITS:]
