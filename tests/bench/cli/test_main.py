"""The command line as a user meets it: exit codes, one sentence, nothing half-written."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from errata.bench.cli.main import main
from errata.bench.evaluation import questions
from errata.bench.runs import runner
from errata.bench.runs.identity import leg_identity
from errata.bench.runs.progress import Progress, duration
from errata.bench.storage import results_log
from errata.bench.storage.results_log import ResultsLog, read_rows
from errata.functional import load_delta

SETTINGS = """
output_dir = "{out}"
num_thumbnails = 1
[cases]
source = "world"
num_cases = 2
[[models]]
id = "tiny/llava"
[[editors]]
type = "finetune"
num_steps = 2
[[protocols]]
type = "single"
batch_size = 1
"""


@pytest.fixture
def settings(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SETTINGS.format(out=tmp_path / "out"))
    return path


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "cat.png"
    Image.new("RGB", (48, 40), (200, 30, 60)).save(path)
    return path


def said(capsys, *argv: object) -> str:
    """The one sentence a command that cannot be done ends with."""
    before = set(Path.cwd().rglob("*"))
    assert main([*map(str, argv)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("errata: ")
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    assert set(Path.cwd().rglob("*")) == before
    return error


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_ends_with_a_table_a_report_and_files(settings, tmp_path, capsys):
    assert main(["run", str(settings)]) == 0
    shown = capsys.readouterr()
    assert "llava · single" in shown.out
    assert "M-Gen" in shown.out
    assert "2/2 edits" in shown.err
    out = tmp_path / "out"
    rows = read_rows(out)
    assert {row.case for row in rows} == {row.case for row in rows if row.probe == "reliability"}
    assert len({row.case for row in rows}) == 2
    marker = json.loads((out / "run.json").read_bytes())
    assert list(marker["legs"]) == ["llava/finetune/single"]
    assert {row.run for row in rows} == {leg_identity(*marker["legs"].values())}
    assert (out / "settings.toml").read_text() == settings.read_text()
    assert "<html" in (out / "report.html").read_text()
    assert json.loads((out / "summary.json").read_bytes())["legs"]
    deltas = sorted((out / "deltas" / "llava" / "finetune" / "single").iterdir())
    assert [path.name for path in deltas] == ["case-00000.safetensors", "case-00001.safetensors"]
    assert load_delta(deltas[1]).header.editor == "finetune"
    shown = {image for row in rows if row.case_number == 0 for image in row.images}
    assert {path.stem for path in (out / "thumbnails").iterdir()} == shown
    records = ResultsLog(out).records
    assert all(one.edit_seconds > 0 and one.peak_bytes > 1 << 20 for one in records)


def test_a_finished_run_is_not_run_again(settings, tmp_path, capsys, monkeypatch):
    assert main(["run", str(settings)]) == 0
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    table = capsys.readouterr().out
    monkeypatch.setattr(runner, "open_model", lambda choice: pytest.fail("no model is needed"))
    assert main(["run", str(settings)]) == 0
    assert capsys.readouterr().out == table
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_results_of_other_settings_are_refused_by_name_and_overwrite_clears_them(
    settings, tmp_path, capsys
):
    assert main(["run", str(settings)]) == 0
    settings.write_text(settings.read_text().replace("num_steps = 2", "num_steps = 3"))
    capsys.readouterr()
    error = said(capsys, "run", settings)
    assert "llava/finetune/single has results of other settings of the editor" in error
    assert "num_steps: 2 became 3" in error
    assert "--overwrite" in error
    assert len({row.case for row in read_rows(tmp_path / "out")}) == 2
    assert main(["run", str(settings), "--overwrite"]) == 0
    assert (
        "3"
        in json.loads((tmp_path / "out/run.json").read_bytes())["legs"]["llava/finetune/single"][
            "settings of the editor"
        ]
    )
    assert main(["run", str(settings), "--output", str(tmp_path / "two")]) == 0
    assert (tmp_path / "two" / "results.jsonl").stat().st_size > 0


def test_nothing_that_is_not_the_runs_is_removed_or_replaced(settings, tmp_path, capsys):
    out = tmp_path / "out"
    foreign = [
        out / "thumbnails" / "holiday.png",
        out / "deltas" / "thesis.txt",
        out / "deltas" / "llava" / "mine.safetensors",
        out / "notes.md",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert main(["run", str(settings), "--overwrite"]) == 0
    assert main(["run", str(settings), "--overwrite"]) == 0
    assert [path.read_text() for path in foreign] == ["mine"] * 4
    written = {p for p in out.rglob("*") if p.is_file()} - {*foreign, out / ".lock"}
    listed = {out / line for line in (out / "files.txt").read_text().splitlines()}
    assert listed | {out / "run.json", out / "files.txt"} >= written


@pytest.mark.parametrize("name", ["results.jsonl", "report.html", "settings.toml", "files.txt"])
def test_a_file_of_someone_else_is_not_replaced(settings, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").touch()
    (out / name).write_text("mine")
    for words in ((), ("--overwrite",)):
        assert main(["run", str(settings), *words]) == 2
        assert name in capsys.readouterr().err
        assert (out / name).read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"run": "x", "versions": "y"}', '{"kind":"errata run","format":2,"legs":{}}'],
)
def test_a_folder_is_ours_only_by_a_marker_we_wrote(settings, tmp_path, capsys, text):
    out = tmp_path / "out"
    (out / "deltas").mkdir(parents=True)
    (out / "deltas" / "old.safetensors").touch()
    (out / "run.json").write_text(text)
    (out / "files.txt").write_text("deltas/old.safetensors\n")
    (out / ".lock").touch()
    for words in ((), ("--overwrite",)):
        assert "run.json, which this version of errata did not write" in said(
            capsys, "run", settings, *words
        )
    assert (out / "deltas" / "old.safetensors").exists()


def test_a_forged_manifest_reaches_nothing_outside(settings, tmp_path, capsys):
    assert main(["run", str(settings)]) == 0
    (tmp_path / "precious").touch()
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "case-1").touch()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "far")
    with (tmp_path / "out" / "files.txt").open("a") as file:
        file.write(f"../precious\n{tmp_path / 'precious'}\nlink/case-1\n./../precious\n\n")
    assert main(["run", str(settings), "--overwrite"]) == 0
    assert (tmp_path / "precious").exists()
    assert (tmp_path / "far" / "case-1").exists()


def test_two_runs_of_one_folder_exclude_each_other(settings, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    with results_log.lock_folder(tmp_path / "out"):
        assert "in use" in said(capsys, "run", settings)


def test_a_full_disk_ends_the_run_and_the_next_goes_on(settings, tmp_path, capsys, monkeypatch):
    real, calls = results_log._sync, []

    def full(file):
        calls.append(file)
        if len(calls) == 3:  # the second unit's rows
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(results_log, "_sync", full)
    assert main(["run", str(settings)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len({row.case for row in read_rows(tmp_path / "out")}) == 1
    monkeypatch.undo()
    assert main(["run", str(settings), "--output", str(tmp_path / "out")]) == 0
    assert len({row.case for row in read_rows(tmp_path / "out")}) == 2


def test_a_place_that_can_not_be_written_is_said(settings, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in said(capsys, "run", settings, "--output", tmp_path / "file" / "out")


def test_every_fault_of_a_settings_file_is_said_at_once(settings, capsys):
    text = settings.read_text().replace("finetune", "finetuen").replace("num_cases", "num_csaes")
    settings.write_text(text.replace("batch_size = 1", "batch_size = -1"))
    error = said(capsys, "run", settings)
    assert "did you mean 'num_cases'?" in error
    assert "'finetune'" in error
    assert "protocols[0].batch_size" in error


def test_what_is_not_there_is_said_before_anything_is_loaded(settings, capsys, monkeypatch):
    monkeypatch.setattr(runner, "open_model", lambda choice: pytest.fail("nothing may be loaded"))
    more = '[[models]]\nid = "micro/lava"\ntemplate = "easyedti"\n[[models]]\nid = "./nowhere"\n'
    text = settings.read_text().replace("num_thumbnails = 1", 'scorers = ["errata", "vlkbe"]')
    settings.write_text(text + more + '[[models]]\nid = "tiny/gpt2"\ndevice = "abacus"\n')
    error = said(capsys, "run", settings)
    for part in ("'lava'", "did you mean 'easyedit'?", "./nowhere", "abacus", "'vlkeb'"):
        assert part in error


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("num_steps = 2", 'sites = ["layers.9.mlp.down"]'), "layers.9.mlp.down"),
        (("tiny/llava", "tiny/lava"), "'lava'"),
        (("tiny/llava", "micro/none"), "'none'"),
        (('source = "world"\nnum_cases = 2', 'source = "file"\npath = "no.json"'), "no.json"),
        (("num_thumbnails = 1", 'scorers = ["erata"]'), "errata"),
        (("[[editors]]", 'device = "abacus"\n[[editors]]'), "abacus"),
    ],
)
def test_what_a_run_can_not_have_is_said(settings, capsys, change, part):
    settings.write_text(settings.read_text().replace(*change))
    assert main(["run", str(settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("errata: ")
    assert part in error


def test_an_edit_is_a_file_and_ask_shows_what_it_does(image, tmp_path, capsys):
    asked = ["--model", "tiny/llava", "--image", str(image), "--prompt", "what is it?"]
    steps = ["--target", "owl", "--set", "num_steps=12", "--set", "lr=0.05"]
    assert main(["edit", *asked, *steps, "-o", "owl.safetensors"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown] == ["before", "after", "owl.safetensors"]
    answers = []
    for more in ([], ["--delta", "owl.safetensors"]):
        assert main(["generate", *asked, *more, "--max-new-tokens", "4"]) == 0
        answers.append(capsys.readouterr().out.strip())
    assert answers[0] != answers[1]
    assert answers[1].startswith("owl")
    delta = load_delta(tmp_path / "owl.safetensors")
    assert delta.header.base.id == "tiny/llava"
    assert len(delta.header.edits) == 1


def test_bad_requests_are_said_and_leave_nothing(image, tmp_path, capsys):
    cut, note = tmp_path / "cut.png", tmp_path / "note.png"
    cut.write_bytes(image.read_bytes()[:70])
    note.write_text("not a picture")
    start = ["edit", "--model", "tiny/llava", "--prompt", "what is it?", "-o", "e.safetensors"]
    wanted = [
        (["--target", " "], "--target"),
        (["--target", "owl", "--image", cut], "cut.png"),
        (["--target", "owl", "--image", note], "note.png"),
        (["--target", "owl", "--image", tmp_path / "none.png"], "none.png"),
        (["--target", "owl", "--editor", "lroa"], "'lora'"),
        (["--target", "owl", "--set", "nmu_steps=3"], "'num_steps'"),
        (["--target", "owl", "--set", "lr"], "KEY=VALUE"),
        (["--target", "owl", "--preset", "nobody"], "'nobody'"),
        (["--target", "owl", "--prompt", "why? " * 700], "512 tokens"),
        (["--target", "owl", "-o", tmp_path / "no" / "e.safetensors"], "could not be written"),
        (["--target", "owl", "-o", tmp_path], "folder"),
    ]
    for more, part in wanted:
        assert part in said(capsys, *start, *more)


def test_a_delta_for_another_base_is_refused(image, capsys):
    edit = ["edit", "--model", "tiny/llava", "--prompt", "who?", "--target", "bo"]
    assert main([*edit, "--set", "num_steps=1", "-o", "d.safetensors"]) == 0
    capsys.readouterr()
    ask = ["generate", "--model", "tiny/qwen2_vl", "--prompt", "who?", "--delta", "d.safetensors"]
    assert "made for" in said(capsys, *ask)
    assert "cat.png" in said(capsys, *ask[:-1], image)


def test_models_and_editors_are_listed(capsys):
    assert main(["models"]) == 0
    assert "qwen2_vl" in capsys.readouterr().out
    assert main(["editors", "lora"]) == 0
    shown = capsys.readouterr().out
    assert "rank = 8" in shown
    assert "finetune:" not in shown
    assert "'finetune'" in said(capsys, "editors", "finetuen")


def test_debug_shows_where_it_came_from(capsys):
    with pytest.raises(FileNotFoundError):
        main(["--debug", "run", "nofile.toml"])
    assert "nofile.toml: No such file" in said(capsys, "run", "nofile.toml")


def test_a_bug_is_called_one(settings, capsys, monkeypatch):
    monkeypatch.setattr(questions, "validate_cases", lambda cases, **_: 1 / 0)
    monkeypatch.setattr(runner, "validate_cases", questions.validate_cases)
    assert main(["run", str(settings)]) == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err


def test_stopping_by_hand_is_no_error(settings, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "open_model", stop)
    assert main(["run", str(settings)]) == 130
    assert "the same command resumes" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_few_lines_elsewhere(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("errata.bench.runs.progress.time.monotonic", lambda: clock[0])
    for stream, ends in ((Terminal(), 1), (io.StringIO(), 3)):
        progress = Progress(stream, every=10)
        progress.start("m", 40, num_completed=10)
        for _ in range(30):
            clock[0] += 1
            progress.step()
        progress.stop()
        text = stream.getvalue()
        assert text.count("\n") == ends
        assert "20/40 edits  1.0 edits/s  20 s left" in text
        assert text.rstrip().endswith("40/40 edits  1.0 edits/s  in 30 s")
    assert duration(3599.7) == "1 h 0 min"


def test_settings_hold_for_the_process_that_is_started():
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_run_that_got_nowhere_leaves_its_folder_to_the_corrected_one(settings, capsys):
    good = settings.read_text()
    settings.write_text(good.replace("num_steps = 2", 'sites = ["nowhere"]'))
    assert main(["run", str(settings)]) == 2
    assert "'nowhere'" in capsys.readouterr().err
    settings.write_text(good)
    assert main(["run", str(settings)]) == 0
    settings.write_text(good.replace("num_steps = 2", "num_steps = 3"))
    assert main(["run", str(settings)]) == 2
    assert "other settings of the editor" in capsys.readouterr().err


def test_generate_samples_on_request(capsys):
    words = ["generate", "--model", "tiny/llama", "--prompt", "who is it?", "--max-new-tokens", "6"]

    def answer(*more):
        assert main([*words, *more]) == 0
        return capsys.readouterr().out

    assert answer("--top-k", "1") == answer()
    one, two = answer("--temperature", "2"), answer("--temperature", "2", "--seed", "1")
    assert one != two
    assert one == answer("--temperature", "2", "--seed", "0")
    assert main([*words, "--top-p", "2"]) == 2
    assert "top_p must be above 0 and at most 1" in capsys.readouterr().err
