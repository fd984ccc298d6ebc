"""VLKEB (NeurIPS 2024): entity edits on MMKG images, with portability over one to four hops.

`train.json` 5,000, `eval.json` 3,174, `eval_edit_onehop.json` 1,278, `eval_multihop.json` 4,819
portability questions; images in `VLKEB_images/m.<id>/` (LiveEdit expects `mmkb_images/`). The
eleven fields of MMEdit plus `port_new`, whose two schemas are told apart by their keys. `pred` is a
Wikipedia title with underscores.

The gap protocol is `sequential` with `gaps = [10, 20, 50, 100]`. For the edit-one-hop protocol,
read `eval_edit_onehop.json` as benchmark "vlkeb-edit-onehop", which gives two cases a record (the
entity edit, then the text-only edit of the bridging fact, `id+hop`, with the portability question
about the entity's image), and run `sequential` with `sequence_length = 2`. The reference row of
portability without any edit is the `base` of every result.
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
    """A record as a case: `portability_<n>hop` probes ask about the edit's image."""
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
    """The text-only second edit of the edit-one-hop protocol: edit twice, then ask portability.

    VLKEB branch `edit_onehop`, `MultimodalTrainer.py:57-75`. Raises `InvalidInputError` where
    there is none.
    """
    for item in record.port_new or ():
        if item.port_edit_q and item.port_edit_a:
            return Query(item.port_edit_q, item.port_edit_a)
    raise InvalidInputError(
        "port_new must hold port_edit_q and port_edit_a for the edit-one-hop protocol."
    )


def without_portability(record: Record, name: str, context: RecordContext) -> Case:
    """The first of the two edits: its portability is asked after the second one."""
    made = case(record, name, context)
    return made._replace(probes={k: v for k, v in made.probes.items() if "portability" not in k})


def second_edit_case(record: Record, first: Case, context: RecordContext) -> Iterator[Case]:
    """The second edit, after which the first one's image is asked for what follows from both."""
    probes = portability(record.port_new, first.edit.images, context)
    yield Case(f"{first.id}+hop", second_edit(record), probes)


def vlkeb_anomalies(record: Record) -> Iterator[str]:
    """MMEdit's, and what portability questions add."""
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
    matches=lambda raw, path: False,  # the same file: only who asks for it by name means it
    follow_up=second_edit_case,
)
