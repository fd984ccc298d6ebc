"""Odd images and texts: read by a documented rule, or refused in one sentence."""

from __future__ import annotations

import functools
import io
import os
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from errata.adapters import PromptTemplate, from_module, tiny_model
from errata.adapters.inputs.images import content_id, encode_png, open_image
from errata.functional import Query
from errata.functional.errors import ErrataError, InvalidInputError
from errata.functional.queries import encoded_image

SOME = np.array([[0, 60], [180, 255]])


def is_short(error: Exception) -> None:
    assert len(str(error)) <= 2000
    assert "\n" not in str(error)


def pixels(image) -> list[int]:
    return np.asarray(open_image(image))[..., 0].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("array", "mode", "want"),
    [
        (SOME.astype(np.uint8), "L", [0, 60, 180, 255]),
        ((SOME * 257).astype(np.uint16), "I;16", [0, 60, 180, 255]),
        ((SOME * 257).astype(">u2"), "I;16B", [0, 60, 180, 255]),
        ((SOME * 257).astype(np.int32), "I", [0, 60, 180, 255]),
        (SOME.astype(np.int32), "I", [0, 60, 180, 255]),
        ((SOME / 255).astype(np.float32), "F", [0, 60, 180, 255]),
        (SOME.astype(np.float32), "F", [0, 60, 180, 255]),
    ],
)
def test_greys_of_other_ranges_keep_their_content(array, mode, want, tmp_path):
    height, width = array.shape
    image = Image.frombytes(mode, (width, height), array.tobytes())
    assert pixels(image) == want
    if mode in ("I;16", "F"):
        image.save(tmp_path / "image.tiff")
        assert pixels(tmp_path / "image.tiff") == want
    if mode == "I;16":
        image.save(tmp_path / "image.png")
        assert pixels(tmp_path / "image.png") == want


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.array([[-1, 5]], np.int32)), "its are from -1 to 5"),
        (Image.fromarray(np.array([[0, 70_000]], np.int32)), "its are from 0 to 70000"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), "from nan to nan"),
        (Image.fromarray(np.array([[0, 1e9]], np.float32)), "from 0 to 1e[+]09"),
        (Image.new("LAB", (2, 2)), "its mode is 'LAB'"),
        (Image.new("RGB", (0, 4)), "must have pixels, and is 0 x 4"),
        (Image.new("RGB", (4, 0)), "must have pixels, and is 4 x 0"),
    ],
)
def test_what_has_no_meaning_is_refused(image, message):
    for read in (open_image, encode_png):
        with pytest.raises(InvalidInputError, match=message):
            read(image)


def test_two_16_bit_images_never_have_one_name():
    one, two = (Image.fromarray(np.full((2, 2), v, np.uint16)) for v in (40_000, 50_000))
    assert content_id(one) != content_id(two)


