"""SIGKILL while a run edits and an editor trains: `python -m errata.bench.robustness.crash_runs`.

Each is started again after every kill, and must end with the bytes of one that nobody disturbed.
The processes are forks of this one, which has imported everything but computed nothing: a start
costs no seconds of imports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import transformers  # noqa: F401 - forks shall not import it each
from safetensors.torch import load_file, save_file

from errata.bench.runs import runner
from errata.bench.runs.progress import Progress
from errata.bench.runs.settings import RunSettings
from errata.bench.runs.settings_file import parse_settings
from errata.functional.errors import InvalidInputError

__all__ = ["Outcome", "kill_and_swap", "kill_run", "kill_training"]


class Outcome(NamedTuple):
    """What was seen of work that was killed and started again until it ended.

    Attributes:
        kills: Kills.
        starts: Starts.
        bytes: Size of the results.
        same: Whether they are those of undisturbed work.
    """

    kills: int
    starts: int
    bytes: int
    same: bool


def _started(work: Callable[[], object]) -> int:
    """Start work in a fork and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _grown(path: Path, size: float, child: int) -> None:
    """Wait until a file has this size, or the process that writes it has ended."""
    while not (path.is_file() and path.stat().st_size >= size) and size > 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def _ended(child: int) -> int:
    """Wait for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(settings: RunSettings, text: str) -> None:
    with open(os.devnull, "w") as quiet:
        runner.run(settings, text, progress=Progress(quiet))


def _contents(folder: Path) -> dict[str, str]:
    """Digest of every file whose bytes must not depend on how the run went."""
    found = [folder / "results.jsonl", *sorted(folder.rglob("*.safetensors"))]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def kill_run(
    text: str,
    folder: Path,
    kills: int = 10,
    seed: int = 0,
    after_kill: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Run settings undisturbed, then again with kills, and compare.

    Args:
        text: Settings of a run, as TOML.
        folder: Folder for both runs.
        kills: Kills.
        seed: Seed of the moments.
        after_kill: Called with the number of kills after each.

    Returns:
        What was seen.

    Raises:
        SystemExit: If a start failed.
    """
    settings = parse_settings(text)
    calm, shaken = (
        msgspec.structs.replace(settings, output_dir=str(folder / name))
        for name in ("calm", "shaken")
    )
    began = time.monotonic()
    if _ended(_started(lambda: _run(calm, text))) != 0:
        raise SystemExit("the undisturbed run failed")
    span = time.monotonic() - began
    size = (folder / "calm" / "results.jsonl").stat().st_size
    moments = random.Random(seed)
    # By how far the results have come, not by the clock: a run may be slower or faster than the
    # undisturbed one, and each kill shall find something left to interrupt.
    marks = sorted(moments.uniform(-0.1, 0.95) * size for _ in range(kills))
    count = starts = 0
    while True:
        child = _started(lambda: _run(shaken, text))
        starts += 1
        if count < kills:
            _grown(folder / "shaken" / "results.jsonl", marks[count], child)
            time.sleep(moments.uniform(0, 0.05 * span / kills))
            os.kill(child, signal.SIGKILL)
        status = _ended(child)
        if status == -signal.SIGKILL:
            count += 1
            after_kill(count)
        elif status != 0:
            raise SystemExit(f"a run that was resumed after {count} kills failed")
        else:
            break
    same = _contents(folder / "calm") == _contents(folder / "shaken")
    return Outcome(count, starts, size, same and not list((folder / "shaken").rglob("*.part")))


