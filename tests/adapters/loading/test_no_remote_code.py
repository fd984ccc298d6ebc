"""No code of a checkpoint runs, whatever its config, tokenizer or processor names."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from errata.adapters import from_pretrained, tiny_model
from errata.functional.errors import ErrataError, UnsupportedModelError

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    "config.json": {"AutoConfig": "evil.Thing", "AutoModelForCausalLM": "evil.Thing"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Thing", "evil.Thing"]},
    "processor_config.json": {"AutoProcessor": "evil.Thing", "AutoImageProcessor": "evil.Thing"},
    "preprocessor_config.json": {"AutoProcessor": "evil.Thing", "AutoImageProcessor": "evil.Thing"},
}


def trapped(name, tmp_path, unknown_type):
    """A checkpoint whose every file names code that leaves a trace."""
    module, processor = tiny_model(name)
    folder = tmp_path / "model"
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file, auto_map in FILES.items():
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        if file == "config.json" and unknown_type:
            content["model_type"] = "internvl_chat"
        path.write_text(json.dumps(content | {"auto_map": auto_map}))
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Thing: pass\n"
    )
    return folder


@pytest.mark.parametrize("unknown_type", [False, True])
@pytest.mark.parametrize("name", ["llava", "llama", "qwen2_vl"])
def test_code_that_a_checkpoint_names_is_not_run(name, tmp_path, unknown_type):
    """In a process of its own, with a user who answers `y` to everything."""
    folder = trapped(name, tmp_path, unknown_type)
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from errata import adapters\n"
        "from errata.functional.errors import ErrataError\n"
        "try:\n    print(adapters.from_pretrained(sys.argv[1]).card.family)\n"
        "except ErrataError as error:\n    print('refused', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if unknown_type:
        assert "code of a checkpoint is never run; take OpenGVLab/InternVL3-8B-hf" in done.stdout
    else:
        assert name in done.stdout


def test_a_model_that_is_code_alone_is_refused_with_another_to_take(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own_thing", "auto_map": {"AutoConfig": "a.B"}})
    )
    with pytest.raises(UnsupportedModelError, match="often named -hf"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "molmo"}))
    with pytest.raises(ErrataError, match="Molmo2"):
        from_pretrained(tmp_path)


def test_every_loader_says_that_no_code_is_trusted():
    """Each `Auto*.from_pretrained` gets `trust_remote_code=False`, itself or from `hub_options`."""
    bad = []
    for floor in ("functional", "adapters", "editors", "bench"):
        for path in sorted((ROOT / floor).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = ast.unparse(node.func.value)
                if node.func.attr not in ("from_pretrained", "from_config") or "Auto" not in owner:
                    continue
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                starred = keywords.pop(None, "")
                said = keywords.get("trust_remote_code") == "False"
                if not said and starred not in ("source.options", "hub_options", "options"):
                    bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:90]}")
    assert not bad, "\n".join(bad)
