"""Images of a benchmark: found, missing, hostile, and drawn."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from errata.adapters.inputs.images import open_image
from errata.bench.data.reading.image_files import (
    ImageFile,
    ImageFolder,
    MissingImageError,
    PlaceholderImage,
    safe_name,
)
from errata.functional.errors import InvalidInputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "val 2014").mkdir()
    for name in ("val 2014/a.png", "val 2014/b.jpg", "test_1.jpg"):
        Image.new("L", (5, 4), 99).save(tmp_path / name)
    return ImageFolder.around(tmp_path / "vqa.json", "", "error")


def test_found_with_a_space_in_its_path_and_read_as_rgb(folder):
    photo = folder.find("val 2014/a.png")
    assert photo.load().mode == "RGB"
    assert photo.load().size == (5, 4)


def test_key_is_of_the_content_not_of_the_name(folder, tmp_path):
    (tmp_path / "copy.png").write_bytes((tmp_path / "val 2014/a.png").read_bytes())
    assert ImageFile(tmp_path / "copy.png").content_id == folder.find("val 2014/a.png").content_id
    assert (
        ImageFile(tmp_path / "val 2014/b.jpg").content_id
        != folder.find("val 2014/a.png").content_id
    )


def test_a_json_name_stands_for_the_picture_of_its_stem(folder):
    assert folder.find("test_1.json").path.name == "test_1.jpg"


@pytest.mark.parametrize("alias", ["images", "VLKEB_images", "mmkb_images", "data_image"])
def test_known_folders_beside_the_file_are_searched(tmp_path, alias):
    (tmp_path / alias / "m.01").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / alias / "m.01/x.png")
    assert ImageFolder.around(tmp_path / "eval.json", "", "error").find("m.01/x.png").load()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd",
        "~/x.png",
        "..\\x.png",
        "C:\\x.png",
        "C:/x.png",
        "\\\\host\\x.png",
        "a/\0.png",
        "",
        ".",
        "file:///etc/passwd/../../..",
    ],
)
def test_names_that_leave_the_root_are_refused(folder, name):
    with pytest.raises(InvalidInputError, match="must be a relative path below the image root"):
        folder.find(name)


def test_only_leading_dots_may_be_dropped_and_only_where_a_benchmark_writes_them():
    assert (
        safe_name("../nuscenes/samples/a.jpg", allow_parent_paths=True) == "nuscenes/samples/a.jpg"
    )
    with pytest.raises(InvalidInputError):
        safe_name("../nuscenes/../../a.jpg", allow_parent_paths=True)
    with pytest.raises(InvalidInputError):
        safe_name("../nuscenes/a.jpg")


def test_missing_says_where_it_looked(folder, tmp_path):
    with pytest.raises(MissingImageError, match="'no.png' is in none of: .*Give the image root"):
        folder.find("no.png")


def test_a_root_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="must be a folder"):
        ImageFolder.around(tmp_path / "x.json", str(tmp_path / "nowhere"), "error")


def test_a_stand_in_is_the_same_every_time_and_another_for_another_name(tmp_path):
    folder = ImageFolder.around(tmp_path / "x.json", "", "placeholder")
    one, again, other = (folder.find(name) for name in ("a.png", "a.png", "b.png"))
    assert isinstance(one, PlaceholderImage)
    assert one.content_id == again.content_id != other.content_id
    assert one.load().tobytes() == again.load().tobytes() != other.load().tobytes()
    assert one.load().size == (224, 224)


def png(width, height):
    """A valid PNG header of any size, without the pixels: what a bomb looks like at first."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    with pytest.raises(InvalidInputError, match=r"at most 89,478,485 pixels"):
        ImageFile(tmp_path / "bomb.png").load()


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", png(50, 50)], ids=str
)
def test_broken_images_are_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"x\.png. must be an? (whole )?image"):
        ImageFile(tmp_path / "x.png").load()


def test_a_picture_that_went_away_is_missing(tmp_path):
    with pytest.raises(MissingImageError, match="does not exist"):
        ImageFile(tmp_path / "gone.png").load()


def test_a_benchmark_reads_an_image_as_a_query_does(tmp_path):
    """16 bits, floats and the camera's orientation: one rule for both ways."""
    values = np.array([[0, 255, 256, 30_000, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "float.tiff")
    turned = Image.effect_noise((6, 3), 90).convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert [p[0] for p in ImageFile(tmp_path / "deep.png").load().get_flattened_data()] == [
        0,
        1,
        1,
        117,
        255,
    ]
    assert ImageFile(tmp_path / "turned.png").load().size == (3, 6)
    for name in ("deep.png", "float.tiff", "turned.png"):
        one, two = open_image(ImageFile(tmp_path / name)), open_image(tmp_path / name)
        assert one.tobytes() == two.tobytes(), name
        assert one.size == two.size


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InvalidInputError, match="pipe or a device"):
        ImageFile(tmp_path / "pipe.png").load()
    with pytest.raises(InvalidInputError, match="pipe or a device"):
        _ = ImageFile(tmp_path / "pipe.png").content_id
