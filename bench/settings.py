"""What a run is, as data: a TOML file read into frozen Structs, every fault named at once.

    output_dir = "out/demo"

    [cases]
    source = "world"
    num_cases = 20

    [[models]]
    id = "micro/llava"

    [[editors]]
    type = "finetune"
    num_steps = 25

    [[protocols]]
    type = "single"

Importing this module costs no torch; checking the editors' own settings does.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from errata.functional.errors import InvalidSettingsError

__all__ = [
    "CaseSource",
    "Dtype",
    "EditorSettings",
    "BenchmarkCases",
    "ModelSettings",
    "Protocol",
    "RunSettings",
    "SequentialSettings",
    "SingleSettings",
    "WorldCases",
    "parse_settings",
    "read_settings",
    "parse_size",
    "unknown_name",
]

_SIZE_PATTERN = re.compile(r"^(\d+(?:\.\d+)?) ?(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)$")

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[str, Meta(pattern=_SIZE_PATTERN.pattern)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}$")]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of the weights; "auto" is the checkpoint's own."""

_UNITS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class WorldCases(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="source",
    tag="world",
):
    """Cases of the micro world (`bench.data.world`), drawn on demand."""

    num_cases: Count = 20
    seed: int = 0
    skip: Natural = 0  # cases left out at the front
    split: Literal["train", "test"] = "test"
    subjects: Literal["known", "new"] = "known"
    relations: tuple[str, ...] = ("name", "home", "food", "keeper")


class BenchmarkCases(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="source",
    tag="file",
):
    """Cases of an annotation file of the field's benchmarks (`bench.data.open_cases`)."""

    path: Text
    benchmark: str = ""  # its name, where the first record should not decide
    num_cases: Natural = 0  # 0: all
    skip: Natural = 0
    image_root: str = ""  # folder the image names start from; "": beside the file and above it
    missing_images: Literal["error", "skip", "none", "placeholder"] = "error"
    invalid_records: Literal["error", "skip"] = "error"
    template: str = "raw"
    clean_rephrases: bool = False
    strip_whitespace: bool = False
    fix_encoding: bool = False
    hop: Natural = 0
    num_neighbors: Natural = 0  # ComprehendEdit: how many of an edit's neighbours are asked
    neighbor_answers: str = "answer"  # and whose answers they should keep


CaseSource = WorldCases | BenchmarkCases


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model: `micro/NAME`, `tiny/NAME`, a folder, or a hub id."""

    id: Text
    name: Name | None = None  # in results; the id's last part by default
    dtype: Dtype = "auto"
    device: Text = "cpu"
    revision: str = ""
    template: Text = "default"  # `errata.adapters.TEMPLATES`

    @property
    def label(self) -> str:
        return self.name or self.id.rstrip("/").rsplit("/", 1)[-1]


class EditorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One editor: its type, a preset, and settings of its own over it."""

    type: Text
    name: Name | None = None  # in results; the type by default
    preset: str = ""
    models: tuple[str, ...] = ()  # labels of the models it edits; all of them by default
    settings: dict[str, Any] = {}

    @property
    def label(self) -> str:
        return self.name or self.type


class SingleSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="single"
):
    """Independent edits, each from the base, run side by side."""

    batch_size: Natural = 0  # edits in one batch; 0: as many as the memory budget allows


class SequentialSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="sequential"
):
    """Edits one after another; the base is back before each group."""

    sequence_length: Natural = 0  # edits in a row; 0: all of them
    gaps: tuple[Count, ...] = ()  # also probe a case this many edits after its own


class LifelongSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lifelong"
):
    """Edits one after another; after so many of them, all edits so far are asked."""

    eval_after: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1, 10, 100, 1000)
    max_evaluated: Natural = 0  # of the edits so far, at most so many, evenly spread; 0: all


