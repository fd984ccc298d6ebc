"""Public docstrings: present, complete, true names, and examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Iterator
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


def unsectioned(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, bool]]:
    """Public functions with arguments, and whether the docstring says what they take and give.

    A function of one argument may leave out `Args` where its summary is about that argument; an
    override has the docstring of the method it overrides.
    """
    owners: list[ast.Module | ast.ClassDef] = [tree]
    owners += [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [
                argument.arg
                for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if argument.arg not in ("self", "cls")
            ]
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if not arguments or "property" in decorators or "overload" in decorators:
                continue
            if isinstance(owner, ast.ClassDef) and overrides(owner, node.name, classes):
                continue
            text = ast.get_docstring(node) or ""
            gives = node.returns is not None and ast.unparse(node.returns) not in (
                "None",
                "NoReturn",
            )
            says_what = "Returns:" in text or "Yields:" in text
            takes = "Args:" in text or (len(arguments) == 1 and bool(text) and says_what == gives)
            yield node.name, takes and says_what >= gives


def overrides(owner: ast.ClassDef, method: str, classes: dict[str, ast.ClassDef]) -> bool:
    for base in owner.bases:
        name = ast.unparse(base).split("[")[0].rpartition(".")[2]
        parent = classes.get(name)
        if parent is None or parent is owner:
            continue
        defined = any(isinstance(n, ast.FunctionDef) and n.name == method for n in parent.body)
        if defined or overrides(parent, method, classes):
            return True
    return False


@pytest.mark.parametrize("floor", FLOORS)
def test_functions_say_what_they_take_and_give(floor):
    """Nine public functions of ten have the sections that their signatures ask for."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    classes = {
        node.name: node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = [
        (f"{path.relative_to(ROOT)}: {name}", complete)
        for path, tree in trees.items()
        if path.is_relative_to(ROOT / floor)
        and path.stem not in {"triton", "__main__"}
        and not path.stem.startswith("bench_")
        for name, complete in unsectioned(tree, classes)
    ]
    lacking = [name for name, complete in found if not complete]
    assert len(found) >= 15
    assert len(lacking) <= len(found) / 10, f"{len(lacking)} of {len(found)}:\n" + "\n".join(
        lacking
    )


PEERS_FILES = {"editors/multimodal_editor.py", "editors/grace.py"}


@pytest.mark.parametrize("floor", FLOORS)
def test_files_that_prose_names_exist(floor):
    named = re.compile(rf"\b(?:{'|'.join(FLOORS)}|docs|examples|tests)/[\w/]+\.(?:py|md|toml)\b")
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / floor)
        for name in named.findall(path.read_text())
        if name not in PEERS_FILES and not (ROOT / name).exists()
    ]
    assert missing == []


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
