"""Whether the draws lose right answers that the mean has: McNemar's exact test (1947) on the same examples."""

from __future__ import annotations

import math

from torch import Tensor

LEVEL = 0.95
"""Two-sided level of the test."""


def mcnemar(only_one: int, only_other: int) -> float:
    """Return how likely so uneven a split is if both predictors are right equally often.

    Args:
        only_one: Examples that one predictor alone gets right.
        only_other: Examples that the other alone gets right.

    Returns:
        The two-sided p-value, of a binomial distribution with a half.
    """
    differing, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differing)


def lost_by_draws(mean: Tensor, draws: Tensor, labels: Tensor) -> str | None:
    """Say so if the average of the draws is right less often than the mean, by more than chance allows.

    Args:
        mean: Log-probabilities of the mean, [N C].
        draws: Log-probabilities of the draws' average, [N C].
        labels: Index of the right choice of each example, [N].

    Returns:
        One sentence with advice; None if the examples do not tell it.
    """
    by_mean, by_draws = (p.argmax(-1) == labels for p in (mean, draws))
    lost, won = int((by_mean & ~by_draws).sum()), int((by_draws & ~by_mean).sum())
    if lost <= won or mcnemar(lost, won) >= 1 - LEVEL:
        return None
    of_draws, of_mean = (float(right.double().mean()) for right in (by_draws, by_mean))
    return (
        f"the draws cost accuracy: {of_draws:.3f} against {of_mean:.3f} of the mean, more than a paired 95 % interval "
        f"allows ({lost} right answers lost, {won} won); the noise is too wide for this model, so narrow it with a "
        "lower temperature (bayeslora.tempered(posterior, 1 / 4), --temperature 0.25) or train colder"
    )
