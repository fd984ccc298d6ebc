"""Read a TOML file; report every error at once."""

from __future__ import annotations

import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from errata.bench.protocols.settings import (
    LifelongSettings,
    SequentialSettings,
    SingleSettings,
)
from errata.bench.runs.settings import (
    BenchmarkCases,
    EditorSettings,
    Name,
    RunSettings,
    Size,
    WorldCases,
)
from errata.bench.runs.sources import MICRO_PREFIX, TINY_PREFIX, _parse_device
from errata.functional.errors import InvalidSettingsError, join_messages, unknown_name

__all__ = ["RENAMED", "find_unknown_names", "parse_settings", "read_settings", "validate_settings"]

RENAMED: Mapping[type[msgspec.Struct], Mapping[str, str]] = {
    RunSettings: {
        "out": "output_dir",
        "generate": "max_new_tokens",
        "generate_for": "generate_probes",
        "ppl_r": "ppl_r_tokens",
        "memory": "memory_budget",
        "threads": "num_threads",
        "deltas": "save_deltas",
        "pictures": "num_thumbnails",
    },
    WorldCases: {"count": "num_cases"},
    BenchmarkCases: {
        "count": "num_cases",
        "images": "image_root",
        "on_missing": "missing_images",
        "on_fault": "invalid_records",
        "clean": "clean_rephrases",
        "strip": "strip_whitespace",
        "repair": "fix_encoding",
        "neighbours": "num_neighbors",
        "neighbour_answers": "neighbor_answers",
    },
    SingleSettings: {"together": "batch_size"},
    SequentialSettings: {"group": "sequence_length"},
    LifelongSettings: {"lengths": "eval_after", "asked": "max_evaluated"},
}
"""Settings of the first version and their new names. Editors' are in `editors/renamed.py`. Goes
with release 0.2."""

RENAMED_VALUES: Mapping[tuple[type[msgspec.Struct], str], Mapping[str, str]] = {
    (BenchmarkCases, "missing_images"): {"draw": "placeholder"},
    (RunSettings, "generate_probes"): {"every": "all"},
}


def read_settings(path: str | Path) -> RunSettings:
    """Read a run's TOML file.

    Args:
        path: The file.

    Returns:
        The settings.

    Raises:
        InvalidSettingsError: With every violation at once.
        OSError: If the file cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as fault:
        raise InvalidSettingsError(f"{path} must be UTF-8 text: {fault.reason}.") from None
    return parse_settings(text, str(path))


def parse_settings(text: str, source_name: str = "settings") -> RunSettings:
    r"""Settings from TOML text.

    Raises BadSettings naming every unknown key (with the nearest known one), every value that can
    not be, and every name used twice; of a faulty file also every name that is of nothing here.

    >>> parse_settings('output_dir="o"\n[[models]]\nid="micro/llava"\n[[editors]]\ntype="lora"').models[0].label
    'llava'

    Args:
        text: TOML.
        source_name: Name of the source, for messages.

    Returns:
        The settings.

    Raises:
        InvalidSettingsError: Names every unknown key (with the nearest known one), every invalid
            value and every duplicate name; of an invalid file also every name that does not exist.
    """  # noqa: E501
    try:
        raw = tomllib.loads(text)
    except RecursionError:
        raise InvalidSettingsError(f"{source_name} must be TOML, and is nested too deep.") from None
    except ValueError as fault:  # TOMLDecodeError, or an integer of thousands of digits
        reason = " ".join(str(fault).split())[:300]
        raise InvalidSettingsError(f"{source_name} must be TOML: {reason}.") from None
    faults: list[str] = []
    editors = raw.get("editors")
    if isinstance(editors, list):
        raw["editors"] = [_split_editor_settings(one) for one in editors]
    settings = _convert(raw, RunSettings, "", faults)
    faults += _editor_errors(raw.get("editors"))
    if settings is not None:
        faults += _duplicate_names(settings)
    if faults:  # alone they are no fault of the file: another machine may have them
        faults += find_unknown_names(raw)
    if faults or settings is None:
        raise InvalidSettingsError(f"{source_name}: " + "; ".join(faults) + ".")
    return settings


def _split_editor_settings(raw: Any) -> Any:
    """An editor's own settings lie flat in TOML; here they are set apart, checked by its config."""
    if not isinstance(raw, dict):
        return raw
    own_fields = {f.name for f in msgspec.structs.fields(EditorSettings)} - {"settings"}
    return {
        **{key: value for key, value in raw.items() if key in own_fields},
        "settings": {key: value for key, value in raw.items() if key not in own_fields},
    }


