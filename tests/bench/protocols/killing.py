"""Kill a run at random moments with SIGKILL, start it again each time, and let it end.

    python tests/bench/protocols/killing.py SETTINGS.toml FOLDER [--kills 10] [--seed 0]

prints whether the results are byte for byte those of an undisturbed run. The runs are forks of this
process, which has imported everything but computed nothing: a start costs no seconds of imports.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import transformers  # noqa: F401 - forks shall not import it each

from errata.bench.runs import runner
from errata.bench.runs.progress import Progress
from errata.bench.runs.settings import RunSettings
from errata.bench.runs.settings_file import parse_settings


class Outcome(NamedTuple):
    """What was seen of a run that was killed and started again until it ended."""

    kills: int
    starts: int
    bytes: int
    same: bool


def started(settings: RunSettings, text: str) -> int:
    """Start a run in a fork and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        with open(os.devnull, "w") as quiet:
            runner.run(settings, text, progress=Progress(quiet))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def grown(path: Path, size: float, child: int) -> None:
    """Wait until a file has this size, or the process that writes it has ended."""
    while not (path.is_file() and path.stat().st_size >= size) and size > 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def ended(child: int) -> int:
    """Wait for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file whose bytes must not depend on how the run went."""
    found = [folder / "results.jsonl", *sorted(folder.rglob("*.safetensors"))]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def killed(text: str, folder: Path, kills: int = 10, seed: int = 0) -> Outcome:
    """Run settings undisturbed, then again with `kills` kills, and compare."""
    settings = parse_settings(text)
    calm = msgspec.structs.replace(settings, output_dir=str(folder / "calm"))
    shaken = msgspec.structs.replace(settings, output_dir=str(folder / "shaken"))
    began = time.monotonic()
    if ended(started(calm, text)) != 0:
        raise SystemExit("the undisturbed run failed")
    span = time.monotonic() - began
    size = (folder / "calm" / "results.jsonl").stat().st_size
    moments = random.Random(seed)
    # By how far the results have come, not by the clock: a run may be slower or faster than the
    # undisturbed one, and each kill shall find something left to interrupt.
    marks = sorted(moments.uniform(-0.1, 0.95) * size for _ in range(kills))
    count = starts = 0
    while True:
        child = started(shaken, text)
        starts += 1
        if count < kills:
            grown(folder / "shaken" / "results.jsonl", marks[count], child)
            time.sleep(moments.uniform(0, 0.05 * span / kills))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == -signal.SIGKILL:
            count += 1
        elif status != 0:
            raise SystemExit(f"a run that went on after {count} kills failed")
        else:
            break
    want, got = contents(folder / "calm"), contents(folder / "shaken")
    return Outcome(count, starts, size, want == got)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcome = killed(options.settings.read_text(), options.folder, options.kills, options.seed)
    print(outcome)  # noqa: T201
    return 0 if outcome.same else 1


if __name__ == "__main__":
    sys.exit(main())
