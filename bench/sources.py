"""From the words of a settings file to values: models, cases, pictures."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from errata.functional.errors import InvalidInputError, InvalidSettingsError, join_messages
from errata.functional.records import content_id
from errata.functional.types import Case, Query

from .settings import BenchmarkCases, ModelSettings, RunSettings, WorldCases, unknown_name

if TYPE_CHECKING:
    from errata.functional import Model

__all__ = [
    "validate_cases",
    "validate_settings",
    "open_cases",
    "open_model",
    "image_file_name",
    "thumbnail",
    "questions_of",
    "find_unknown_names",
]

MICRO_PREFIX, TINY_PREFIX = "micro/", "tiny/"


def open_model(settings: ModelSettings) -> Model:
    """The model a settings file or command line names.

    `micro/NAME` is a trained model of the micro zoo, `tiny/NAME` a random one; anything else is a
    folder or a hub id. Raises BadInput for NaN weights, ModelUnsupported for families not served.
    """
    import torch

    from errata import adapters
    from errata.adapters.zoo import load_micro_parts

    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    device = _parse_device(settings.device)
    for start, parts in ((MICRO_PREFIX, load_micro_parts), (TINY_PREFIX, adapters.tiny_model)):
        if settings.id.startswith(start):
            module, processor = parts(settings.id.removeprefix(start))
            module = module.to(device=device, dtype=dtype)
            return adapters.from_module(
                module, processor, template=settings.template, id=settings.id
            )
    return adapters.from_pretrained(
        settings.id,
        dtype=dtype,
        device=device,
        revision=settings.revision or None,
        template=settings.template,
    )


def validate_settings(settings: RunSettings) -> None:
    """Refuse what can be known to be missing before anything is loaded, all of it at once.

    Raises BadSettings, see `unknown_names`.
    """
    faults = find_unknown_names(msgspec.to_builtins(settings))
    if faults:
        raise InvalidSettingsError(f"{join_messages(faults)}.")


def find_unknown_names(raw: Mapping[str, Any]) -> list[str]:
    """What a table of settings names that is not there, a sentence each.

    Looks for micro and tiny models by name, folders, templates, devices, scorers and relations;
    passes over what has no such shape, for that is said by its type.
    """
    from errata import adapters
    from errata.functional.metrics import SCORERS

    from .data.world import FACTS

    faults = []
    for number, choice in enumerate(_as_sequence(raw.get("models"))):
        if not isinstance(choice, Mapping):
            continue
        where = f"models[{number}]"
        if isinstance(id := choice.get("id"), str):
            faults += [f"{where}.id{fault}" for fault in _missing_model(id)]
        template = choice.get("template", "default")
        if isinstance(template, str) and template not in adapters.TEMPLATES:
            faults.append(f"{where}.template: {unknown_name(template, adapters.TEMPLATES)}")
        if isinstance(device := choice.get("device", "cpu"), str):
            try:
                _parse_device(device)
            except InvalidSettingsError as fault:
                faults.append(f"{where}.{str(fault).rstrip('.')}")
    cases = raw.get("cases")
    relations = _as_sequence(cases.get("relations")) if isinstance(cases, Mapping) else []
    named = {
        "scorers": (_as_sequence(raw.get("scorers")), SCORERS),
        "cases.relations": (relations, FACTS),
    }
    for where, (names, known) in named.items():
        faults += [
            f"{where}: {unknown_name(name, known)}"
            for name in names
            if isinstance(name, str) and name not in known
        ]
    return faults


def _missing_model(id: str) -> list[str]:
    """What is wrong with a model's id, as far as can be known without loading it."""
    from errata.adapters.tiny import TINY as tinies
    from errata.adapters.zoo import micro_names

    faults = []
    for start, known in ((MICRO_PREFIX, micro_names()), (TINY_PREFIX, tuple(tinies))):
        name = id.removeprefix(start)
        if id.startswith(start) and name not in known:
            faults.append(f": {unknown_name(name, known)}")
    if id.startswith((".", "/", "~")) and not Path(id).is_dir():
        faults.append(f" must be a folder or a hub id; {id} is no folder")
    return faults


def _as_sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _parse_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise InvalidSettingsError(
            f"device must be one that torch can use here, e.g. 'cpu' or 'cuda:0'; got {name!r} "
            f"({reason})."
        ) from None
    return device


def open_cases(source: WorldCases | BenchmarkCases) -> list[Case]:
    """The cases a settings file asks for, in order.

    Raises BadInput when the source has fewer than `skip` + 1, or a file that can not be read.
    """
    if isinstance(source, WorldCases):
        from .data.world import cases

        world_cases = cases(
            source.skip + source.num_cases,
            source.seed,
            split=source.split,
            subjects=source.subjects,
            relations=source.relations,
        )
        return world_cases[source.skip :]
    from .data import ReadOptions
    from .data import open_cases as read

    path = Path(source.path)
    if not path.exists():
        raise InvalidInputError(f"cases.path must be an annotation file; there is none at {path}.")
    options = ReadOptions(
        image_root=source.image_root,
        missing_images=source.missing_images,
        invalid_records=source.invalid_records,
        template=source.template,
        clean_rephrases=source.clean_rephrases,
        strip_whitespace=source.strip_whitespace,
        fix_encoding=source.fix_encoding,
        hop=source.hop,
        num_neighbors=source.num_neighbors,
        neighbor_answers=source.neighbor_answers,
        start=source.skip,
    )
    loaded_cases = list(
        islice(read(path, options, benchmark=source.benchmark), source.num_cases or None)
    )
    if not loaded_cases:
        raise InvalidInputError(
            f"{path} must hold cases after the first {source.skip}; it has none."
        )
    return loaded_cases


def questions_of(case: Case) -> list[tuple[str, int, Query]]:
    """What is asked about a case, in the order of its rows: (probe, index, query).

    `reliability` is the edit itself where the case does not ask it otherwise.
    """
    probes = {"reliability": (case.edit,), **case.probes}
    return [(name, i, query) for name, asked in probes.items() for i, query in enumerate(asked)]


def validate_cases(cases: Sequence[Case]) -> None:
    """Refuse cases that can not be edited or scored, all of them at once, before any work.

    Raises BadInput.
    """
    faults = []
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            faults.append(f"case {case.id!r} comes twice")
        seen.add(case.id)
        for probe, index, query in questions_of(case):
            if not query.target.strip():
                faults.append(f"case {case.id!r}, {probe}[{index}]: the target is empty")
    if faults:
        raise InvalidInputError(
            f"every query must have a target and every case a name: {join_messages(faults)}."
        )


def image_file_name(image: Any) -> str:
    """A short name of a picture's content, fit for a file.

    >>> class Dot:
    ...     content_id = "dot"
    >>> image_file_name(Dot())
    'e392dad8b08599f7'
    """
    return hashlib.sha256(content_id(image).encode()).hexdigest()[:16]


def thumbnail(image: Any, side: int = 224) -> bytes:
    """A picture as PNG, made small: what the report shows. Raises BadInput, see `picture`."""
    from errata.adapters.images import open_image

    small = open_image(image).copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "PNG")
    return data.getvalue()