def _editor_errors(raw: Any) -> list[str]:
    """What the editors' own configs say of their settings."""
    from errata import editors

    faults = []
    for number, one in enumerate(raw if isinstance(raw, list) else []):
        kind = one.get("type") if isinstance(one, dict) else None
        if not isinstance(kind, str) or not isinstance(one.get("preset", ""), str):
            continue  # said already
        try:
            editors.configure(kind, one.get("preset", ""), **one["settings"])
        except InvalidSettingsError as fault:
            faults.append(f"editors[{number}]: {str(fault).rstrip('.')}")
    return faults


def _duplicate_names(settings: RunSettings) -> list[str]:
    faults = []
    for what, labels in (
        ("models", [m.label for m in settings.models]),
        ("editors", [e.label for e in settings.editors]),
    ):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        faults += [f"{what}: the name {label!r} must be given once" for label in twice]
    faults += [
        f"models[{n}].name must be given, of letters, digits, spaces and . _ + -: the id ends in "
        f"{m.label[:80]!r}, which cannot name results"
        for n, m in enumerate(settings.models)
        if not _LABEL.match(m.label)
    ]
    known = [m.label for m in settings.models]
    for number, editor in enumerate(settings.editors):
        faults += [
            f"editors[{number}].models: {unknown_name('model', label, known)}"
            for label in editor.models
            if label not in known
        ]
    kinds = [str(p.__struct_config__.tag) for p in settings.protocols]
    faults += [
        f"protocols: {kind!r} must be given once"
        for kind in sorted(set(kinds))
        if kinds.count(kind) > 1
    ]
    return faults


_LABEL = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9 ._+-]{0,127}\Z")


def _convert(raw: Any, kind: Any, path: str, faults: list[str]) -> Any:
    """Like `msgspec.convert`, but collects all violations; None if there are any."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated and _is_struct_tuple(inside[0]):
        return _convert_list(raw, inside[0], path, faults)
    if _is_struct(kind):
        return _convert_struct(raw, kind, path, faults)
    if origin in (types.UnionType, typing.Union) and all(map(_is_struct, inside)):
        tags = {one.__struct_config__.tag: one for one in inside}
        field = inside[0].__struct_config__.tag_field
        tag = raw.get(field) if isinstance(raw, dict) else None
        if not isinstance(tag, str) or tag not in tags:
            faults.append(f"{path}.{field} must be one of {', '.join(tags)}; got {tag!r}")
            return None
        rest = {key: value for key, value in raw.items() if key != field}
        return _convert_struct(rest, tags[tag], path, faults)
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, ValueError, RecursionError) as fault:
        faults.append(f"{path} {_expectation(fault, kind)}, got {_shown(raw)}")
        return None


def _shown(raw: Any) -> str:
    """A value for a message, short; integers of thousands of digits have no text at all."""
    try:
        text = repr(raw)
    except (ValueError, RecursionError):
        return f"a very long {type(raw).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _convert_list(raw: Any, kind: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(raw, list) or not raw:
        faults.append(f"{path} must be a list of at least one table, written [[{path}]]")
        return None
    (item, _) = typing.get_args(kind)
    return tuple(_convert(one, item, f"{path}[{i}]", faults) for i, one in enumerate(raw))


def _convert_struct(raw: Any, kind: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(raw, dict):
        faults.append(f"{path or 'the file'} must be a table")
        return None
    before = len(faults)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    dot = f"{path}." if path else ""
    old_names = RENAMED.get(kind, {})
    values = {}
    for key, value in raw.items():
        if isinstance(value, str) and value in RENAMED_VALUES.get((kind, key), {}):
            new = RENAMED_VALUES[kind, key][value]
            faults.append(f"{dot}{key}: unknown value {value!r}; it is now called {new!r}")
        elif key not in fields:
            faults.append(
                f"{dot}{key}: {unknown_name('setting', key, fields, old_names.get(key, ''))}"
            )
        else:
            values[key] = _convert(value, hints[key], dot + key, faults)
    for name, field in fields.items():
        if field.required and name not in raw:
            faults.append(f"{dot}{name} must be given")
    return kind(**values) if len(faults) == before else None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _is_struct_tuple(kind: Any) -> bool:
    """Whether a type is tuple[Struct, ...] or tuple[Union of Structs, ...]."""
    inside = typing.get_args(kind)
    if typing.get_origin(kind) is not tuple or not inside:
        return False
    return _is_struct(inside[0]) or all(map(_is_struct, typing.get_args(inside[0]) or [None]))


def _expectation(fault: Exception, kind: Any) -> str:
    """What must hold, in the words of someone who writes TOML."""
    if typing.get_origin(kind) is Literal:
        return f"must be one of {', '.join(map(str, typing.get_args(kind)))}"
    if kind is Size:
        return "must be a number and a unit, e.g. '2 GiB'"
    if Name in (kind, *typing.get_args(kind)):
        return "must be at most 64 letters, digits, spaces and . _ + -, a letter or digit first"
    text = str(fault).replace("Expected", "must be").replace("`", "").split(" - at ")[0]
    return text.partition(", got")[0]


def _texts(value: Any, where: str = "settings") -> Iterator[tuple[str, str]]:
    """Every string of decoded TOML, with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, where)


