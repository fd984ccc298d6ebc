"""Drawings: a key fixes the pixels, and what is drawn is what the answers say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from errata.bench.data.world import drawing
from errata.bench.data.world.world import COLORS, COUNTS, PHOTOS, World

SHEET = Path(__file__).parents[3] / "golden" / "zoo_sheet.png"


def sheet() -> Image.Image:
    """Eight creatures, scenes, digits and photographs, as the shipped models saw them."""
    creatures = [drawing.creature(c.appearance, "sheet") for c in World().trained[:8]]
    scenes = [drawing.scene(f"sheet{i}").image for i in range(8)]
    digits = [drawing.digit(i, "sheet") for i in range(8)]
    photos = [drawing.photo(label, "sheet") for label in PHOTOS[:8]]
    whole = Image.new("RGB", (8 * 64, 4 * 64))
    for y, row in enumerate((creatures, scenes, digits, photos)):
        for x, photo in enumerate(row):
            whole.paste(photo, (64 * x, 64 * y))
    return whole


def test_drawings_are_those_the_models_were_trained_on():
    # Pillow may change its anti-aliasing: a few grey levels on some edges are harmless
    with Image.open(SHEET) as golden:
        want = np.asarray(golden.convert("RGB"), np.float32)
    got = np.asarray(sheet(), np.float32)
    assert np.abs(got - want).mean() < 1.0
    assert np.percentile(np.abs(got - want), 99) < 16.0


@pytest.mark.parametrize(
    "paint",
    [
        lambda key: drawing.creature(World().trained[0].appearance, key),
        lambda key: drawing.scene(key).image,
        lambda key: drawing.digit(3, key),
        lambda key: drawing.photo("cat", key),
    ],
    ids=["creature", "scene", "digit", "photo"],
)
def test_a_key_fixes_the_pixels(paint):
    one, again, other = (np.asarray(paint(key)) for key in ("a", "a", "b"))
    assert one.shape == (64, 64, 3)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_creature_shows_its_colour():
    plain = next(c for c in World().trained if c.appearance.pattern == "plain")
    middle = np.asarray(drawing.creature(plain.appearance, "colour"), np.float32)[
        34:42, 28:36
    ].mean((0, 1))
    nearest = min(COLORS, key=lambda name: float(np.abs(middle - COLORS[name]).sum()))
    assert nearest == plain.appearance.color


def test_scenes_hold_as_many_shapes_as_they_say():
    counts = {drawing.scene(str(i)).count for i in range(60)}
    assert counts == set(COUNTS)


def test_the_shipped_digits_and_photographs_are_whole():
    images, values = drawing.digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 16
    assert set(values.tolist()) == set(range(10))
    assert all(min(drawing.photograph(label).size) == 128 for label in PHOTOS)
