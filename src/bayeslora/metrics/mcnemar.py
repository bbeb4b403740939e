"""Whether the draws lose right answers that the mean has: McNemar's exact test (1947) on the same examples."""

from __future__ import annotations

import math

from torch import Tensor

from bayeslora._typing import Float, Int

LEVEL = 0.95
"""Two-sided level of the test."""


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the two-sided p-value of how many examples each predictor alone gets right: binomial with a half."""
    differing, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differing)


def lost_by_draws(mean: Float[Tensor, "N C"], draws: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> str | None:
    """Say so, with advice, if the draws' average is right less often than the mean, by more than chance allows."""
    by_mean, by_draws = (log_p.argmax(-1) == labels for log_p in (mean, draws))
    lost, won = int((by_mean & ~by_draws).sum()), int((by_draws & ~by_mean).sum())
    if lost <= won or mcnemar(lost, won) >= 1 - LEVEL:
        return None
    of_draws, of_mean = (float(right.double().mean()) for right in (by_draws, by_mean))
    return (
        f"the draws cost accuracy: {of_draws:.3f} against {of_mean:.3f} of the mean, more than a paired 95 % interval "
        f"allows ({lost} right answers lost, {won} won); the noise is too wide for this model, so narrow it with a "
        "lower temperature (bayeslora.tempered(posterior, 1 / 4), --temperature 0.25) or train colder"
    )