def validate_settings(settings: RunSettings) -> None:
    """Refuse what can be known to be missing before anything is loaded, all of it at once.

    Raises BadSettings, see `unknown_names`.
    """
    faults = find_unknown_names(msgspec.to_builtins(settings))
    if faults:
        raise InvalidSettingsError(f"{join_messages(faults)}.")


def find_unknown_names(raw: Mapping[str, Any]) -> list[str]:
    """Find names in settings that do not exist here.

    Checks micro and tiny models, folders, templates, devices, scorers and relations; values of the
    wrong type are skipped, since their type is reported elsewhere.

    Args:
        raw: The decoded TOML.

    Returns:
        Complaints, a sentence each.
    """
    from errata import adapters
    from errata.bench.data.world.world import FACTS
    from errata.functional.metrics.conventions import SCORERS

    faults = [
        f"{where} must not hold a NUL character" for where, text in _texts(raw) if "\0" in text
    ]
    for number, choice in enumerate(_as_sequence(raw.get("models"))):
        if not isinstance(choice, Mapping):
            continue
        where = f"models[{number}]"
        if isinstance(id := choice.get("id"), str):
            faults += [f"{where}.id{fault}" for fault in _missing_model(id)]
        template = choice.get("template", "default")
        if isinstance(template, str) and template not in adapters.TEMPLATES:
            faults.append(
                f"{where}.template: {unknown_name('template', template, adapters.TEMPLATES)}"
            )
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
            f"{where}: {unknown_name(where.rpartition('.')[2][:-1], name, known)}"
            for name in names
            if isinstance(name, str) and name not in known
        ]
    return faults


def _missing_model(id: str) -> list[str]:
    """What is wrong with a model's id, as far as can be known without loading it."""
    from errata.adapters.families.table import tiny_families
    from errata.adapters.zoo.micro import micro_names

    faults = []
    for start, known in ((MICRO_PREFIX, micro_names()), (TINY_PREFIX, tuple(tiny_families()))):
        name = id.removeprefix(start)
        if id.startswith(start) and name not in known:
            faults.append(f": {unknown_name('model', name, known)}")
    if id.startswith((".", "/", "~")) and not Path(id).is_dir():
        faults.append(f" must be a folder or a hub id; {id} is no folder")
    return faults


def _as_sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
