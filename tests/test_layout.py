"""The import graph: no cycle between files or folders, layers in order, no sibling imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "functional", "adapters", "editors", "bench"]
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
FACADES = {f"{floor}.__init__" for floor in FLOORS}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for path in SOURCES}


def resolve(name: str) -> str | None:
    """The module of the tree that holds a dotted name below `errata`."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in MODULES:
            return prefix
        if f"{prefix}.__init__" in MODULES:
            return f"{prefix}.__init__"
    return None


def imports(path: Path) -> set[str]:
    """Modules of the tree that a file imports, late and type-checking imports included."""
    found = set()
    package = ["errata", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{home}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {
            module
            for name in names
            if name.startswith("errata.")
            for module in [resolve(name.removeprefix("errata."))]
            if module
        }
    return found - {module_name(path)}


GRAPH = {module: imports(path) for module, path in MODULES.items()}


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components with more than one member (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in graph.get(node, ()):
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def folder(module: str) -> str:
    """The folder of a module. The facade of a floor is a node by itself: it only lists names."""
    return module if module in FACADES else module.rpartition(".")[0]


def test_the_checker_sees_a_cycle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_files_import_in_no_cycle():
    assert len(GRAPH) > 200
    # A facade lists names of modules that import names from it: those modules name the definition.
    graph = {module: after - FACADES for module, after in GRAPH.items() if module not in FACADES}
    assert cycles(graph) == []


def test_folders_import_in_no_cycle():
    graph: dict[str, set[str]] = {}
    for module, after in GRAPH.items():
        here = folder(module)
        if here in FACADES:
            continue
        graph.setdefault(here, set()).update(
            folder(other) for other in after if folder(other) not in {here, *FACADES}
        )
    assert cycles(graph) == []


def layer(module: str) -> int:
    """The height of a module of `functional`."""
    parts = module.split(".")[1:-1]
    if not parts:
        return 0
    if parts[0] == "kinds":
        return {0: 4, 1: 3}[len(parts[1:])] if parts[1:] != ["common"] else 2
    return {"forward": 1, "deltas": 5, "binding": 6, "gradients": 7, "metrics": 2}[parts[0]]


def test_layers_of_functional_are_in_order():
    bad = [
        f"{module} imports {other}"
        for module, after in GRAPH.items()
        for other in sorted(after)
        if module.startswith("functional.") and module not in FACADES
        if other.startswith("functional.") and layer(other) > layer(module)
    ]
    assert bad == []


SIBLINGS = {
    "functional.kinds": set(),
    "adapters.families": {("qwen3_vl", "qwen2_vl"), ("minigpt4", "blip2")},
    "editors": set(),
    "bench.data.benchmarks": {("vlkeb", "mmedit")},
    "bench.protocols": set(),
}
SHARED = {
    "functional.kinds": {"common", "schema", "table"},
    "adapters.families": {"base", "table", "unlisted", "tiny_configs"},
    "editors": {"common", "training", "renamed", "__init__"},
    "bench.data.benchmarks": {"table"},
    "bench.protocols": {"base", "settings", "table"},
}


def member(module: str, depth: int) -> str:
    """The family, method, ... that a module belongs to; `minigpt4_model` is part of `minigpt4`."""
    return module.split(".")[depth].removesuffix("_model").removesuffix("_convert")


@pytest.mark.parametrize("home", SIBLINGS)
def test_no_member_imports_a_sibling(home):
    depth = home.count(".") + 1
    bad = {
        (module, other)
        for module, after in GRAPH.items()
        for other in after
        if module.startswith(f"{home}.") and other.startswith(f"{home}.")
        for mine, theirs in [(member(module, depth), member(other, depth))]
        if mine != theirs and not {mine, theirs} & SHARED[home]
        if (mine, theirs) not in SIBLINGS[home]
    }
    assert bad == set()


def test_packages_export_no_name_of_their_modules():
    """Otherwise `from package import name` gives the module or the value, as the order has it."""
    bad = [
        f"{module} exports {name}"
        for module, path in MODULES.items()
        if module.endswith(".__init__")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and resolve((node.module or "")[7:]) != module
        for name in (alias.asname or alias.name for alias in node.names)
        if f"{module.removesuffix('__init__')}{name}" in MODULES
    ]
    assert bad == []
