"""KnowEdit (text only): ZsRE, wiki_recent, wiki_counterfact, WikiBio; original schema and ICE's.

Answers may be a string, a list of aliases, or a list of lists of aliases. The first that is not
empty is scored under teacher forcing. Any of them counts as correct in free generation. WikiBio
names its fields `text`, `labels`, `concept`. ICE's files add `context`, five statements of the new
fact. They are checked and counted but are in no case, since no editor here uses them. Locality and
portability are objects of kinds, each a list of questions. Kinds become probes
(`text_locality_forgetfulness`, `portability_reasoning`). Every question of a record is used; none
is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from errata.bench.data.reading.benchmark import Benchmark, RecordContext, SkipRecord
from errata.functional.queries import Case, Query

__all__ = ["KNOWEDIT", "ProbeRecord", "Record", "aliases", "anomalies", "case"]

Answers = str | list[str | list[str]] | None


class ProbeRecord(msgspec.Struct, frozen=True):
    """One locality or portability question, with the field names of the file."""

    prompt: str
    ground_truth: Answers = None


class Record(msgspec.Struct, frozen=True):
    """One fact and its edit, in either schema."""

    prompt: str = ""
    text: str = ""
    target_new: str = ""
    labels: str = ""
    subject: str = ""
    concept: str = ""
    ground_truth: Answers = None
    rephrase_prompt: str = ""
    rephrase: str = ""
    locality: dict[str, list[ProbeRecord]] | None = None
    portability: dict[str, list[ProbeRecord]] | None = None
    context: list[str] = []


def aliases(answers: str | Sequence[Any] | None) -> list[str]:
    """Flatten answers to the strings that are not empty, in order.

    Args:
        answers: A string, a list nested to any depth, or None.

    Returns:
        The strings.

    Example:
        >>> aliases([["Paris", "City of Light"], [""]]), aliases("Rome"), aliases(None)
        (['Paris', 'City of Light'], ['Rome'], [])
    """
    if answers is None:
        return []
    if isinstance(answers, str):
        return [answers] if answers.strip() else []
    return [one for part in answers for one in aliases(part)]


def _probes(
    stem: str, kinds: Mapping[str, list[ProbeRecord]] | None, context: RecordContext
) -> dict[str, tuple[Query, ...]]:
    probes = {}
    for kind, items in (kinds or {}).items():
        queries = []
        for item in items:
            if item.prompt and (answers := aliases(item.ground_truth)):
                prompt = (
                    context.wrap_prompt("text_loc", item.prompt) if "loc" in stem else item.prompt
                )
                first, *others = dict.fromkeys(map(context.clean_text, answers))
                queries.append(Query(prompt, first, aliases=tuple(others)))
            else:
                context.skip_counts[f"{stem} question without an answer left out"] += 1
        if queries:
            name = f"{stem}_{re.sub('[^a-z0-9]+', '_', kind.lower())}"
            number = 2
            while name in probes:  # "A-b" and "A_b" are two kinds
                name = f"{name.removesuffix(f'_{number - 1}')}_{number}"
                number += 1
            probes[name] = tuple(queries)
    return probes


def case(record: Record, name: str, context: RecordContext) -> Case:
    """Convert a record to a case without images.

    Args:
        record: A record of the file.
        name: The case's id.
        context: How the file is read.

    Returns:
        The edit and its probes.

    Raises:
        SkipRecord: If the target or the prompt is empty.
    """
    prompt, target = record.prompt or record.text, record.target_new or record.labels
    if not target.strip():
        raise SkipRecord("the target is empty")
    if not prompt.strip():
        raise SkipRecord("the prompt is empty")
    edit = Query(context.clean_text(prompt), context.clean_text(target))
    probes: dict[str, tuple[Query, ...]] = {}
    if rephrased := context.rephrased_prompt(record.rephrase_prompt or record.rephrase):
        probes["rephrase"] = (edit._replace(prompt=rephrased),)
    probes |= _probes("text_locality", record.locality, context)
    probes |= _probes("portability", record.portability, context)
    return Case(name, edit, probes)


def anomalies(record: Record) -> Iterator[str]:
    """List the anomalies of a record for `errata data verify`. None is an error.

    Args:
        record: A record of the file.

    Yields:
        A short description of each.
    """
    target = record.target_new or record.labels
    if target != target.strip():
        yield "target has white space at an end"
    if record.subject != record.subject.strip():
        yield "subject has white space at an end"
    if record.text != record.text.strip():
        yield "text has white space at an end"
    if target in aliases(record.ground_truth):
        yield "target is a true answer already"
    if len(aliases(record.ground_truth)) > 1:
        yield "ground_truth has several answers"
    if isinstance(record.ground_truth, list) and any(
        isinstance(one, list) for one in record.ground_truth
    ):
        yield "ground_truth is nested"
    if record.locality is None:
        yield "no locality"
    if record.portability is None:
        yield "no portability"
    if not all(text.isascii() for text in (record.prompt, record.text, target)):
        yield "not ASCII"
    if record.context and not all(target in one for one in record.context):
        yield "a context lacks the target"


KNOWEDIT = Benchmark(
    "knowedit",
    "KnowEdit",
    Record,
    case,
    lambda record: (),
    lambda raw, path: (
        "image" not in raw
        and bool({"prompt", "text"} & raw.keys())
        and bool({"target_new", "labels"} & raw.keys())
    ),
    anomalies,
)
