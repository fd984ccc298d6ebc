"""From the words of a settings file to values: models, cases, pictures."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from errata.functional.errors import BadInput, BadSettings, listed
from errata.functional.records import image_key
from errata.functional.types import Case, Query

from .settings import File, ModelChoice, RunSettings, World, unknown

if TYPE_CHECKING:
    from errata.functional import Model

__all__ = [
    "check_cases", "check_settings", "open_cases", "open_model", "picture_name", "picture_of",
    "queries_of", "unknown_names",
]  # fmt: skip

MICRO, TINY = "micro/", "tiny/"


def open_model(choice: ModelChoice) -> Model:
    """The model a settings file or command line names.

    `micro/NAME` is a trained model of the micro zoo, `tiny/NAME` a random one; anything else is a
    folder or a hub id. Raises BadInput for NaN weights, ModelUnsupported for families not served.
    """
    import torch

    from errata import adapters
    from errata.adapters.zoo import micro_parts

    dtype = None if choice.dtype == "auto" else getattr(torch, choice.dtype)
    device = _device(choice.device)
    for start, parts in ((MICRO, micro_parts), (TINY, adapters.tiny)):
        if choice.id.startswith(start):
            module, processor = parts(choice.id.removeprefix(start))
            module = module.to(device=device, dtype=dtype)
            return adapters.adapt(module, processor, template=choice.template, id=choice.id)
    return adapters.load(
        choice.id, dtype=dtype, device=device, revision=choice.revision or None,
        template=choice.template,
    )  # fmt: skip


def check_settings(settings: RunSettings) -> None:
    """Refuse what can be known to be missing before anything is loaded, all of it at once.

    Raises BadSettings, see `unknown_names`.
    """
    faults = unknown_names(msgspec.to_builtins(settings))
    if faults:
        raise BadSettings(f"{listed(faults)}.")


def unknown_names(raw: Mapping[str, Any]) -> list[str]:
    """What a table of settings names that is not there, a sentence each.

    Looks for micro and tiny models by name, folders, templates, devices, scorers and relations;
    passes over what has no such shape, for that is said by its type.
    """
    from errata import adapters
    from errata.functional.metrics import SCORERS

    from .data.world import FACTS

    faults = []
    for number, choice in enumerate(_list(raw.get("models"))):
        if not isinstance(choice, Mapping):
            continue
        where = f"models[{number}]"
        if isinstance(id := choice.get("id"), str):
            faults += [f"{where}.id{fault}" for fault in _absent(id)]
        template = choice.get("template", "default")
        if isinstance(template, str) and template not in adapters.PRESETS:
            faults.append(f"{where}.template: {unknown(template, adapters.PRESETS)}")
        if isinstance(device := choice.get("device", "cpu"), str):
            try:
                _device(device)
            except BadSettings as fault:
                faults.append(f"{where}.{str(fault).rstrip('.')}")
    cases = raw.get("cases")
    relations = _list(cases.get("relations")) if isinstance(cases, Mapping) else []
    named = {"scorers": (_list(raw.get("scorers")), SCORERS), "cases.relations": (relations, FACTS)}
    for where, (names, known) in named.items():
        faults += [
            f"{where}: {unknown(name, known)}"
            for name in names
            if isinstance(name, str) and name not in known
        ]
    return faults


def _absent(id: str) -> list[str]:
    """What is wrong with a model's id, as far as can be known without loading it."""
    from errata.adapters.tiny import TINY as tinies
    from errata.adapters.zoo import micro_names

    faults = []
    for start, known in ((MICRO, micro_names()), (TINY, tuple(tinies))):
        name = id.removeprefix(start)
        if id.startswith(start) and name not in known:
            faults.append(f": {unknown(name, known)}")
    if id.startswith((".", "/", "~")) and not Path(id).is_dir():
        faults.append(f" must be a folder or a hub id; {id} is no folder")
    return faults


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise BadSettings(
            f"device must be one that torch can use here, e.g. 'cpu' or 'cuda:0'; got {name!r} "
            f"({reason})."
        ) from None
    return device


def open_cases(choice: World | File) -> list[Case]:
    """The cases a settings file asks for, in order.

    Raises BadInput when the source has fewer than `skip` + 1, or a file that can not be read.
    """
    if isinstance(choice, World):
        from .data.world import cases

        made = cases(
            choice.skip + choice.count, choice.seed, split=choice.split,
            subjects=choice.subjects, relations=choice.relations,
        )  # fmt: skip
        return made[choice.skip :]
    from .data import Options
    from .data import open_cases as read

    path = Path(choice.path)
    if not path.exists():
        raise BadInput(f"cases.path must be an annotation file; there is none at {path}.")
    options = Options(
        images=choice.images, on_missing=choice.on_missing, on_fault=choice.on_fault,
        template=choice.template, clean=choice.clean, strip=choice.strip, repair=choice.repair,
        hop=choice.hop, neighbours=choice.neighbours,
        neighbour_answers=choice.neighbour_answers, start=choice.skip,
    )  # fmt: skip
    found = list(islice(read(path, options, benchmark=choice.benchmark), choice.count or None))
    if not found:
        raise BadInput(f"{path} must hold cases after the first {choice.skip}; it has none.")
    return found


def queries_of(case: Case) -> list[tuple[str, int, Query]]:
    """What is asked about a case, in the order of its rows: (probe, index, query).

    `reliability` is the edit itself where the case does not ask it otherwise.
    """
    probes = {"reliability": (case.edit,), **case.probes}
    return [(name, i, query) for name, asked in probes.items() for i, query in enumerate(asked)]


def check_cases(cases: Sequence[Case]) -> None:
    """Refuse cases that can not be edited or scored, all of them at once, before any work.

    Raises BadInput.
    """
    faults = []
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            faults.append(f"case {case.id!r} comes twice")
        seen.add(case.id)
        for probe, index, query in queries_of(case):
            if not query.target.strip():
                faults.append(f"case {case.id!r}, {probe}[{index}]: the target is empty")
    if faults:
        raise BadInput(f"every query must have a target and every case a name: {listed(faults)}.")


def picture_name(image: Any) -> str:
    """A short name of a picture's content, fit for a file.

    >>> class Dot:
    ...     key = "dot"
    >>> picture_name(Dot())
    'e392dad8b08599f7'
    """
    return hashlib.sha256(image_key(image).encode()).hexdigest()[:16]


def picture_of(image: Any, side: int = 224) -> bytes:
    """A picture as PNG, made small: what the report shows. Raises BadInput, see `picture`."""
    from errata.adapters.images import picture

    small = picture(image).copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "PNG")
    return data.getvalue()
