"""What a method costs: time, memory and disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cost:
    """What one method cost under one seed, as if it shared no run with another: seconds and bytes."""

    train_seconds: float  # of training and fitting
    predict_seconds: float | None  # of the test rows by all draws; None if it was not measured
    memory: int | None  # the highest beyond what was held before, see `peak_memory`; None where it is not known
    disk: int  # of the posterior's folder


@dataclass
class Peak:
    """The highest memory within a ``with`` block beyond what was held at its beginning; None while it is not known."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest memory of a ``with`` block, filled in when the block ends."""
    # On an accelerator it is what torch allocated there; on the CPU the resident memory of the process, which Linux
    # tells (/proc/self) and other systems do not. Blocks inside one another make the outer one's peak too low.
    peak, before, highest = Peak(), None, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        highest = torch.cuda.max_memory_allocated(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest begins anew
            before = _resident_bytes("VmRSS")
        yield peak
        with suppress(OSError):
            highest = _resident_bytes("VmHWM")
    if before is not None and highest is not None:
        peak.bytes = max(0, highest - before)


def max_known(*amounts: int | None) -> int | None:
    """Return the largest amount that is known; None if none is."""
    return max((amount for amount in amounts if amount is not None), default=None)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _resident_bytes(key: str) -> int | None:
    """Return a line of the process's status in bytes, where there is one."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
