"""Public docstrings: present, complete, true names, and examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

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


def public_definitions(module: types.ModuleType) -> list[tuple[str, Any]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            found.append((f"{module.__name__}.{name}", value))
        if inspect.isclass(value):
            found += [
                (f"{module.__name__}.{name}.{method}", getattr(value, method))
                for method, member in vars(value).items()
                if inspect.isfunction(member) and not method.startswith("_")
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
    """Nine of ten at least; a method that overrides a documented one has its docstring."""
    names = [
        module_name(path)
        for path in SOURCES
        if path.stem not in {"triton", "__main__"} and not path.stem.startswith("bench_")
    ]
    nodes = [one for name in names for one in public_definitions(importlib.import_module(name))]
    bare = [name for name, value in nodes if not inspect.getdoc(value)]
    assert len(nodes) > 700
    assert len(bare) <= len(nodes) // 10, f"{len(bare)} of {len(nodes)}:\n" + "\n".join(bare)


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