def kill_and_swap(folder: Path, num_cases: int, kills: int = 20, seed: int = 0) -> Outcome:
    """Kill a run of a saved model; half way, start it once with other weights in its place.

    Args:
        folder: An empty folder.
        num_cases: Cases of the run.
        kills: Kills, spread over the run.
        seed: Seed of the moments.

    Returns:
        What was seen.

    Raises:
        SystemExit: If a start failed, or the start with other weights was not refused.
    """
    from errata.adapters import tiny_model

    module, processor = tiny_model("llava")
    model = folder / "model"
    module.save_pretrained(model)
    processor.save_pretrained(model)
    text = f"""
output_dir = "replaced"
num_threads = 1
num_thumbnails = 0
[cases]
source = "world"
num_cases = {num_cases}
[[models]]
id = {msgspec.json.encode(str(model)).decode()}
name = "m"
[[editors]]
type = "finetune"
num_steps = 1
[[protocols]]
type = "single"
batch_size = 8
"""
    weights = model / "model.safetensors"
    other = folder / "other.safetensors"
    save_file(
        {name: tensor + 0.125 for name, tensor in load_file(weights).items()},
        other,
        metadata={"format": "pt"},
    )

    def swapped() -> str:
        """Start with other weights: the reason why it was refused."""
        settings = msgspec.structs.replace(parse_settings(text), output_dir=str(folder / "shaken"))
        before = (folder / "shaken" / "results.jsonl").read_bytes()
        weights.rename(folder / "kept.safetensors")
        shutil.copy(other, weights)
        try:
            _run(settings, text)
        except InvalidInputError as error:
            if (folder / "shaken" / "results.jsonl").read_bytes() != before:
                raise SystemExit("a refused start wrote results") from None
            return str(error)
        finally:
            (folder / "kept.safetensors").replace(weights)
        return ""

    def swap(count: int) -> None:
        if count == kills // 2 and "other weights of the model" not in swapped():
            raise SystemExit("a run with other weights was not refused")

    return kill_run(text, folder, kills, seed, after_kill=swap)


def kill_training(folder: Path, kills: int = 10, seed: int = 0) -> Outcome:
    """Train MEND on a tiny model undisturbed, then again with kills, and compare.

    Args:
        folder: Folder for both trainings.
        kills: Kills.
        seed: Seed of the moments.

    Returns:
        What was seen.
    """
    moments = random.Random(seed)
    began = time.monotonic()
    if _ended(_started(lambda: _train(folder / "calm"))) != 0:
        raise SystemExit("the undisturbed training failed")
    span = time.monotonic() - began
    count = starts = 0
    while True:
        child = _started(lambda: _train(folder / "shaken"))
        starts += 1
        if count < kills:
            time.sleep(moments.uniform(0.05, 1.1) * span)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = _ended(child)
        if status == -signal.SIGKILL:
            count += 1
        elif status != 0:
            raise SystemExit(f"a training that was resumed after {count} kills failed")
        elif count >= kills or starts > 3 * kills:
            break
        else:  # it had ended before the kill: once more from the start
            shutil.rmtree(folder / "shaken")
    one, two = ((folder / name / "weights.pt").read_bytes() for name in ("calm", "shaken"))
    return Outcome(count, starts, len(one), one == two)


def _train(folder: Path) -> None:
    from errata import adapters
    from errata.bench.data.world.cases import cases
    from errata.editors import MendConfig
    from errata.editors.common.checkpoint import save_checkpoint
    from errata.editors.mend.editor import mend_trainable
    from errata.editors.training.config import TrainingConfig
    from errata.editors.training.loop import train

    folder.mkdir(exist_ok=True)
    model = adapters.from_module(*adapters.tiny_model("llava"))
    trainable = mend_trainable(MendConfig(sites=("layers.-1.mlp",), rank=4, edit_lr=-1e-2))
    config = TrainingConfig(num_steps=6, batch_size=2, num_validation_cases=2, save_every=1)
    result = train(
        model, trainable, cases(8, split="train"), config, checkpoint_dir=folder / "training"
    )
    save_checkpoint(folder / "weights.pt", trainable.parameters(result.state), {})


def main(argv: list[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: Command-line arguments.

    Returns:
        Exit code: 1 if the bytes differ.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", type=Path, help="settings of a run")
    parser.add_argument("folder", type=Path, help="an empty folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    outcome = kill_run(options.settings.read_text(), options.folder, options.kills, options.seed)
    sys.stdout.write(f"{outcome}\n")
    return 0 if outcome.same else 1


if __name__ == "__main__":
    sys.exit(main())
