from __future__ import annotations

import re
from pathlib import Path

from errata.functional import generate

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_readmes_program_runs_and_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = [block for block in blocks("python") if "import" in block]
    names = {}
    exec(compile(program, "README.md", "exec"), names)

    model, question = names["model"], names["question"]
    (before,), (after,) = generate(model, [question]), generate(names["edited"], [question])
    assert capsys.readouterr().out.strip() == f"{[before]} -> {[after]}"
    assert before.strip() != question.target
    assert after.strip() == question.target
    assert generate(names["again"], [question]) == [after]
    assert names["many"].header.stack == 8
    assert question.prompt in program  # the comment shows what is really asked
    assert [path.name for path in tmp_path.iterdir()] == ["home.safetensors"]


def test_the_readmes_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
