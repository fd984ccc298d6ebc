from __future__ import annotations

from pathlib import Path

import pytest

from errata.bench.protocols.settings import SequentialSettings, SingleSettings
from errata.bench.runs.settings import WorldCases, parse_size
from errata.bench.runs.settings_file import parse_settings, read_settings
from errata.functional.errors import InvalidSettingsError

ROOT = Path(__file__).parents[3]

LEAST = """
output_dir = "o"
[[models]]
id = "micro/llava"
[[editors]]
type = "lora"
"""


def faults(text: str) -> str:
    with pytest.raises(InvalidSettingsError) as caught:
        parse_settings(text, "run.toml")
    return str(caught.value)


def test_defaults_fill_what_is_left_out():
    settings = parse_settings(LEAST)
    assert settings.cases == WorldCases()
    assert settings.protocols == (SingleSettings(),)
    assert settings.models[0].label == "llava"
    assert settings.editors[0].label == "lora"
    assert settings.memory_bytes == 1 << 30


def test_an_editors_own_settings_lie_flat():
    settings = parse_settings(LEAST + 'name = "small"\nrank = 2\n')
    assert settings.editors[0].label == "small"
    assert settings.editors[0].settings == {"rank": 2}


def test_protocols_are_told_by_type():
    settings = parse_settings(
        LEAST + '[[protocols]]\ntype = "sequential"\nsequence_length = 5\ngaps = [1, 3]\n'
    )
    assert settings.protocols == (SequentialSettings(sequence_length=5, gaps=(1, 3)),)


def test_every_fault_is_named_at_once():
    said = faults("""
        output_idr = "o"
        memory_budget = "lots"
        max_new_tokens = -1
        [cases]
        source = "wrld"
        [[models]]
        id = 3
        dtype = "fp8"
        [[editors]]
        rank = 4
        [[editors]]
        type = "lroa"
        [[editors]]
        type = "lora"
        rnak = 4
        lr = -1.0
        [[editors]]
        type = "finetune"
        preset = "nobody"
        [[protocols]]
        type = "sequental"
        [[protocols]]
        type = "sequential"
        sequence_length = -3
        gaps = [0]
    """)
    for part in (
        "'output_idr'; did you mean 'output_dir'?",
        "memory_budget must be a number and a unit, e.g. '2 GiB', got 'lots'",
        "max_new_tokens must be int >= 0, got -1",
        "cases.source must be one of world, file; got 'wrld'",
        "models[0].id must be str",
        "models[0].dtype must be one of auto, float32, bfloat16, float16, got 'fp8'",
        "editors[0].type must be given",
        "unknown editor 'lroa'",
        "'rnak'",
        "lora.lr",
        "'nobody'",
        "protocols[0].type must be one of single, sequential, lifelong; got 'sequental'",
        "protocols[1].sequence_length must be int >= 0",
        "protocols[1].gaps must be int >= 1",
        "output_dir must be given",
    ):
        assert part in said, f"{part!r} is not in {said!r}"
    assert said.startswith("run.toml: ")
    assert "\n" not in said


def test_names_of_nothing_are_told_with_the_other_faults():
    said = faults("""
        output_idr = "o"
        scorers = ["erata"]
        cases = {source = "world", relations = ["nme"]}
        models = [{id = "micro/lava", template = "nope"}, {id = "./nowhere", device = "banana"}]
        editors = [{type = "lora", rank = 0}]
    """)
    for part in (
        "unknown setting 'output_idr'",
        "scorers: unknown scorer 'erata'; did you mean 'errata'?",
        "cases.relations: unknown relation 'nme'; did you mean 'name'?",
        "models[0].id: unknown model 'lava'; did you mean 'llava'?",
        "models[0].template: unknown template 'nope'",
        "models[1].id must be a folder or a hub id; ./nowhere is no folder",
        "models[1].device must be one that torch can use here",
        "editors[0]: lora.rank",
    ):
        assert part in said, f"{part!r} is not in {said!r}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "output_dir must be given; models must be given; editors must be given"),
        ("x = ", "must be TOML"),
        (
            "output_dir = 'o'\nmodels = 3\neditors = []",
            "models must be a list of at least one table",
        ),
        (LEAST + '[[models]]\nid = "b/llava"', "the name 'llava' must be given once"),
        (LEAST + 'models = ["lava"]', "'lava'; did you mean 'llava'?"),
        (LEAST + '[[protocols]]\ntype="single"\n' * 2, "'single' must be given once"),
        (LEAST.replace('"o"', '""'), "output_dir must be"),
        (LEAST + 'name = "a/b"', "editors[0].name must"),
    ],
)
def test_what_can_not_be_is_said(text, part):
    assert part in faults(text)


def test_a_file_must_be_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSettingsError, match="UTF-8"):
        read_settings(path)


def test_sizes():
    assert parse_size("2 GiB") == 2 << 30
    assert parse_size("1.5MB") == 1_500_000
    with pytest.raises(InvalidSettingsError, match="number and a unit"):
        parse_size("2 gigs")


@pytest.mark.parametrize(
    "path", [ROOT / "demo.toml", *sorted((ROOT / "examples").glob("*.toml"))], ids=lambda p: p.name
)
def test_what_is_shipped_can_be_read(path):
    assert read_settings(path).models
