"""Every image the micro models are trained and tested on, drawn once and kept as arrays.

Test images are other renderings of the same creatures, other scenes, other handwritten digits,
and other crops of the same photographs (there are only ten).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from errata.adapters.zoo.assets import IMAGE_SIZE
from errata.bench.data.world import drawing
from errata.bench.data.world.drawing import digit_indices
from errata.bench.data.world.world import (
    COLORS,
    COUNTS,
    DIGITS,
    EARS,
    NUM_TRAINED,
    PATTERNS,
    PHOTOS,
    SCENE_COLORS,
    SCENE_SHAPES,
    SHAPES,
    World,
)

NUM_RENDERINGS = {"train": 32, "test": 4}  # per creature
NUM_SCENES = {"train": 3000, "test": 300}
NUM_CROPS = {"train": 40, "test": 8}  # per photograph


DIGIT_COPIES = {"train": 2, "test": 1}

VISION_HEADS: dict[str, tuple[str, ...]] = {  # what the vision stage learns to tell
    "creature": tuple(str(i) for i in range(NUM_TRAINED)),
    "shape": SHAPES,
    "color": tuple(COLORS),
    "pattern": PATTERNS,
    "accent": tuple(COLORS),
    "ears": EARS,
    "count": COUNTS,
    "scene_color": SCENE_COLORS,
    "scene_shape": SCENE_SHAPES,
    "digit": DIGITS,
    "photo": PHOTOS,
}
KINDS = ("creature", "scene", "digit", "photo")


class LabeledImage(NamedTuple):
    """Pixels (uint8 [64, 64, 3]) and what can be told from them, by head."""

    pixels: np.ndarray
    labels: dict[str, str]


class ImagePool(NamedTuple):
    """Images of one kind: pixels [N, 64, 64, 3], and the labels of each."""

    pixels: np.ndarray
    labels: list[dict[str, str]]

    def sample(self, rng: random.Random) -> LabeledImage:
        """Draw one image.

        Args:
            rng: Source of randomness.

        Returns:
            The image and its labels.
        """
        index = rng.randrange(len(self.labels))
        return LabeledImage(self.pixels[index], self.labels[index])


def _creatures(world: World, split: str) -> Iterator[tuple[Callable, dict[str, str]]]:
    for creature in world.trained:
        labels = {"creature": str(creature.index), **creature.appearance._asdict()}
        for i in range(NUM_RENDERINGS[split]):
            yield (lambda c=creature, i=i: drawing.creature(c.appearance, f"{split}{i}")), labels


def _digits(split: str) -> Iterator[tuple[Callable, dict[str, str]]]:
    values = drawing.digits()[1]
    for index in digit_indices(split):
        for copy in range(DIGIT_COPIES[split]):
            labels = {"digit": DIGITS[values[index]]}
            yield (lambda i=index, c=copy: drawing.digit(i, f"{split}{c}")), labels


def _photos(split: str) -> Iterator[tuple[Callable, dict[str, str]]]:
    for label in PHOTOS:
        for i in range(NUM_CROPS[split]):
            yield (lambda n=label, i=i: drawing.photo(n, f"{split}{i}")), {"photo": label}


def _draw_all(world: World, split: str) -> dict[str, ImagePool]:
    pools = {}
    jobs = {"creature": _creatures(world, split), "digit": _digits(split), "photo": _photos(split)}
    for kind, job in jobs.items():
        drawn = [(np.asarray(render()), labels) for render, labels in job]
        pools[kind] = ImagePool(np.stack([d[0] for d in drawn]), [d[1] for d in drawn])
    scenes = [drawing.scene(f"{split}{i}") for i in range(NUM_SCENES[split])]
    pools["scene"] = ImagePool(
        np.stack([np.asarray(s.image) for s in scenes]),
        [{k: getattr(s, k) for k in ("count", "scene_color", "scene_shape")} for s in scenes],
    )
    return pools


def load_pools(world: World, split: str, cache: Path) -> dict[str, ImagePool]:
    """The images of a split by kind, drawn (about a minute) or read from a cache.

    Args:
        world: The micro world.
        split: `train` or `test`.
        cache: Folder of the cache.

    Returns:
        Pools by kind.
    """
    path = cache / f"pictures-{split}.safetensors"
    if not path.exists():
        drawn = _draw_all(world, split)
        arrays = {f"{kind}.pixels": pool.pixels for kind, pool in drawn.items()}
        for kind, pool in drawn.items():
            for head in pool.labels[0]:
                codes = [VISION_HEADS[head].index(labels[head]) for labels in pool.labels]
                arrays[f"{kind}.{head}"] = np.array(codes, np.int64)
        half = path.with_suffix(".part")
        save_file(arrays, half)
        half.replace(path)
    arrays = load_file(path)
    image_pools = {}
    for kind in KINDS:
        heads = [k.split(".")[1] for k in arrays if k.startswith(kind + ".") and "pixels" not in k]
        columns = {
            h: [VISION_HEADS[h][code] for code in arrays[f"{kind}.{h}"]] for h in sorted(heads)
        }
        labels = [dict(zip(columns, row)) for row in zip(*columns.values())]
        image_pools[kind] = ImagePool(arrays[f"{kind}.pixels"], labels)
    return image_pools


def augment(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Shift images by up to 4 pixels (edges repeated), and vary gain, tint and bias.

    Args:
        pixels: Bytes, [B, 64, 64, 3].
        rng: Source of randomness.

    Returns:
        Bytes, [B, 64, 64, 3].
    """
    noise = np.random.RandomState(rng.randrange(1 << 30))
    rows = len(pixels)
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    down, across = noise.randint(0, 9, rows), noise.randint(0, 9, rows)
    moved = np.stack(
        [
            padded[b, down[b] : down[b] + IMAGE_SIZE, across[b] : across[b] + IMAGE_SIZE]
            for b in range(rows)
        ]
    ).astype(np.float32)
    moved *= noise.uniform(0.88, 1.12, (rows, 1, 1, 3)).astype(np.float32)
    moved += noise.uniform(-12, 12, (rows, 1, 1, 1)).astype(np.float32)
    return np.clip(moved, 0, 255).astype(np.uint8)
