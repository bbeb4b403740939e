"""What methods that choose a number by data have in common: how to judge a posterior, and how to search a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from bayeslora.metrics.classification import nll
from bayeslora.posteriors import Draws, Posterior
from bayeslora.prediction import predict
from bayeslora.tasks.types import Split

_GOLDEN = (math.sqrt(5) - 1) / 2


def draws_nll(
    model: nn.Module, posterior: Posterior, rows: Split, draws: int, *, tokenizer: Any, seed: int, budget: int | None
) -> float:
    """Return the negative log-likelihood of the draws' average probabilities.

    Args:
        model: PEFT model of the posterior.
        posterior: The posterior.
        rows: Labelled rows.
        draws: Number of draws.
        tokenizer: The model's tokenizer, or None.
        seed: Which stream of draws; the same one makes posteriors comparable.
        budget: Most tokens of a batch; None for what fits.

    Returns:
        Nats per example; infinite where the draws are not finite.
    """
    prediction = predict(model, posterior, rows, Draws(draws, seed), tokenizer=tokenizer, token_budget=budget)
    return float(nll(prediction.log_p, rows.labels))


def smallest(function: Callable[[float], float], low: float, high: float, *, points: int = 61) -> float:
    """Return where a function of one variable is smallest, by a grid and golden sections around its best point.

    Args:
        function: The function; it need not have one minimum only, if the grid is fine enough.
        low: Lower end.
        high: Upper end.
        points: Points of the grid.

    Returns:
        The place, to a millionth of the interval; an end of the interval if the function is smallest there.
    """
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
