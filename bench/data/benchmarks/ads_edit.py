"""ADS-Edit (2025): driving scenes as a video, as several views, or as one image.

The type of `image` and `image_rephrase` depends on `image_type`: a list of frame paths (video), an
object of camera names to paths (multi-image), or one string (single-image). In the CODA-LM part
that string ends in `.json` and means the image of the same name. nuScenes frames are named
`../nuscenes/...`. The leading `../` is dropped, so they are searched for under the image root.
There is no `pred`.
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
    """One driving scene and its edit, with the field names of the file."""

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
    """List the image paths of a field, whatever its type is.

    Args:
        images: The value of `image` or `image_rephrase`.

    Returns:
        Pairs of a name and a path, in order. The name is the camera's, the number of the video
        frame, or "" for a single image.

    Example:
        >>> named_paths(["a.jpg", "b.jpg"])
        [('0', 'a.jpg'), ('1', 'b.jpg')]
        >>> named_paths({"CAM_FRONT": "f.jpg"}), named_paths("x.json")
        ([('CAM_FRONT', 'f.jpg')], [('', 'x.json')])
    """
    if isinstance(images, str):
        return [("", images)] if images else []
    if isinstance(images, Mapping):
        return list(images.items())
    return [(str(frame), path) for frame, path in enumerate(images)]


def case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert a record to a case. The frames of a video are one video of the query.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The edit and its probes.

    Raises:
        InvalidInputError: If `image_type` is unknown, or an image name or a missing image is an
            error.
        SkipRecord: If the target is empty.
    """
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
    """List the image names of a record.

    Args:
        record: A record of the file.

    Yields:
        Every name, as written in the file.
    """
    for field in (record.image, record.image_rephrase, record.m_loc):
        yield from (path for _, path in named_paths(field))


def anomalies(record: Record) -> Iterator[str]:
    """List the anomalies of a record for `errata data verify`. None is an error.

    Args:
        record: A record of the file.

    Yields:
        A short description of each.
    """
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
