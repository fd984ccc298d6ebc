"""Public names of the first version are gone from code, docs, settings and help."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "functional", "adapters", "editors", "bench"]

TYPES = """
Anatomy Ask Attached BadInput BadSettings BaseMismatch Blend Book Course DeltaFault Demo
EditorChoice Editing Encoded Handed KindUnsupported Known Leaf Learner Ledger Lesson Lessons
Likeness Maker Marks Measured ModelChoice ModelUnsupported Moment Norms Optimiser Past Peek Png
Proof Quoted Reach Reader Reading Reads Remembering Rewrite Rewrites Rule Scored SgdState
ShapeMismatch Shelf Sight Skeletons Stood Terms Unformed UnknownSite Want Whole
LlavaOnevisionPictures Qwen2VLPictures Qwen3VLPictures EDITORS READINGS OURS TINY MARK IGNORE
HUGGING_FACE NASTY
""".split()
FUNCTIONS = """
absorbed activation_of adapt added_key answered apart_below apart_tokens appended as_bytes
as_dense as_hugging_face as_png at_prompt base_of before_new check_cases check_settings checked
clip_norm collated continue_rows corpus derive descend discover draw_mask empty_past enrol
family_in filled fold from_mask from_peft header_for holm image_key joined key_of keyed kill_delta
lesson_loss listed lore make_plan mean_scored memorise micro_parts micros misfits misnamed
module_of narrows neighbour_match net_of no_past no_thin normalise open_pngs open_regular padded
padded_stack peek picture_name picture_of pool_of queries_of reach_of read_as read_table reader_of
recall rewriting row_bytes rows_nll rows_of runs_above runs_below same_base scale_of seeing_once
shrunk similarity_loss site_of size_in_bytes sniff statefile stopped_at strangers strict_json
text_of thin to_peft tokens_of unformed_gradients unknown_names unmarked unpacked unthinnable
whole_file whole_folder
""".split()
FIELDS = """
alive anchor asks begins beside donate everywhere extras generate_for least least_look lr_of
merge_every neighbour_answers num_hidden num_texts on_fault on_missing oddities recursive rewrites
stop_change touched validate_every vision_depth waited
""".split()
KEYS = {
    "run": "out generate generate_for ppl_r memory threads deltas pictures",
    "cases": "count images on_missing on_fault clean strip repair neighbours neighbour_answers",
    "protocol": "together group lengths asked",
}
COMMANDS = ["ask", "apply", "show", "check", "fold"]
# They hold the old names on purpose: what was renamed, and the reader of format 1.
EXEMPT = {"CHANGELOG.md", "format1.py", "renamed.py", "settings_file.py"}
OLD = {*TYPES, *FUNCTIONS, *FIELDS}


def identifiers(path: Path) -> set[str]:
    """Names that a file defines or uses as attribute, parameter, keyword or type.

    Not its locals.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.arg() | ast.keyword():
                names.add(node.arg)
            case ast.Attribute():
                names.add(node.attr)
            case ast.Name() if node.id in TYPES:
                names.add(node.id)
            case ast.alias():
                names |= set(node.name.split("."))
    return names


def test_code_has_no_old_name():
    files = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
    bad = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in files
        for found in [identifiers(path) & OLD]
        if found
    }
    assert len(files) > 200
    assert bad == {}


def test_docs_and_docstrings_quote_no_old_name():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/**/*.md")]
    sources = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
    quoted = re.compile(r"`([\w.]+)`")
    bad = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in {*pages, *sources}
        if path.name not in EXEMPT and ".venv" not in path.parts
        for found in [{n.split(".")[-1] for n in quoted.findall(path.read_text())} & OLD]
        if found
    }
    assert bad == {}


@pytest.mark.parametrize(
    "path",
    [ROOT / "demo.toml", *sorted((ROOT / "examples").glob("*.toml")), ROOT / "docs/metrics.toml"],
    ids=lambda path: path.name,
)
def test_settings_files_use_the_new_keys(path):
    settings = tomllib.loads(path.read_text())
    assert not set(settings) & set(KEYS["run"].split())
    assert not set(settings.get("cases", {})) & set(KEYS["cases"].split())
    protocols = settings.get("protocols", settings.get("protocol", []))
    for protocol in protocols if isinstance(protocols, list) else [protocols]:
        assert not set(protocol) & set(KEYS["protocol"].split())


def test_help_lists_no_old_command():
    shown = subprocess.run(
        [sys.executable, "-m", "errata.bench", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = set(re.findall(r"^    (\w+)", shown, re.M))
    assert {"run", "edit", "generate", "inspect", "verify", "fuse", "train"} <= commands
    assert not commands & set(COMMANDS)