def test_a_closed_or_truncated_image_is_said(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    cut = Image.open(io.BytesIO(data[: len(data) // 2]))
    closed = Image.open(tmp_path / "whole.png")
    closed.close()
    for image in (cut, closed):
        for read in (open_image, content_id):
            with pytest.raises(InvalidInputError, match="64 x 64 image in memory must be .*whole"):
                read(image)


def test_a_png_of_a_delta_has_the_pixel_limit_of_any_image():
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.new("1", (13_000, 13_000)).save(data, "PNG")
        with pytest.raises(InvalidInputError, match="must have at most .* pixels"):
            open_image(encoded_image(data.getvalue()))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_refused_at_once(make, tmp_path):
    path = tmp_path / "odd.png"
    make(path)
    for read in (open_image, content_id):
        with pytest.raises(InvalidInputError, match="must be a file, and is a pipe or a device"):
            read(path)


@pytest.mark.parametrize("path", ["a\0b.png", "", "x" * 5000, "/dev/null/x.png"])
def test_paths_that_can_not_be(path):
    for read in (open_image, content_id):
        with pytest.raises(InvalidInputError) as caught:
            read(path)
        assert len(str(caught.value)) < 2000 + len(path) * 2


@functools.cache
def model(name: str):
    return from_module(*tiny_model(name))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_what_a_processor_refuses_names_the_query_and_the_image(name, tmp_path):
    Image.new("RGB", (600, 2)).save(tmp_path / "thin.png")
    good = Query("what is it?", "an owl", Image.new("RGB", (40, 40)))
    bad = Query("how long is it?", "long", tmp_path / "thin.png")
    with pytest.raises(InvalidInputError, match=r"query 2 .*how long.*thin\.png.*aspect ratio"):
        model(name).preprocess([good, bad])


def test_a_long_text_is_refused_before_it_is_tokenised():
    class Refusing:
        def __getattr__(self, name):
            raise AssertionError("the tokenizer was asked")

    reader = model("llava").preprocess
    parts = reader.parts
    reader.parts = parts._replace(tokenizer=Refusing())
    try:
        with pytest.raises(InvalidInputError, match="20,000,003 characters: shorten"):
            reader([Query("a" * 20_000_000, "owl")])
    finally:
        reader.parts = parts


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "llava_onevision", "llama"])
def test_special_tokens_in_a_target_are_refused_unless_asked_for(name):
    module, processor = tiny_model(name)
    query = Query("what is it?", "an owl</s> and more")
    with pytest.raises(InvalidInputError, match="holds the special token"):
        from_module(module, processor).preprocess([query])
    wanted = PromptTemplate(special_targets=True)
    assert from_module(module, processor, template=wanted).preprocess([query]).labels.numel()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("template", ["default", "plain"])
def test_a_video_placeholder_is_read_as_an_image_placeholder_is(name, template):
    reader = from_module(*tiny_model(name), template=template).preprocess
    frames = tuple(Image.new("RGB", (56, 56), (60 * n, 10, 10)) for n in range(4))
    one, two = (
        reader([Query(f"look {word} here", "owl", frames, video=True)])
        for word in ("<image>", "<video>")
    )
    assert one.input_ids.tolist() == two.input_ids.tolist()


# ------------------------------------------------------------------ properties

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]


@st.composite
def images(draw):
    mode = draw(st.sampled_from(MODES))
    size = draw(st.tuples(st.integers(0, 40), st.integers(0, 40)))
    image = Image.new(mode, size)
    data = draw(st.binary(max_size=64))
    if data and 0 not in size:
        length = len(image.tobytes())
        repeated = (data * (length // len(data) + 1))[:length]
        image = Image.frombytes(mode, size, repeated)
    image.info = draw(
        st.sampled_from([{}, {"transparency": 0}, {"exif": b"Exif\0\0junk"}, {"icc_profile": b"x"}])
    )
    return image


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(images())
def test_any_image_is_rgb_or_one_sentence(image):
    try:
        opened = open_image(image)
    except InvalidInputError as error:
        is_short(error)
        return
    assert opened.mode == "RGB"
    assert opened.size == image.size
    assert content_id(image) == content_id(image.copy())


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.data())
def test_any_bytes_are_an_image_or_one_sentence(tmp_path_factory, data):
    raw = bytearray(_png())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    path = tmp_path_factory.getbasetemp() / "odd.png"
    path.write_bytes(cut)
    for image in (path, encoded_image(cut)):
        try:
            assert open_image(image).mode == "RGB"
        except InvalidInputError as error:
            is_short(error)


@functools.cache
def _png() -> bytes:
    data, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 50)
    Image.effect_noise((24, 16), 80).convert("P").save(data, "PNG", pnginfo=info, transparency=3)
    return data.getvalue()


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.text(max_size=60), st.text(max_size=30))
def test_any_text_is_read_or_one_sentence(prompt, target):
    for name in ("llava", "qwen2_vl"):
        try:
            inputs = model(name).preprocess([Query(prompt, target)])
        except ErrataError as error:
            is_short(error)
        else:
            assert bool((inputs.labels >= 0).any()) == bool(target)
