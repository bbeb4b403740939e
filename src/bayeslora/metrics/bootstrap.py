"""Percentile bootstrap intervals (Efron, 1979): how far a score would move with another test set of the same size.

Rows are drawn with replacement, the score is computed again, and the interval holds the middle ``level`` of the
results. It measures the choice of test examples, not that of training data or seeds. Scores that are biased upwards in
small samples, such as the calibration error of a well calibrated model, are more so in a resample, so their interval
lies high and may even leave out the score itself.

A score takes arrays of many resampled sets, [R N …], and returns [R …], as all measures of `bayeslora.metrics` do. A
sample is the arrays whose rows are drawn jointly, such as ``(log_p, labels)``; several samples, such as the
in-distribution and the out-of-distribution scores, are drawn each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.errors import InputError

_ROWS_AT_ONCE = 200_000
"""Rows that are drawn at once, over all resamples."""

Score = Callable[..., Tensor]
Sample = Sequence[Tensor]
Interval = tuple[Float[Tensor, " *scores"], Float[Tensor, " *scores"]]


def bootstrap(score: Score, *samples: Sample, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Compute the interval ``(low, high)`` of a score; NaN both if the score of some resample is NaN."""
    return interval(resampled(score, *samples, resamples=resamples, seed=seed), level)


def paired_bootstrap(
    score: Score, first: Sample, second: Sample, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the interval of score(first) - score(second) for two predictors of the same examples."""
    # the same rows are drawn for both, so what makes an example hard for both cancels
    _rows([*first, *second])
    one, other = (resampled(score, sample, resamples=resamples, seed=seed) for sample in (first, second))
    return interval(one - other, level)


def resampled(score: Score, *samples: Sample, resamples: int = 1000, seed: int = 0) -> Float[Tensor, " R *scores"]:
    """Compute a score on each of many resampled test sets; equal seeds and numbers of rows draw the same rows."""
    sizes = [_rows(sample) for sample in samples or ((),)]
    generator = torch.Generator().manual_seed(seed)
    sets = max(1, _ROWS_AT_ONCE // max(sizes))
    scores = []
    for done in range(0, resamples, sets):
        arrays: list[Tensor] = []
        for sample, rows in zip(samples, sizes, strict=True):
            index = torch.randint(rows, (min(sets, resamples - done), rows), generator=generator)
            arrays += [array[index.to(array.device)] for array in sample]
        scores.append(score(*arrays))
    return torch.cat(scores) if scores else torch.empty(0)


def interval(scores: Float[Tensor, " R *scores"], level: float = 0.95) -> Interval:
    """Return the central quantiles of resampled scores, interpolated linearly; NaN both if a score is NaN."""
    if not len(scores) or not 0 < level < 1:
        raise InputError(f"resamples={len(scores)}, level={level}: give at least one resample and a level in (0, 1)")
    ordered = scores.double().sort(0).values
    unknown = scores.isnan().any(0)
    tail, ends = (1 - level) / 2, []
    for share in (tail, 1 - tail):
        position = share * (len(ordered) - 1)
        left, right = ordered[math.floor(position)], ordered[math.ceil(position)]
        part = position - math.floor(position)
        end = torch.where(left == right, left, (1 - part) * left + part * right)  # which may be infinite
        ends.append(end.masked_fill(unknown, math.nan))
    return ends[0], ends[1]


def _rows(arrays: Sequence[Tensor]) -> int:
    """Return the common number of rows, at least one."""
    lengths = [len(array) if array.ndim else 0 for array in arrays]
    if not lengths or lengths[0] == 0 or len(set(lengths)) > 1:
        raise InputError(f"the arrays have {lengths} rows; give arrays of the same number of examples, at least one")
    return lengths[0]
