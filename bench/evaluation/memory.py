"""How much memory a run takes: the peak of a stretch of work, measured where the model lies."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["PeakMemory", "measure_peak", "resident_bytes"]


class PeakMemory:
    """The most bytes seen while it was measured; 0 until the stretch is over."""

    bytes: int = 0


@contextlib.contextmanager
def measure_peak(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of a `with` block: device memory of `device`, else resident memory.

    On Linux the process' high-water mark is reset first where the system allows it; elsewhere the
    mark is of the whole process so far.

    Args:
        device: The device that is used.

    Yields:
        The peak, set when the block ends.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # "reset the peak resident set size"
    yield peak
    peak.bytes = _peak_resident_bytes()


def resident_bytes() -> int:
    """Bytes of memory the process has now, 0 where the system does not say."""
    return _process_status_bytes("VmRSS:")


def _process_status_bytes(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _peak_resident_bytes() -> int:
    if found := _process_status_bytes("VmHWM:"):
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
