"""ADS-Edit (2025): driving scenes as a video, as several views, or as one picture.

`image` and `image_rephrase` change type with `image_type`: a list of frame paths (video), an object
of camera names to paths (multi-image), or one string (single-image), which in the CODA-LM part ends
in `.json` and stands for the picture of the same name. nuScenes frames are named `../nuscenes/...`:
the leading `../` is dropped, so they are looked for under the image root. There is no `pred`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from errata.bench.data.reading.benchmark import Benchmark, RecordContext, SkipRecord
from errata.bench.data.reading.common_probes import common_probes
from errata.functional.errors import InvalidInputError
from errata.functional.queries import Case, Query

__all__ = ["ADS_EDIT", "ImagePaths", "Record", "anomalies", "case", "named_paths"]

ImagePaths = str | list[str] | dict[str, str]


class Record(msgspec.Struct, frozen=True):
    """One driving scene and its edit."""

    image_type: str
    src: str
    alt: str
    image: ImagePaths
    image_rephrase: ImagePaths = ""
    rephrase: str = ""
    data_type: str = ""
    source: str = ""
    loc: str = ""
    loc_ans: str = ""
    m_loc: str = ""
    m_loc_q: str = ""
    m_loc_a: str = ""


_IMAGE_TYPES = ("video", "multi-image", "single-image")


def named_paths(images: ImagePaths) -> list[tuple[str, str]]:
    """(view or frame number, path) in order, whatever type the field has.

    >>> named_paths(["a.jpg", "b.jpg"]), named_paths({"CAM_FRONT": "f.jpg"}), named_paths("x.json")
    ([('0', 'a.jpg'), ('1', 'b.jpg')], [('CAM_FRONT', 'f.jpg')], [('', 'x.json')])
    """
    if isinstance(images, str):
        return [("", images)] if images else []
    if isinstance(images, Mapping):
        return list(images.items())
    return [(str(frame), path) for frame, path in enumerate(images)]


def case(record: Record, name: str, context: RecordContext) -> Case:
    """A record as a case; the frames of a video are one video to the model."""
    if record.image_type not in _IMAGE_TYPES:
        raise InvalidInputError(
            f"image_type must be one of {_IMAGE_TYPES}; got {record.image_type!r}."
        )
    if not record.alt.strip():
        raise SkipRecord("the target is empty")
    video = record.image_type == "video"

    def open_images(images: ImagePaths) -> tuple[Any, ...]:
        return tuple(one for _, path in named_paths(images) for one in context.find_images(path))

    edit = Query(
        context.clean_text(record.src),
        context.clean_text(record.alt),
        open_images(record.image),
        video,
    )
    probes = common_probes(record, edit, context)
    if record.image_rephrase:
        probes["image_rephrase"] = (edit._replace(images=open_images(record.image_rephrase)),)
    return Case(name, edit, probes)


def images(record: Record) -> Iterator[str]:
    """Every image name of a record."""
    for field in (record.image, record.image_rephrase, record.m_loc):
        yield from (path for _, path in named_paths(field))


def anomalies(record: Record) -> Iterator[str]:
    """What `errata data verify` counts."""
    kind = {str: "a string", list: "a list", dict: "an object"}[type(record.image)]
    yield f"{record.image_type}: image is {kind}"
    if any(path.endswith(".json") for _, path in named_paths(record.image)):
        yield "image is named .json"
    if any(path.startswith("../") for _, path in named_paths(record.image)):
        yield "image is named ../"


ADS_EDIT = Benchmark(
    "ads-edit",
    "ADS-Edit",
    Record,
    case,
    images,
    lambda raw, path: "image_type" in raw,
    anomalies,
    allow_parent_paths=True,
)
