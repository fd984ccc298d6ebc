"""Images: whatever a query holds, opened safely and named by content."""

import os
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, features

from errata.adapters.inputs.images import content_id, open_image
from errata.adapters.inputs.lru_cache import LRUCache
from errata.functional.errors import InvalidInputError


def noise(seed: int = 0, width: int = 12, height: int = 9) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


class Lazy(NamedTuple):
    content_id: str
    image: object

    def load(self):
        return self.image


def test_a_path_an_image_and_a_lazy_one_give_the_same_picture(tmp_path):
    image = noise()
    image.save(tmp_path / "a.png")
    for given in (image, tmp_path / "a.png", str(tmp_path / "a.png"), Lazy("a", image)):
        assert np.array_equal(np.asarray(open_image(given)), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "PA"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = noise().convert("L").convert("I").convert("I;16") if mode == "I;16" else None
    image = image or noise().convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    found = open_image(image)
    assert found.mode == "RGB"
    assert found.size == image.size


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = noise().convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert open_image(tmp_path / "p.png").mode == "RGB"


def test_the_cameras_orientation_is_applied(tmp_path):
    image = noise(width=12, height=6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    image.save(tmp_path / "turned.png", exif=exif)
    found = open_image(tmp_path / "turned.png")
    assert found.size == (6, 12)
    assert np.array_equal(np.asarray(found), np.rot90(np.asarray(image), 3))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match=r"gone\.png' must exist: check the path"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(InvalidInputError, match=r"gone\.png' must be a file that can be read"):
        content_id(tmp_path / "gone.png")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(InvalidInputError, match="is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_truncated_file_is_refused_by_name(form, tmp_path):
    if form == "WEBP":
        assert features.check("webp")
    path = tmp_path / f"cut.{form.lower()}"
    noise(width=80, height=80).save(path, form)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InvalidInputError, match=r"cut\."):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_refused(content, tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    with pytest.raises(
        InvalidInputError, match=r"page\.jpg' must be an image .*convert it or take it out"
    ):
        open_image(path)


@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_bomb_is_refused_before_it_is_decoded(factor, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    noise(width=100, height=100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / factor))
    with pytest.raises(InvalidInputError, match=r"bomb\.png' must have at most [\d,]+ pixels"):
        open_image(path)


@pytest.mark.parametrize("thing", [3, None, b"bytes", Lazy("x", "no image"), Lazy("", noise())])
def test_anything_else_is_refused(thing):
    with pytest.raises(InvalidInputError, match="must"):
        [content_id(thing), open_image(thing)]


def test_keys_follow_the_content(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    noise(1).save(first)
    second.write_bytes(first.read_bytes())
    assert content_id(first) == content_id(second) == content_id(str(first))
    assert content_id(noise(1)) == content_id(noise(1).convert("RGBA").convert("RGB"))
    assert content_id(noise(1)) != content_id(noise(2))
    assert content_id(noise(1, 12, 9)) != content_id(noise(1, 9, 12))
    assert content_id(Lazy("mine", None)) == "mine"


def test_a_file_that_changes_has_another_key(tmp_path):
    path = tmp_path / "a.png"
    noise(1).save(path)
    before = content_id(path)
    noise(2).save(path)
    os.utime(path, ns=(1, 1))
    assert content_id(path) != before


def test_the_cache_makes_once_and_forgets_the_oldest():
    made = []

    def make(name: str):
        made.append(name)
        return {"pixels": torch.zeros(25)}  # 100 bytes

    cache = LRUCache(max_bytes=250)
    for name in "aba":
        cache.get(name, lambda name=name: make(name))
    assert made == ["a", "b"]
    cache.get("c", lambda: make("c"))  # b is the one used longest ago
    cache.get("a", lambda: make("a"))
    cache.get("b", lambda: make("b"))
    assert made == ["a", "b", "c", "b"]
    assert cache.num_bytes <= cache.max_bytes


def test_a_value_larger_than_the_cache_is_not_kept():
    cache = LRUCache(max_bytes=50)
    assert cache.get("a", lambda: torch.zeros(25)).numel() == 25
    assert len(cache) == 0
    assert cache.num_bytes == 0


def test_threads_share_a_cache():
    cache = LRUCache(max_bytes=10_000)
    seen: list[int] = []

    def work(start: int) -> None:
        for step in range(200):
            name = (start + step) % 30
            seen.append(int(cache.get(name, lambda name=name: torch.full((50,), name))[0]) - name)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0] * 800
    assert 0 < cache.num_bytes <= cache.max_bytes
