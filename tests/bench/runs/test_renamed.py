"""Settings of the first version are refused with their new name."""

from __future__ import annotations

import msgspec
import pytest

from errata.bench.cli.main import main
from errata.bench.cli.renamed import COMMANDS, FLAGS, renamed_word
from errata.bench.protocols.settings import LifelongSettings, SequentialSettings, SingleSettings
from errata.bench.runs.settings import BenchmarkCases, RunSettings, WorldCases
from errata.bench.runs.settings_file import RENAMED, RENAMED_VALUES, parse_settings
from errata.editors import METHODS, configure
from errata.editors import renamed as editors_renamed
from errata.editors.training.config import TrainingConfig
from errata.functional.errors import InvalidSettingsError

FIRST = 'output_dir = "o"\n'
REST = '[[models]]\nid = "micro/llava"\n[[editors]]\ntype = "lora"\n'
SETTINGS = [(kind, old, new) for kind, names in RENAMED.items() for old, new in names.items()]
EDITORS = [
    (name, old, new)
    for name, names in editors_renamed.RENAMED_SETTINGS.items()
    for old, new in names.items()
]
TABLES = {
    RunSettings: "{}",
    WorldCases: '[cases]\nsource = "world"\n{}',
    BenchmarkCases: '[cases]\nsource = "file"\npath = "p"\n{}',
    SingleSettings: '[[protocols]]\ntype = "single"\n{}',
    SequentialSettings: '[[protocols]]\ntype = "sequential"\n{}',
    LifelongSettings: '[[protocols]]\ntype = "lifelong"\n{}',
}


def text(kind: type, line: str) -> str:
    table = TABLES[kind].format(line + "\n")
    return table + FIRST + REST if kind is RunSettings else FIRST + REST + table


@pytest.mark.parametrize(("kind", "old", "new"), SETTINGS, ids=lambda value: str(value))
def test_an_old_key_names_the_new_one(kind, old, new):
    assert new in {field.name for field in msgspec.structs.fields(kind)}
    assert old not in {field.name for field in msgspec.structs.fields(kind)}
    message = f"unknown setting {old!r}; it is now called {new!r}"
    with pytest.raises(InvalidSettingsError, match=message):
        parse_settings(text(kind, f"{old} = 1"))


@pytest.mark.parametrize(("place", "values"), RENAMED_VALUES.items(), ids=str)
def test_an_old_value_names_the_new_one(place, values):
    kind, key = place
    for old, new in values.items():
        with pytest.raises(InvalidSettingsError, match=f"{old!r}; it is now called {new!r}"):
            parse_settings(text(kind, f'{key} = "{old}"'))


@pytest.mark.parametrize(("name", "old", "new"), EDITORS, ids=str)
def test_an_editors_old_setting_names_the_new_one(name, old, new):
    fields = {field.name for field in msgspec.structs.fields(METHODS[name].config)}
    assert new in fields
    assert old not in fields
    with pytest.raises(InvalidSettingsError, match=f"{old!r}; it is now called {new!r}"):
        configure(name, **{old: 1})


def test_an_editors_old_value_names_the_new_one():
    with pytest.raises(
        InvalidSettingsError,
        match="unknown value 'both' of liveedit.routing_input; it is now called 'query_and_vision'",
    ):
        configure("liveedit", routing_input="both")
    with pytest.raises(
        InvalidSettingsError,
        match="unknown value 'picture' of wise.own_negatives; it is now called 'image'",
    ):
        configure("wise", own_negatives=["picture"])
    for (name, key), values in editors_renamed.RENAMED_VALUES.items():
        assert key in METHODS[name].config.__struct_fields__
        for new in values.values():
            value = [new] if key == "own_negatives" else new
            assert getattr(configure(name, **{key: value}), key)


def test_settings_of_a_training():
    fields = set(TrainingConfig.__struct_fields__)
    assert set(editors_renamed.RENAMED_TRAINING.values()) <= fields
    assert not set(editors_renamed.RENAMED_TRAINING) & fields


@pytest.mark.parametrize(("old", "new"), COMMANDS.items())
def test_an_old_command_names_the_new_one(old, new, capsys):
    assert main([old, "x"]) == 2
    assert f"it is now called {new!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [(command, old, new) for command, flags in FLAGS.items() for old, new in flags.items()],
)
def test_an_old_flag_names_the_new_one(command, old, new, capsys):
    assert main(["--debug", command, old, "x"]) == 2
    assert f"unknown option {old!r} of {command}; it is now called {new!r}" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert new in capsys.readouterr().out


def test_data_check_and_words_that_are_not_renamed():
    assert "'data verify'" in renamed_word(["data", "check", "folder"])
    assert renamed_word(["edit", "--set", "end=1"]) == ""
    assert renamed_word([]) == ""


def test_bare_errata_prints_help(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_every_setting_explains_itself(capsys):
    for name, method in METHODS.items():
        assert main(["editors", name]) == 0
        shown = capsys.readouterr().out
        for field in msgspec.structs.fields(method.config):
            (meta,) = [m for m in field.type.__metadata__ if m.description]
            assert f"  {field.name} = " in shown
            assert meta.description in shown
            assert meta.description.endswith((".", ").", '".'))
