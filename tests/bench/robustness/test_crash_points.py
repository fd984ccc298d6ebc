"""A crash at every file event: what has a final name is whole, and the next start ends the same."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from errata.adapters.interop.peft_export import export_peft
from errata.bench.robustness.crash_runs import _run, _train
from errata.bench.robustness.crash_writes import make_checkpoint, make_delta
from errata.bench.runs.settings_file import parse_settings
from errata.functional import load_delta, merge, save_delta
from errata.functional.deltas.fusing import fuse

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.")
_ARMED: list[list[int]] = []  # [events left before the crash], if armed
_IS_HOOKED: list[bool] = []


def _hook(event: str, args: tuple) -> None:
    if not _ARMED or not event.startswith(EVENTS):
        return
    if event == "open":
        mode, flags = args[1], args[2]
        is_written = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        )
        if not is_written:
            return
    _ARMED[0][0] -= 1
    if _ARMED[0][0] < 0:
        os._exit(77)  # as SIGKILL: no handler, no flush


def crash_at(work: Callable[[], object], event: int) -> bool:
    """Run work in a fork that dies at its n-th file event; whether it died."""
    if not _IS_HOOKED:
        sys.addaudithook(_hook)
        _IS_HOOKED.append(True)
    child = os.fork()
    if not child:
        try:
            _ARMED.append([event])
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 77)
    return status == 77


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file with a final name whose bytes must not depend on the run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".safetensors", ".jsonl", ".pt", ".toml")
        if path.name not in ("progress.jsonl", "checkpoint.safetensors")
    }


SETTINGS = """
output_dir = "decided by the test"
num_threads = 1
num_thumbnails = 1
[cases]
source = "world"
num_cases = 2
[[models]]
id = "tiny/llava"
[[editors]]
type = "lora"
num_steps = 1
[[protocols]]
type = "single"
batch_size = 1
"""


def run_in(folder: Path) -> None:
    settings = parse_settings(SETTINGS.replace("decided by the test", str(folder)))
    _run(settings, SETTINGS)


def fuse_in(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    if not (folder / "base").is_dir():
        make_checkpoint(folder / "making")
        (folder / "making").rename(folder / "base")
    if not (folder / "out").is_dir():
        fuse(make_delta(0), folder / "base", folder / "out")


def write_in(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_delta(folder / "edit.safetensors", make_delta(0))
    save_delta(folder / "edit.safetensors", merge(make_delta(0), make_delta(1)))
    if not (folder / "adapter").is_dir():
        export_peft(make_delta(1), folder / "adapter")


@pytest.mark.parametrize(
    ("work", "stride"),
    [(write_in, 1), (fuse_in, 1), (_train, 7), (run_in, 10)],
    ids=["save, merge, export", "fuse", "train", "run"],
)
def test_a_crash_at_any_file_event_is_resumed_to_the_same_bytes(work, stride, tmp_path):
    torch.set_num_threads(1)
    work(tmp_path / "calm")
    want = contents(tmp_path / "calm")
    event = crashes = 0
    while True:
        folder = tmp_path / "shaken"
        shutil.rmtree(folder, ignore_errors=True)
        if not crash_at(functools.partial(work, folder), event):
            break
        crashes += 1
        for path in folder.rglob("edit.safetensors"):
            load_delta(path)  # whole, old or new
        if (folder / "making").exists():  # of the test's own making
            shutil.rmtree(folder / "making")
        work(folder)
        assert contents(folder) == want, f"after a crash at event {event}"
        assert not list(folder.rglob("*.part")), f"after a crash at event {event}"
        event += stride
    assert crashes >= 5
