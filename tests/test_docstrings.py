"""Public docstrings: present, complete, true names, and examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "functional", "adapters", "editors", "bench"]
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
EXPORTED = [
    (floor, name)
    for floor in FLOORS[:-1]
    for name in sorted(importlib.import_module(f"errata.{floor}").__all__)
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["errata", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def public_definitions(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [
                member
                for member in node.body
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
            ]
    return found


def violations(*paths: Path) -> list[str]:
    """What pydoclint finds in files: one line `file:line: code: message` each."""
    command = [sys.executable, "-c", "from pydoclint.main import main; main()", "--quiet"]
    command += ["--config", str(ROOT / "pyproject.toml"), *map(str, paths)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode in (0, 1), shown.stderr
    lines, current = [], ""
    for line in (shown.stdout + shown.stderr).splitlines():
        if line and not line.startswith(" "):
            current = line
        elif line.strip():
            lines.append(f"{current}:{line.strip()}")
    return lines


@pytest.mark.parametrize(("floor", "name"), EXPORTED, ids=lambda value: value)
def test_what_a_floor_exports_has_a_docstring(floor, name):
    value = getattr(importlib.import_module(f"errata.{floor}"), name)
    if callable(value) and not isinstance(value, type(dict[str, int])):
        assert len((inspect.getdoc(value) or "").split()) >= 3


def test_public_definitions_have_docstrings():
    """All but one in ten; those below the floors' exports may be named by their types alone."""
    nodes = [(path, node) for path in SOURCES for node in public_definitions(path)]
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, node in nodes
        if not ast.get_docstring(node)
    ]
    assert len(nodes) > 700
    assert len(bare) <= len(nodes) // 10, "\n".join(bare)


def test_sections_of_docstrings_are_complete():
    """Args, Returns and Raises match the signature in every file (pydoclint)."""
    found = violations(*[ROOT / floor for floor in FLOORS])
    assert found == [], "\n".join(found[:40])


def test_the_checker_sees_a_missing_argument(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'def f(a, b):\n    """Add.\n\n    Args:\n        a: One.\n\n'
        '    Returns:\n        The sum.\n    """\n    return a + b\n'
    )
    assert any("DOC103" in line or "DOC101" in line for line in violations(path))


EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = importlib.import_module(module_name(path))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert result.failed == 0


def test_there_are_examples():
    names = {module_name(path).split(".")[1] for path in EXAMPLES}
    assert names >= {"functional", "adapters", "editors"}
