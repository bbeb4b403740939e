"""What methods that choose a number by data have in common: how to judge a posterior, and how to search a line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bayeslora._typing import Tokenizer
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Draws, Posterior
from bayeslora.prediction import predict
from bayeslora.tasks.types import Split

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Judge:
    """Labelled rows by which posteriors are judged, with what `predict` is given; all by the same stream of draws."""

    model: nn.Module
    rows: Split
    tokenizer: Tokenizer | None = None
    seed: int = 0
    token_budget: int | None = None

    def predict(self, posterior: Posterior, draws: int) -> Prediction:
        """Return what the posterior says about the rows."""
        options = Draws(draws, self.seed)
        return predict(
            self.model, posterior, self.rows, options, tokenizer=self.tokenizer, token_budget=self.token_budget
        )

    def nll(self, posterior: Posterior, draws: int) -> float:
        """Return the negative log-likelihood of the draws' mean probabilities, nats a row; infinite if not finite."""
        return float(nll(self.predict(posterior, draws).log_p, self.rows.labels))


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
