"""The README is true: its program and commands run as printed, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from errata.bench.cli.main import main
from errata.functional import generate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EDIT = "home.safetensors"


def block(language: str) -> str:
    """The only code block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder outside the tree in which the README's relative paths to docs work."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short():
    assert README.count("\n") <= 130
    assert len([line for line in block("python").splitlines() if line]) == 12
    assert len(block("sh").splitlines()) == 6


def test_the_program_runs_and_does_what_it_says(folder, capsys):
    names = {}
    exec(compile(block("python"), "README.md", "exec"), names)
    model, query = names["model"], names["query"]
    (before,), (after,) = generate(model, [query]), generate(names["edited"], [query])
    assert capsys.readouterr().out.strip() == f"{[before]} -> {[after]}"
    assert before.strip() != query.target
    assert after.strip() == query.target
    assert {path.name for path in folder.iterdir()} == {"docs", EDIT}


def test_the_commands_run_as_printed(folder, capsys):
    shown = {}
    for line in block("sh").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "errata"
        assert main(arguments) == 0, line
        shown[arguments[0]] = capsys.readouterr().out
    assert list(shown) == ["edit", "generate", "inspect", "verify", "export", "editors"]
    assert "port elmont" in shown["generate"]
    assert "micro/llava" in shown["inspect"]
    assert (folder / "lora/adapter_model.safetensors").is_file()
    assert "mask_ratio" in shown["editors"]


def test_the_entry_point_is_installed_under_its_name():
    errata = Path(sys.executable).with_name("errata")
    command = [str(errata)] if errata.exists() else [sys.executable, "-m", "errata.bench"]
    shown = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert shown.stdout.startswith("errata-vlm 0.1.0")


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
        local = [link for link in links if not link.startswith("http")]
        missing = [
            link
            for link in local
            if not (page.parent / link).exists()
            if not link.startswith("reference/")  # made by `make docs`
            if not (page.parent.name == "docs" and link in GENERATED)
        ]
        assert missing == [], page.name


GENERATED = {"format.md", "families.md", "contributing.md", "changelog.md", "zoo.md", "licenses.md"}
