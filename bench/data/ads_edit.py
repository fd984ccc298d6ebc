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

from errata.functional.errors import BadInput
from errata.functional.queries import Case, Query

from .loading import Benchmark, Skipped, Source
from .mmedit import common_probes

__all__ = ["ADS_EDIT", "Pictures", "Record", "case", "named", "oddities"]

Pictures = str | list[str] | dict[str, str]


class Record(msgspec.Struct, frozen=True):
    """One driving scene and its edit."""

    image_type: str
    src: str
    alt: str
    image: Pictures
    image_rephrase: Pictures = ""
    rephrase: str = ""
    data_type: str = ""
    source: str = ""
    loc: str = ""
    loc_ans: str = ""
    m_loc: str = ""
    m_loc_q: str = ""
    m_loc_a: str = ""


_TYPES = ("video", "multi-image", "single-image")


def named(pictures: Pictures) -> list[tuple[str, str]]:
    """(view or frame number, path) in order, whatever type the field has.

    >>> named(["a.jpg", "b.jpg"]), named({"CAM_FRONT": "f.jpg"}), named("x.json")
    ([('0', 'a.jpg'), ('1', 'b.jpg')], [('CAM_FRONT', 'f.jpg')], [('', 'x.json')])
    """
    if isinstance(pictures, str):
        return [("", pictures)] if pictures else []
    if isinstance(pictures, Mapping):
        return list(pictures.items())
    return [(str(frame), path) for frame, path in enumerate(pictures)]


def case(record: Record, name: str, source: Source) -> Case:
    """A record as a case; the frames of a video are one video to the model."""
    if record.image_type not in _TYPES:
        raise BadInput(f"image_type must be one of {_TYPES}; got {record.image_type!r}.")
    if not record.alt.strip():
        raise Skipped("the target is empty")
    video = record.image_type == "video"

    def shown(pictures: Pictures) -> tuple[Any, ...]:
        return tuple(one for _, path in named(pictures) for one in source.image(path))

    edit = Query(source.text(record.src), source.text(record.alt), shown(record.image), video)
    probes = common_probes(record, edit, source)
    if record.image_rephrase:
        probes["image_rephrase"] = (edit._replace(images=shown(record.image_rephrase)),)
    return Case(name, edit, probes)


def images(record: Record) -> Iterator[str]:
    """Every image name of a record."""
    for field in (record.image, record.image_rephrase, record.m_loc):
        yield from (path for _, path in named(field))


def oddities(record: Record) -> Iterator[str]:
    """What `errata data check` counts."""
    kind = {str: "a string", list: "a list", dict: "an object"}[type(record.image)]
    yield f"{record.image_type}: image is {kind}"
    if any(path.endswith(".json") for _, path in named(record.image)):
        yield "image is named .json"
    if any(path.startswith("../") for _, path in named(record.image)):
        yield "image is named ../"


ADS_EDIT = Benchmark(
    "ads-edit",
    "ADS-Edit",
    Record,
    case,
    images,
    lambda raw, path: "image_type" in raw,
    oddities,
    above=True,
)
