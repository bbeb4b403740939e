"""How methods that choose a number by data search a line."""

from __future__ import annotations

import math
from collections.abc import Callable

_GOLDEN = (math.sqrt(5) - 1) / 2


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
