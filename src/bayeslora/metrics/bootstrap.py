"""Percentile bootstrap intervals (Efron, 1979): how far a score would move with another test set of the same size.

Rows are drawn with replacement, the score is computed again, and the interval holds the middle ``level`` of the
results. It measures the choice of test examples, not that of training data or seeds. Scores that are biased upwards in
small samples, such as the calibration error of a well calibrated model, are more so in a resample, so their interval
lies high and may even leave out the score itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bayeslora.errors import InputError

_AT_ONCE = 200_000
"""Rows that are drawn at once, over all resamples."""


Metric = Callable[..., float] | Callable[..., Tensor]


def bootstrap(
    metric: Metric,
    *arrays: Tensor,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    batched: bool = False,
) -> tuple[float, float]:
    """Compute the interval of a score, drawing the rows of all arrays jointly.

    Args:
        metric: The score as a function of the arrays, such as `bayeslora.metrics.classification.nll`.
        *arrays: Tensors with one row per example: [N C] predictions, [N] labels.
        resamples: Number of resampled test sets.
        level: Share of the resampled scores that the interval holds.
        seed: Seed of the resampling; equal seeds draw the same rows for every metric.
        batched: Whether the score takes many resamples at once, [R N …], and returns [R], as those of
            `bayeslora.metrics.batched` do: much faster.

    Returns:
        ``(low, high)``; NaN both if the score of some resample is NaN.
    """
    return interval(resampled(metric, *arrays, resamples=resamples, seed=seed, batched=batched), level)


def resampled(
    metric: Metric, *arrays: Tensor, resamples: int = 1000, seed: int = 0, batched: bool = False
) -> list[float]:
    """Compute a score on each of many resampled test sets.

    Args:
        metric: As for `bootstrap`.
        *arrays: Tensors with one row per example.
        resamples: Number of resampled test sets.
        seed: Seed of the resampling; equal seeds and numbers of rows draw the same rows.
        batched: As for `bootstrap`.

    Returns:
        The scores.
    """
    drawn = _drawn(_rows(arrays), resamples, torch.Generator().manual_seed(seed))
    return [v for part in drawn for v in _scored(metric, _take(arrays, part), batched)]


def bootstrap_two(
    metric: Metric,
    negative: Tensor,
    positive: Tensor,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    batched: bool = False,
) -> tuple[float, float]:
    """Compute the interval of a score of two samples, drawing from each on its own.

    Args:
        metric: The score as a function of both samples, such as `bayeslora.metrics.detection.auroc`.
        negative: First sample, [N ...].
        positive: Second sample, [M ...].
        resamples: Number of resampled pairs of samples.
        level: Share of the resampled scores that the interval holds.
        seed: Seed of the resampling.
        batched: As for `bootstrap`.

    Returns:
        ``(low, high)``; NaN both if the score of some resample is NaN.
    """
    return interval(resampled_two(metric, negative, positive, resamples=resamples, seed=seed, batched=batched), level)


def resampled_two(
    metric: Metric, negative: Tensor, positive: Tensor, *, resamples: int = 1000, seed: int = 0, batched: bool = False
) -> list[float]:
    """Compute a score of two samples on each of many resampled pairs.

    Args:
        metric: As for `bootstrap_two`.
        negative: First sample, [N ...].
        positive: Second sample, [M ...].
        resamples: Number of resampled pairs of samples.
        seed: Seed of the resampling; equal seeds and numbers of rows draw the same rows.
        batched: As for `bootstrap`.

    Returns:
        The scores.
    """
    first, second = _rows([negative]), _rows([positive])
    generator, size = torch.Generator().manual_seed(seed), max(first, second)
    values: list[float] = []
    for left, right in zip(*(_drawn(n, resamples, generator, size) for n in (first, second)), strict=True):
        values += _scored(metric, [*_take([negative], left), *_take([positive], right)], batched)
    return values


def paired_bootstrap(
    metric: Metric,
    arrays_a: Sequence[Tensor],
    arrays_b: Sequence[Tensor],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    batched: bool = False,
) -> tuple[float, float]:
    """Compute the interval of metric(a) - metric(b) for two predictors of the same examples.

    The same rows are drawn for both, so what makes an example hard for both cancels.

    Args:
        metric: The score as a function of one predictor's arrays.
        arrays_a: The first predictor's arrays, such as ``(log_p, labels)``.
        arrays_b: The second predictor's arrays, row by row the same examples.
        resamples: Number of resampled test sets.
        level: Share of the resampled differences that the interval holds.
        seed: Seed of the resampling.
        batched: As for `bootstrap`.

    Returns:
        ``(low, high)`` of the difference; an interval without 0 says that the predictors differ. NaN both if the
        difference in some resample is NaN.
    """
    _rows([*arrays_a, *arrays_b])
    one, other = (
        resampled(metric, *arrays, resamples=resamples, seed=seed, batched=batched) for arrays in (arrays_a, arrays_b)
    )
    return interval([a - b for a, b in zip(one, other, strict=True)], level)


def _rows(arrays: Sequence[Tensor]) -> int:
    """Return the common number of rows.

    Raises:
        InputError: If there are no rows, or not equally many in each array.
    """
    lengths = [len(array) if array.ndim else 0 for array in arrays]
    if not lengths or lengths[0] == 0 or len(set(lengths)) > 1:
        raise InputError(f"the arrays have {lengths} rows; give arrays of the same number of examples, at least one.")
    return lengths[0]


def _drawn(rows: int, resamples: int, generator: torch.Generator, size: int = 0) -> Iterator[Tensor]:
    """Give row numbers [R rows], drawn with replacement, for as many resamples at a time as the size allows."""
    at_once = max(1, _AT_ONCE // max(rows, size))
    for begin in range(0, resamples, at_once):
        yield torch.randint(rows, (min(at_once, resamples - begin), rows), generator=generator)


def _take(arrays: Sequence[Tensor], drawn: Tensor) -> list[Tensor]:
    """Return the drawn rows [R N …] of each array."""
    return [array[drawn.to(array.device)] for array in arrays]


def _scored(metric: Metric, arrays: Sequence[Tensor], batched: bool) -> list[float]:
    """Return the score of each resample."""
    if batched:
        found = metric(*arrays)
        assert isinstance(found, Tensor)
        return found.tolist()
    return [float(metric(*one)) for one in zip(*arrays, strict=True)]


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the central quantiles of resampled scores, interpolated linearly between order statistics.

    Args:
        values: The scores.
        level: Share of them that the interval holds.

    Returns:
        ``(low, high)``; NaN both if a score is NaN.

    Raises:
        InputError: If there are no values, or the level is not between 0 and 1.
    """
    if not values or not 0 < level < 1:
        raise InputError(f"resamples={len(values)}, level={level}: give at least one resample and a level in (0, 1).")
    ordered = sorted(float(value) for value in values)
    if any(math.isnan(value) for value in ordered):
        return math.nan, math.nan
    tail = (1 - level) / 2
    return _quantile(ordered, tail), _quantile(ordered, 1 - tail)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of sorted values, which may be infinite."""
    position = share * (len(ordered) - 1)
    left, right = ordered[math.floor(position)], ordered[math.ceil(position)]
    part = position - math.floor(position)
    return left if left == right else (1 - part) * left + part * right
