"""What a method costs: time, memory and disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cost:
    """What one method cost under one seed.

    Attributes:
        train_seconds: Training and fitting, as if the method shared no run with another.
        predict_seconds: Prediction of the test split by all draws; None if it was not measured.
        memory: Highest memory in bytes that training, fitting or predicting took beyond what was held before, on the
            accelerator, or of the process on the CPU; None where the system does not tell.
        disk: Bytes of the posterior's folder.
    """

    train_seconds: float
    predict_seconds: float | None
    memory: int | None
    disk: int


@dataclass
class Peak:
    """The highest memory within a ``with`` block beyond what was held at its beginning; None while it is not known."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest memory of a ``with`` block, filled in when the block ends."""
    # On an accelerator it is what torch allocated there; on the CPU the resident memory of the process, which Linux
    # tells (/proc/self) and other systems do not. Blocks inside one another make the outer one's peak too low.
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return
    resident = _resident_bytes("VmRSS") if _reset_highest() else None
    yield peak
    highest = _resident_bytes("VmHWM")
    if resident is not None and highest is not None:
        peak.bytes = max(0, highest - resident)


def max_known(*amounts: int | None) -> int | None:
    """Return the largest amount that is known; None if none is."""
    return max((amount for amount in amounts if amount is not None), default=None)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _reset_highest() -> bool:
    """Let the process's highest memory begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident_bytes(key: str) -> int | None:
    """Return a line of the process's status in bytes, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
