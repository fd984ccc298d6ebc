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

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from errata.bench.protocols.settings import Protocol, SingleSettings
from errata.functional.errors import InvalidSettingsError

__all__ = [
    "BenchmarkCases",
    "CaseSource",
    "Dtype",
    "EditorSettings",
    "ModelSettings",
    "RunSettings",
    "WorldCases",
    "parse_size",
]

_SIZE_PATTERN = re.compile(r"\A(\d{1,12}(?:\.\d{1,6})?) ?(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)\Z")

Count = Annotated[int, Meta(ge=1, le=10**9)]
Natural = Annotated[int, Meta(ge=0, le=10**9)]
Seed = Annotated[int, Meta(ge=0, le=1 << 62)]
ThreadCount = Annotated[int, Meta(ge=0, le=4096)]
Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[str, Meta(pattern=_SIZE_PATTERN.pattern)]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}\Z")]

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
    seed: Seed = 0
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
    image_root: str = (
        ""  # folder the image names start from; "": the settings file's folder and those above it
    )
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
    device_map: str = ""  # of transformers, e.g. "auto", for a model larger than one device
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
        """The name in results. One with random weights says so."""
        label = self.name or self.type
        is_untrained = self.settings.get("untrained") or self.preset == "untrained"
        return f"{label} (untrained)" if is_untrained and "untrained" not in label else label


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a run."""

    output_dir: Text
    title: str = ""
    seed: Seed = 0
    scorers: Annotated[tuple[str, ...], Meta(min_length=1)] = ("errata",)
    max_new_tokens: Natural = 0  # tokens of free generation, added to teacher forcing; 0: none
    generate_probes: Literal["all", "success"] = "all"  # probe, or all but localities
    ppl_r_tokens: Natural = 0  # tokens generated after the edit's target; 0: no PPL_r
    memory_budget: Size = (
        "1 GiB"  # what a batch of edits or probes may take in addition to the model
    )
    num_threads: Annotated[int, Meta(ge=0, le=4096)] = (
        0  # of torch; 0: as it comes, and when resuming as in the first start
    )
    unreadable_cases: Literal["error", "skip"] = (
        "error"  # what to do with a case the model cannot read
    )
    save_deltas: bool = True  # write one file per edit (single) or group (sequential)
    num_thumbnails: Natural = 24  # cases whose images are kept for the report
    cases: CaseSource = WorldCases()
    models: Annotated[tuple[ModelSettings, ...], Meta(min_length=1)]
    editors: Annotated[tuple[EditorSettings, ...], Meta(min_length=1)]
    protocols: Annotated[tuple[Protocol, ...], Meta(min_length=1)] = (SingleSettings(),)

    @property
    def memory_bytes(self) -> int:
        """The memory budget in bytes."""
        return parse_size(self.memory_budget)


def parse_size(text: str) -> int:
    """Parse a size such as "2 GiB".

    >>> parse_size("1.5 GiB"), parse_size("200 MB")
    (1610612736, 200000000)

    Args:
        text: A number and a unit.

    Returns:
        Bytes.

    Raises:
        InvalidSettingsError: If it cannot be parsed.
    """
    match = _SIZE_PATTERN.match(text)
    if not match:
        raise InvalidSettingsError(
            f"a size must be a number and a unit, e.g. '2 GiB'; got {text!r}."
        )
    base = 1024 if "i" in match[2] else 1000
    return int(float(match[1]) * base ** _UNITS[match[2][0]])
