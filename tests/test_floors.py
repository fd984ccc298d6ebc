"""The rules of the tree: imports go down, files stay short, imports stay lean."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "functional", "adapters", "editors", "bench"]
ALLOWED = {
    "kernels": {"torch", "triton", "einops"},
    "functional": {"torch", "einops", "safetensors", "msgspec", "numpy"},
    "editors": {"torch", "einops", "msgspec", "safetensors"},
}
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it, relative imports resolved."""
    found = set()
    package = ["errata", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*above, *([node.module] if node.module else [])])
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    return found


def test_imports_go_down():
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for number in [FLOORS.index(path.relative_to(ROOT).parts[0])]
        for name in sorted(imported(path))
        if name.split(".")[:1] == ["errata"] and name.split(".")[1:2] != []
        if name.split(".")[1] in FLOORS[number + 1 :]
    ]
    assert not bad, "\n".join(bad)


def test_editors_know_no_family():
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "editors").rglob("*.py"))
        for name in imported(path)
        if name.startswith("errata.adapters")
    ]
    assert not bad, "\n".join(bad)


def test_floors_import_only_what_they_may():
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for floor in [path.relative_to(ROOT).parts[0]]
        if floor in ALLOWED
        for name in sorted(imported(path))
        for top in [name.split(".")[0]]
        if top not in ALLOWED[floor] | {"errata"} | sys.stdlib_module_names
    ]
    assert not bad, "\n".join(bad)


def test_no_bare_kernels_package_is_imported():
    """Hugging Face ships a top-level `kernels`, and transformers looks for it."""
    bad = [p for p in SOURCES for name in imported(p) if name.split(".")[0] in FLOORS]
    assert not bad, f"import errata.<floor>, not a bare floor: {bad}"
    script = (
        "import errata.functional, sys, importlib.util as u; sys.exit(bool(u.find_spec('kernels')))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", script], cwd=ROOT.parent, check=False)
    assert found.returncode == 0, "a top-level `kernels` must not be importable beside errata"


def docstring_lines(node: ast.FunctionDef) -> int:
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and ast.get_docstring(node, clean=False) is not None
    return (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0


def test_files_and_functions_stay_short():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    long = []
    for path in [*SOURCES, *tests]:
        lines = path.read_text().count("\n")
        if lines > 420:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        long += [
            f"{path.relative_to(ROOT)}: {node.name} has {size} lines"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.FunctionDef)
            for size in [(node.end_lineno or 0) - node.body[0].lineno + 1 - docstring_lines(node)]
            if size > 90
        ]
    assert not long, "\n".join(long)


def test_nothing_is_pickled():
    """The name of its error is all that anyone may have of pickle."""
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in imported(path)
        if name.split(".")[0] in {"cloudpickle", "dill", "joblib", "shelve", "marshal"}
    ]
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: import pickle as a module")
            whole = ast.unparse(node)
            where = f"{path.relative_to(ROOT)}:{node.lineno}" if hasattr(node, "lineno") else ""
            if isinstance(node, ast.Attribute) and whole.startswith("pickle."):
                bad += [f"{where} uses {whole}"] * (node.attr != "UnpicklingError")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.save",
                "torch.load",
            ):
                bad += [f"{where}: {whole}"] * ("weights_only=True" not in whole)
    assert not bad, "\n".join(bad)


def test_no_branch_on_a_models_name():
    wanted = re.compile(r"\bif .*\bmodel_(name|type)\b *==")
    bad = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if wanted.search(line)
    ]
    assert not bad, "a family is data, looked up once: " + ", ".join(bad)


@pytest.mark.parametrize("floor", ["functional", "editors"])
def test_no_value_leaves_the_device_below_the_edge(floor):
    bad = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / floor).rglob("*.py"))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"item", "cuda"}
    ]
    assert not bad, "no .item() and no device names: " + ", ".join(bad)


def test_packages_of_the_tree_are_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {
        "errata." + ".".join(path.parent.relative_to(ROOT).parts)
        for floor in FLOORS
        for path in (ROOT / floor).rglob("__init__.py")
    }
    assert set(settings["packages"]) == here


def test_every_file_beside_the_code_is_package_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = settings.get("package-data", {})
    tracked = subprocess.run(
        ["git", "ls-files", *FLOORS], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    missing = []
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md"} or not path.is_file():
            continue
        home = next(p for p in path.parents if (p / "__init__.py").is_file())
        package = "errata." + ".".join(home.relative_to(ROOT).parts)
        inside = path.relative_to(home)
        patterns = [*data.get(package, []), *data.get("*", [])]
        if not any(
            inside.full_match(p) if hasattr(inside, "full_match") else inside.match(p)
            for p in patterns
        ):
            missing.append(name)
    assert not missing, "not in [tool.setuptools.package-data]: " + ", ".join(missing)


def test_the_lock_meets_what_the_package_asks_for():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lock if line and not line.startswith("#"))
    named = {re.split(r"[<>=]", one)[0] for one in asked["dependencies"]}
    assert named <= set(pins)
    for one in asked["dependencies"]:
        name, lowest = re.match(r"([\w-]+)>=([\d.]+)", one).groups()
        pinned = tuple(map(int, pins[name].split(".")))
        assert pinned >= tuple(map(int, lowest.split("."))), one


def _fresh(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter; a failure shows what it said."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )


def test_functional_is_lean():
    names = ["transformers", "PIL", "sklearn", "scipy", "torchvision"]
    script = "import sys, errata.functional, errata.functional.binding.bound_model\n"
    script += f"print([n for n in {names} if n in sys.modules])"
    assert _fresh(script).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "bench.cli.main",
        "bench.runs.settings",
        "bench.storage.results_log",
        "functional.deltas.inspection",
    ],
)
def test_light_doors_do_not_import_torch(name):
    script = f"import sys, errata.{name}; print('torch' in sys.modules)"
    assert _fresh(script).stdout.strip() == "False"


def test_namespace_holds_the_floors():
    for floor in FLOORS:
        module = importlib.import_module(f"errata.{floor}")
        assert Path(module.__file__).resolve().parent == ROOT / floor
        assert (module.__doc__ or "").strip(), f"errata.{floor} must say what it is"


FACTORIES = {
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "linspace",
    "eye",
    "randint",
    "randperm",
    "logspace",
}


def test_tensors_are_made_with_a_dtype_and_a_device():
    """Below bench: `torch.set_default_dtype` and `set_default_device` must change no edit."""
    bad = []
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "bench":
            continue
        for node in ast.walk(tree(path)):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if (
                    name in FACTORIES
                ):
                    given = {keyword.arg for keyword in node.keywords}
                    if None not in given and not given >= {"dtype", "device"}:
                        bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name}")
    assert not bad, "\n".join(bad)
