"""Which differences of a comparison's table the test set can tell: the best of each column, and what ties with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.comparison.run import Comparison
from bayeslora.comparison.tables import Column, Mark, Row, columns
from bayeslora.metrics.bootstrap import Sample, Score, interval, resampled
from bayeslora.metrics.evaluation import predictors, uncertainties
from bayeslora.metrics.measures import measures


def marked(
    comparison: Comparison, rows: Sequence[Row], labels: Int[Tensor, " N"], *, bins: int = 15, resamples: int = 1000
) -> list[Row]:
    """Return the rows of `bayeslora.comparison.tables.comparison_rows` of the same comparison with their marks.

    A row is tied with the best of a column if the 95 % paired bootstrap interval of their difference holds 0: test rows
    are drawn, the same for both, and scores averaged over the seeds. It says nothing on other seeds or training rows.
    """
    table = measures(bins)
    all_marks: list[dict[str, Mark]] = [{} for _ in rows]
    for column in columns(next(iter(next(iter(comparison.evaluations.values())).values()))):
        measure, heading = table[column.measure], column.heading
        means = {i: fmean(row.numbers[heading]) for i, row in enumerate(rows) if row.numbers.get(heading)}
        if measure.needs == "probs" or len(means) < 2:
            continue
        best = (max if measure.higher_is_better else min)(means, key=means.__getitem__)
        all_marks[best][heading] = "best"
        scores = {i: _resampled(measure.score, _samples(comparison, rows[i], column, labels), resamples) for i in means}
        for i in means.keys() - {best}:
            low, high = interval(scores[i] - scores[best])
            if not (low > 0 or high < 0):
                all_marks[i][heading] = "tied"
    return [replace(row, marks=marks) for row, marks in zip(rows, all_marks, strict=True)]


def _resampled(score: Score, samples: Sequence[Sequence[Sample]], resamples: int) -> Float[Tensor, " R"]:
    """Return a score on each resampled test set, averaged over the seeds, whose samples are given."""
    return torch.stack([resampled(score, *of_seed, resamples=resamples) for of_seed in samples]).mean(0)


def _samples(comparison: Comparison, row: Row, column: Column, labels: Int[Tensor, " N"]) -> list[list[Sample]]:
    """Return what a column's measure takes for a row, under each seed."""
    by_seed = comparison.predictions[row.method]
    if not column.ood:
        return [[(predictors(p)[row.predictor], labels)] for p in by_seed.values()]
    pairs = [(p, comparison.ood[row.method][seed][column.ood]) for seed, p in by_seed.items()]
    return [[(uncertainties(p, row.predictor)[column.uncertainty],) for p in pair] for pair in pairs]
