"""One image has one identity: in records, in caches, and out of a delta."""

from __future__ import annotations

import pytest
from PIL import Image

from errata.adapters.inputs import images
from errata.functional import hashing
from errata.functional.queries import encoded_image


def make_image(mode: str) -> Image.Image:
    image = Image.new("RGB", (5, 3))
    image.putdata([(16 * k, 255 - k, k) for k in range(15)])
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_records_and_caches_agree(mode, tmp_path):
    image = make_image(mode)
    name = hashing.content_id(image)
    assert images.content_id(image) == name
    assert hashing.content_id(images.open_image(image)) == name
    assert hashing.content_id(image.convert("RGB")) == name
    path = tmp_path / "image.tiff"
    image.save(path)
    assert images.content_id(path) == images.content_id(str(path)) == hashing.content_id(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_orientation_is_applied(orientation):
    image = make_image("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    upright = images.open_image(image)
    assert hashing.content_id(image) == hashing.content_id(upright) == images.content_id(image)


def test_transparent_palettes_and_images_of_a_delta():
    image = make_image("P")
    image.info["transparency"] = 0
    assert hashing.content_id(image) == images.content_id(images.open_image(image))
    stored = encoded_image(images.encode_png(make_image("RGB")))
    assert images.content_id(stored) == hashing.content_id(stored) == stored.content_id
    assert images.open_image(stored).tobytes() == make_image("RGB").tobytes()
