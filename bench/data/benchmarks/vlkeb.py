"""VLKEB (NeurIPS 2024): entity edits on MMKG images, with portability over one to four hops.

`train.json` 5,000, `eval.json` 3,174, `eval_edit_onehop.json` 1,278, `eval_multihop.json` 4,819
portability questions. Images are in `VLKEB_images/m.<id>/` (LiveEdit expects `mmkb_images/`). The
fields are MMEdit's eleven and `port_new`, which has two schemas with different keys. `pred` is a
Wikipedia title with underscores.

The gap protocol is `sequential` with `gaps = [10, 20, 50, 100]`. For the edit-one-hop protocol,
read `eval_edit_onehop.json` as benchmark "vlkeb-edit-onehop" and run `sequential` with
`sequence_length = 2`. Each record gives two cases: the entity edit, then the text-only edit of the
bridging fact (`id+hop`) with the portability question about the entity's image. The reference row
of portability without any edit is the `base` of every result.
"""

from __future__ import annotations

from collections.abc import Iterator

from errata.bench.data.benchmarks.mmedit import Record as Common
from errata.bench.data.benchmarks.mmedit import anomalies, images
from errata.bench.data.reading.benchmark import (
    Benchmark,
    Hop,
    RecordContext,
    SkipRecord,
    portability,
)
from errata.bench.data.reading.common_probes import common_probes
from errata.functional.errors import InvalidInputError
from errata.functional.queries import Case, Query

__all__ = ["EDIT_ONEHOP", "VLKEB", "Record", "case", "second_edit"]


class Record(Common, frozen=True):
    """MMEdit's fields and, in the portability files, `port_new`."""

    port_new: list[Hop] | None = None


def case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert a record to a case. Its `portability_<n>hop` probes use the edit's image.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The edit and its probes.

    Raises:
        InvalidInputError: If a portability item or an image name is invalid, or a missing image is
            an error.
        SkipRecord: If the target is empty, or `options.hop` is set and no question has that hop.
    """
    if not record.alt.strip():
        raise SkipRecord("the target is empty")
    edit = Query(
        context.clean_text(record.src),
        context.clean_text(record.alt),
        context.find_images(record.image),
    )
    probes = common_probes(record, edit, context)
    return Case(name, edit, {**probes, **portability(record.port_new, edit.images, context)})


def second_edit(record: Record) -> Query:
    """Make the text-only second edit of the edit-one-hop protocol.

    The protocol makes both edits and then evaluates portability.

    Args:
        record: A record of the file.

    Returns:
        The query of the first item that has `port_edit_q` and `port_edit_a`.

    Raises:
        InvalidInputError: If there is none.

    References:
        VLKEB branch `edit_onehop`, `MultimodalTrainer.py:57-75`.
    """
    for item in record.port_new or ():
        if item.port_edit_q and item.port_edit_a:
            return Query(item.port_edit_q, item.port_edit_a)
    raise InvalidInputError(
        "port_new must hold port_edit_q and port_edit_a for the edit-one-hop protocol."
    )


def without_portability(record: Record, name: str, context: RecordContext) -> Case:
    """Convert a record to the first case of the edit-one-hop protocol.

    Portability is evaluated after the second edit, so this case has no such probes.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The entity edit, with its other probes.

    Raises:
        InvalidInputError: See `case`.
        SkipRecord: See `case`.
    """
    made = case(record, name, context)
    return made._replace(probes={k: v for k, v in made.probes.items() if "portability" not in k})


def second_edit_case(record: Record, first: Case, context: RecordContext) -> Iterator[Case]:
    """Make the second case of the edit-one-hop protocol.

    Args:
        record: A record of the file.
        first: The case of the first edit.
        context: How the file is read.

    Yields:
        One case: the text-only edit, with the portability probes on the first edit's image.

    Raises:
        InvalidInputError: If the record has no second edit or an invalid portability item.
        SkipRecord: If `options.hop` is set and no question has that hop.
    """
    probes = portability(record.port_new, first.edit.images, context)
    yield Case(f"{first.id}+hop", second_edit(record), probes)


def vlkeb_anomalies(record: Record) -> Iterator[str]:
    """List the anomalies of a record for `errata data verify`. None is an error.

    Args:
        record: A record of the file.

    Yields:
        MMEdit's anomalies, then those of the portability questions.
    """
    yield from anomalies(record)
    for item in record.port_new or ():
        if item.port_edit_a and item.port_edit_a == item.port_a:
            yield "port_edit_a equals port_a"
        if record.alt in item.port_edit_q:
            yield "alt occurs in port_edit_q"
        if record.alt in (item.port_q or ""):
            yield "alt occurs in port_q"


VLKEB = Benchmark(
    "vlkeb",
    "VLKEB",
    Record,
    case,
    images,
    lambda raw, path: (
        "src" in raw and "knowledge_type" not in raw and str(raw.get("image", "")).startswith("m.")
    ),
    vlkeb_anomalies,
)
EDIT_ONEHOP = VLKEB._replace(
    name="vlkeb-edit-onehop",
    title="VLKEB, edit one hop",
    case=without_portability,
    matches=lambda raw, path: False,  # the same files as VLKEB: selected only by name
    follow_up=second_edit_case,
)
