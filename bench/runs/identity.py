"""What the results of a leg depend on, by name, so that a change is found and said.

A leg is one model, editor and protocol. Its parts are settings, versions, and digests of files:
the checkpoint, the editor's trained weights, its demonstrations. What its cases hold is kept per
unit (`UnitState`), so that a corrected record makes its own unit again and no other.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import msgspec

from errata.bench.data.demonstrations import demonstration_cases
from errata.bench.evaluation.questions import questions_of
from errata.bench.protocols.settings import (
    LifelongSettings,
    Protocol,
    SequentialSettings,
    SingleSettings,
)
from errata.bench.runs.settings import EditorSettings, ModelSettings, RunSettings
from errata.bench.runs.sources import model_files, weights_path
from errata.bench.storage.fingerprints import Fingerprints
from errata.bench.storage.log_records import UnitState
from errata.editors import configure
from errata.functional import Case
from errata.functional.errors import InvalidInputError
from errata.functional.hashing import content_id
from errata.functional.version import __version__

__all__ = ["changed_parts", "leg_identity", "leg_parts", "unit_states", "versions"]

THREADS = "number of threads"


def versions(patch: bool = True) -> str:
    """Name the versions that results depend on.

    Args:
        patch: Whether to name patch versions, which change no results.

    Returns:
        Names and versions, separated by commas.

    Example:
        >>> versions().split()[0]
        'errata-vlm'
    """
    found = {"errata-vlm": __version__, "torch": metadata.version("torch")}
    found |= {"transformers": metadata.version("transformers")}
    found |= {"Python": platform.python_version()}
    return ", ".join(
        f"{name} {version if patch else '.'.join(version.split('+')[0].split('.')[:2])}"
        for name, version in found.items()
    )


def leg_parts(
    settings: RunSettings,
    model: ModelSettings,
    editor: EditorSettings,
    protocol: Protocol,
    num_threads: int,
    fingerprints: Fingerprints,
) -> dict[str, str]:
    """Everything that a leg's results depend on, but for its cases.

    Args:
        settings: Settings of the run.
        model: The model.
        editor: The editor.
        protocol: The protocol.
        num_threads: Threads of torch. Sums are split by thread, so they decide last bits.
        fingerprints: Digests of files.

    Returns:
        Values and digests by name.
    """
    config = configure(editor.type, editor.preset, **editor.settings)
    folder, weights, other = model_files(model)
    protocol_settings = msgspec.to_builtins(protocol)
    if isinstance(protocol, SequentialSettings):
        protocol_settings.pop("sequence_length")  # in the keys of the units
    if isinstance(protocol, LifelongSettings):
        protocol_settings.pop("eval_after")  # in the keys of the units
    trained = weights_path(editor.type, config, model)
    demonstrations = demonstration_cases(config)
    parts: dict[str, Any] = {
        "weights of the model": fingerprints.of_files(folder, weights),
        "config, tokenizer or processor of the model": fingerprints.of_files(folder, other),
        "settings of the model": {
            "dtype": model.dtype,
            "device": model.device,
            "device_map": model.device_map,
            "template": model.template,
        },
        "settings of the editor": {"type": editor.type} | msgspec.to_builtins(config),
        "trained weights of the editor": fingerprints.of_file(trained)[:16] if trained else "",
        "demonstrations of the editor": (
            _digest([_case_text(c) + _case_images(c) for c in demonstrations])
            if demonstrations
            else ""
        ),
        "settings of the protocol": protocol_settings,
        "settings of the evaluation": {
            "scorers": settings.scorers,
            "max_new_tokens": settings.max_new_tokens,
            "generate_probes": settings.generate_probes,
            "ppl_r_tokens": settings.ppl_r_tokens,
            "memory_budget": settings.memory_budget,
        },
        "seed": settings.seed,
        THREADS: num_threads,
        "versions": versions(patch=False),
    }
    return {
        name: value
        if isinstance(value, str)
        else msgspec.json.encode(value, order="sorted").decode()
        for name, value in parts.items()
    }


def leg_identity(parts: dict[str, str]) -> str:
    """A short name of a leg's parts, for its rows.

    Args:
        parts: From `leg_parts`.

    Returns:
        Twelve hexadecimal digits.
    """
    return _digest(sorted(parts.items()))[:12]


def changed_parts(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Name the parts of a leg that differ, with both values.

    Args:
        old: Parts of the stored results.
        new: Parts of this start.

    Returns:
        One clause for each.
    """
    return [
        f"{name} ({_difference(old.get(name, ''), new.get(name, ''))})"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _difference(old: str, new: str) -> str:
    """Two values, or of two tables the fields that differ."""
    try:
        one, two = msgspec.json.decode(old), msgspec.json.decode(new)
    except msgspec.DecodeError:
        one = two = None
    if isinstance(one, dict) and isinstance(two, dict):
        names = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
        return ", ".join(f"{n}: {one.get(n)!r} became {two.get(n)!r}" for n in names[:4])
    return f"{old or 'none'} became {new or 'none'}"


def unit_states(protocol: Protocol, cases: Sequence[Case]) -> list[UnitState]:
    """The units of a leg, with what each depends on.

    A case of `single` depends on itself, a step of a sequence on all cases up to it.

    Args:
        protocol: The protocol.
        cases: The cases.

    Returns:
        Units in the order of their numbers.
    """
    texts = [_digest(_case_text(case)) for case in cases]
    images = [_digest(_case_images(case)) for case in cases]
    if isinstance(protocol, SingleSettings):
        return [
            UnitState(number=n, key=_digest([n, texts[n]])[:12], images=images[n][:12])
            for n in range(len(cases))
        ]
    if isinstance(protocol, LifelongSettings):
        groups = [range(len(cases))]
    else:
        size = protocol.sequence_length or len(cases)
        groups = [range(n, min(n + size, len(cases))) for n in range(0, len(cases), size)]
    units: list[UnitState] = []
    for group in groups:
        key = image_key = ""
        for n in group:
            is_end = isinstance(protocol, LifelongSettings) and (
                n + 1 in protocol.eval_after or n + 1 == len(cases)
            )
            key, image_key = _digest([key, texts[n]]), _digest([image_key, images[n]])
            shown = _digest([key, is_end]) if isinstance(protocol, LifelongSettings) else key
            units.append(UnitState(number=len(units), key=shown[:12], images=image_key[:12]))
        if isinstance(protocol, SequentialSettings):
            end = _digest([key, "end"])[:12]
            units.append(UnitState(number=len(units), key=end, images=image_key[:12]))
    return units


def _case_text(case: Case) -> list[Any]:
    """The words of a case, and how many images each query has."""
    return [
        case.id,
        [
            [name, i, q.prompt, q.target, *q.aliases, len(q.images), q.video]
            for name, i, q in [("", 0, case.edit), *questions_of(case)]
        ],
    ]


def _case_images(case: Case) -> list[Any]:
    """The contents of a case's images."""
    try:
        return [
            [content_id(image) for image in query.images]
            for _, _, query in [("", 0, case.edit), *questions_of(case)]
        ]
    except InvalidInputError as error:
        raise InvalidInputError(f"case {case.id!r}: {error}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