Protocol = SingleSettings | SequentialSettings | LifelongSettings


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run."""

    output_dir: Text
    title: str = ""
    seed: int = 0
    scorers: Annotated[tuple[str, ...], Meta(min_length=1)] = ("errata",)
    max_new_tokens: Natural = 0  # tokens of free generation beside teacher forcing; 0: none
    generate_probes: Literal["all", "success"] = "all"  # probe, or all but localities
    ppl_r_tokens: Natural = 0  # tokens an edited model goes on for behind its target; 0: no PPL_r
    memory_budget: Size = "1 GiB"  # what a batch of edits or probes may take beside the model
    num_threads: Natural = 0  # of torch; 0: as it comes
    save_deltas: bool = True  # write one file per edit (single) or group (sequential)
    num_thumbnails: Natural = 24  # cases whose pictures are kept for the report
    cases: CaseSource = WorldCases()
    models: Annotated[tuple[ModelSettings, ...], Meta(min_length=1)]
    editors: Annotated[tuple[EditorSettings, ...], Meta(min_length=1)]
    protocols: Annotated[tuple[Protocol, ...], Meta(min_length=1)] = (SingleSettings(),)

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_size(self.memory_budget)

    def digest(self, *more: str) -> str:
        """A short hash of what decides the results: not of `out`, the title or the pictures."""
        plain = {**msgspec.to_builtins(self), "output_dir": "", "title": "", "num_thumbnails": 0}
        data = msgspec.json.encode([plain, *more], order="sorted")
        return hashlib.sha256(data).hexdigest()[:12]


def parse_size(text: str) -> int:
    """A size as people write it, in bytes.

    >>> parse_size("1.5 GiB"), parse_size("200 MB")
    (1610612736, 200000000)
    """
    match = _SIZE_PATTERN.match(text)
    if not match:
        raise InvalidSettingsError(
            f"a size must be a number and a unit, e.g. '2 GiB'; got {text!r}."
        )
    base = 1024 if "i" in match[2] else 1000
    return int(float(match[1]) * base ** _UNITS[match[2][0]])


def read_settings(path: str | Path) -> RunSettings:
    """Read a run's TOML file. Raises BadSettings with every fault at once, or OSError."""
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as fault:
        raise InvalidSettingsError(f"{path} must be UTF-8 text: {fault.reason}.") from None
    return parse_settings(text, str(path))


def parse_settings(text: str, source_name: str = "settings") -> RunSettings:
    """Settings from TOML text.

    Raises BadSettings naming every unknown key (with the nearest known one), every value that can
    not be, and every name used twice; of a faulty file also every name that is of nothing here.

    >>> parse_settings('output_dir="o"\\n[[models]]\\nid="micro/llava"\\n[[editors]]\\ntype="lora"').models[0].label
    'llava'
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise InvalidSettingsError(f"{source_name} must be TOML: {fault}.") from None
    from .sources import find_unknown_names

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
    known = [m.label for m in settings.models]
    for number, editor in enumerate(settings.editors):
        faults += [
            f"editors[{number}].models: {unknown_name(label, known)}"
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


def unknown_name(name: str, known: typing.Iterable[str]) -> str:
    """The words for a name that is not among the known ones, with the nearest.

    >>> unknown_name("cuont", ["count", "seed"])
    "'cuont' is unknown; did you mean 'count'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"{name!r} is unknown; {hint}"


def _convert(raw: Any, kind: Any, path: str, faults: list[str]) -> Any:
    """Like `msgspec.convert`, but goes on after a fault, so that all are listed; None on faults."""
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
    except msgspec.ValidationError as fault:
        faults.append(f"{path} {_expectation(fault, kind)}, got {raw!r}")
        return None


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
    values = {}
    for key, value in raw.items():
        if key not in fields:
            faults.append(f"{dot}{key}: {unknown_name(key, fields)}")
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


def _expectation(fault: msgspec.ValidationError, kind: Any) -> str:
    """What must hold, in the words of someone who writes TOML."""
    if typing.get_origin(kind) is Literal:
        return f"must be one of {', '.join(map(str, typing.get_args(kind)))}"
    if kind is Size:
        return "must be a number and a unit, e.g. '2 GiB'"
    if Name in (kind, *typing.get_args(kind)):
        return "must be at most 64 letters, digits, spaces and . _ + -, a letter or digit first"
    text = str(fault).replace("Expected", "must be").replace("`", "").split(" - at ")[0]
    return text.partition(", got")[0]
