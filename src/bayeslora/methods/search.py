"""How methods that choose a number by data search a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from bayeslora.errors import InputError
from bayeslora.params import generator
from bayeslora.tasks.types import Split

_GOLDEN = (math.sqrt(5) - 1) / 2
LARGEST = 1e6
"""Where `largest` gives up; its inverse is where it gives up on the way down."""


def smallest(function: Callable[[float], float], low: float, high: float, *, points: int = 61) -> float:
    """Return where a function is smallest, to a millionth, by a grid and golden sections; or an end of the interval."""
    grid = [low + (high - low) * k / (points - 1) for k in range(points)]
    values = [function(x) for x in grid]
    best = min(range(points), key=lambda k: (values[k], k))
    if best in (0, points - 1):
        return grid[best]
    a, b = grid[best - 1], grid[best + 1]
    while b - a > 1e-6 * (high - low):
        left, right = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        if function(left) <= function(right):
            b = right
        else:
            a = left
    return (a + b) / 2


def largest(
    within: Callable[[float], bool],
    steps: int,
    first: float = 0.01,
    *,
    unbounded: Callable[[], str],
    nowhere: Callable[[], str],
) -> float:
    """Return the largest number that serves: by doubling or halving a first guess, then bisecting its logarithm.

    Args:
        within: Whether a positive number serves; all below one that serves are taken to serve too.
        steps: Bisections; the result is within a factor of 2^(1/2^steps) of the edge, and serves.
        first: First guess.
        unbounded: What is said where every number serves that is tried.
        nowhere: What is said where none serves.

    Returns:
        The number.

    Raises:
        InputError: If there is no edge between 1/`LARGEST` and `LARGEST`.
    """
    low = high = first
    if within(first):
        while within(high := 2 * low):
            low = high
            if low > LARGEST:
                raise InputError(unbounded())
    else:
        while not within(low := high / 2):
            high = low
            if high < 1 / LARGEST:
                raise InputError(nowhere())
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def anchored(rows: Split, max_rows: int, seed: int) -> Split:
    """Return at most so many rows, sampled without replacement by the seed, in their order."""
    if len(rows) <= max_rows:
        return rows
    picked = torch.randperm(len(rows), generator=generator("anchors", seed))[:max_rows]
    return replace(rows.take(picked.sort().values.tolist()), name=f"{rows.name}, {max_rows} anchors")
