"""MkDocs hook: a reference page for every public name, and the pages kept elsewhere in the tree."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FLOORS = ["functional", "adapters", "editors", "kernels"]
ELSEWHERE = {
    "format.md": "functional/deltas/FORMAT.md",
    "families.md": "adapters/families/FAMILIES.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "zoo.md": "adapters/zoo/README.md",
    "licenses.md": "adapters/zoo/LICENSES.md",
}


def defining_module(floor: str, name: str) -> str:
    """Return the full name of the module that defines an exported name."""
    facade = importlib.import_module(f"errata.{floor}")
    table = getattr(facade, "_MODULES", {})
    if name in table:
        module = table[name]
        return module if module.startswith("errata.") else f"errata.{floor}.{module}"
    module = getattr(getattr(facade, name), "__module__", "")
    return module if module.startswith("errata.") else facade.__name__


def public_names() -> dict[str, list[tuple[str, str]]]:
    """Return floor -> (name, identifier) of every exported name, sorted."""
    return {
        floor: [
            (name, f"{defining_module(floor, name)}.{name}")
            for name in sorted(importlib.import_module(f"errata.{floor}").__all__)
        ]
        for floor in FLOORS
    }


def method_names() -> dict[str, list[str]]:
    """Return method -> identifiers of its settings, factory and presets."""
    from errata.editors import METHODS

    return {
        name: [
            f"{obj.__module__}.{obj.__name__}"
            for obj in [method.config, method.factory, getattr(method, "trainable", None)]
            if obj is not None
        ]
        for name, method in METHODS.items()
    }


def entry_names() -> list[str]:
    """Return the identifiers of the entries of all delta kinds."""
    from errata.functional.kinds.table import KINDS

    return [f"{entry.__module__}.{entry.__name__}" for entry in KINDS]


def summary(identifier: str) -> str:
    """Return the first line of a docstring; empty for plain values."""
    module, _, name = identifier.rpartition(".")
    value: Any = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(value) or callable(value)):
        return ""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def generated_pages() -> dict[str, str]:
    """Return path -> Markdown of every page of the reference."""
    pages = {}
    for floor, names in public_names().items():
        lines = [f"# errata.{floor}", "", "| name | |", "|---|---|"]
        for name, identifier in names:
            pages[f"reference/{floor}/{name}.md"] = (
                f"# {name}\n\n`from errata.{floor} import {name}`\n\n::: {identifier}\n"
            )
            lines.append(f"| [`{name}`]({name}.md) | {summary(identifier)} |")
        pages[f"reference/{floor}/index.md"] = "\n".join(lines) + "\n"
    lines = ["# Methods", "", "| method | |", "|---|---|"]
    for name, identifiers in method_names().items():
        body = "\n\n".join(f"::: {one}" for one in identifiers)
        pages[f"reference/methods/{name}.md"] = f"# {name}\n\n{body}\n"
        lines.append(f"| [`{name}`]({name}.md) | {summary(identifiers[1])} |")
    pages["reference/methods/index.md"] = "\n".join(lines) + "\n"
    pages["reference/entries.md"] = (
        "# Entries of delta kinds\n\n" + "\n\n".join(f"::: {one}" for one in entry_names()) + "\n"
    )
    return pages


def relinked(text: str, source: str) -> str:
    """Point the links of a page kept elsewhere to pages of the site, or to the repository."""
    homes = {path: page for page, path in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        if target.startswith(("http", "mailto")) or not target:
            return match[0]
        path = (ROOT / source).parent.joinpath(target).resolve()
        inside = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
        if inside in homes:
            page = homes[inside]
        elif inside.startswith("docs/"):
            page = inside.removeprefix("docs/")
        elif inside == "README.md":
            page = "index.md"
        else:
            page = f"https://github.com/errata-vlm/errata/blob/main/{inside}"
        return f"]({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links of the pages in `docs` to pages of the site, or to the repository."""
    return relinked(markdown, f"docs/{page.file.src_uri}") if page.file.abs_src_path else markdown


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the placeholder of the reference by the list of its pages."""
    pages = list(generated_pages())
    sections: list[Any] = []
    for folder in [*FLOORS, "methods"]:
        inside = [page for page in pages if page.startswith(f"reference/{folder}/")]
        title = "methods" if folder == "methods" else f"errata.{folder}"
        index = f"reference/{folder}/index.md"
        sections.append({title: [index, *(page for page in inside if page != index)]})
    sections.append("reference/entries.md")
    assert isinstance(config.nav, list)
    config.nav[-1] = {"Reference": sections}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and those kept elsewhere in the tree."""
    pages = generated_pages()
    pages |= {page: relinked((ROOT / path).read_text(), path) for page, path in ELSEWHERE.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files
