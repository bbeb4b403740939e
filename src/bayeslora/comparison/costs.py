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
    """The highest memory within a ``with`` block.

    Attributes:
        bytes: Bytes beyond what was held at its beginning; None while it runs, and where the system does not tell.
    """

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest memory of a ``with`` block.

    On an accelerator it is what torch allocated there; on the CPU the resident memory of the process, which Linux tells
    (``/proc/self``) and other systems do not. Blocks inside one another make the outer one's peak too low.

    Args:
        device: Where the model is.

    Yields:
        The peak, filled in when the block ends.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return
    held = _resident("VmRSS") if _reset() else None
    yield found
    highest = _resident("VmHWM")
    if held is not None and highest is not None:
        found.bytes = max(0, highest - held)


def most(*amounts: int | None) -> int | None:
    """Return the largest amount that is known.

    Args:
        *amounts: Bytes, or None.

    Returns:
        The largest; None if none is known.
    """
    return max((a for a in amounts if a is not None), default=None)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder.

    Args:
        folder: The folder.

    Returns:
        Bytes.
    """
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _reset() -> bool:
    """Let the process's highest memory begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(key: str) -> int | None:
    """Return a line of the process's status in bytes, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
