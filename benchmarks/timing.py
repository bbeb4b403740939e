"""Seconds of what is compared, taken in turn, and the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int, cold: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, after one unmeasured round of all but the ones named cold."""
    for name, work in ways.items():
        if name not in cold:
            work()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            took[name].append(seconds(ways[name]))
        print("  " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in took.items()), flush=True)
    return took


def ratio(took: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median ratio of times over the rounds."""
    return statistics.median(a / b for a, b in zip(took[one], took[other], strict=True))
