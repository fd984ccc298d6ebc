"""SIGKILL while writing; fifty kills of each verb are `python -m
errata.bench.robustness.crash_writes`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_killed_while_saving_folding_exporting_nothing_is_broken():
    ran = subprocess.run(
        [sys.executable, "-m", "errata.bench.robustness.crash_writes", "--times", "4"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("4 kills") == 4
    assert "broken" not in ran.stdout
    assert "next write" not in ran.stdout.replace("'parts left after the next write': 0", "")
