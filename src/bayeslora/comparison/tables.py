"""Tables of comparisons: numbers over seeds as mean ± standard deviation, as text, Markdown and JSON.

Marks say which differences the test set can tell: the best of each column, and what ties with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bayeslora._typing import Int
from bayeslora.comparison.costs import Cost
from bayeslora.comparison.run import VARIANTS, Comparison
from bayeslora.metrics.bootstrap import Sample, interval, resampled
from bayeslora.metrics.evaluation import Evaluation, aligned, scored
from bayeslora.metrics.measures import UNCERTAINTIES, Measure, measures

HEADINGS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "kl_to_truth": "KL to truth",
    "aurc": "AURC",
    "auroc": "AUROC",
}
"""The measures of a comparison's table, in its order; those that an evaluation lacks are left out."""
LEGEND = "* best; ~ not told from the best by a 95 % paired bootstrap of the test rows (seeds averaged)"
Mark = Literal["best", "tied"]
_SIGNS: dict[Mark | None, str] = {"best": " *", "tied": " ~", None: ""}


@dataclass(frozen=True)
class Row:
    """A predictor of a method: for each heading one number per seed, and the marks once they are known."""

    name: str
    method: str
    predictor: str
    numbers: dict[str, list[float]]
    marks: dict[str, Mark] | None = None

    def to_dict(self) -> dict[str, object]:
        """Return what JSON can hold."""
        marks = {} if self.marks is None else {"marks": self.marks}
        return {"name": self.name, "method": self.method, "predictor": self.predictor, **self.numbers, **marks}


def columns(evaluation: Evaluation, predictor: str = "draws") -> dict[str, str]:
    """Return the columns that a predictor's row has: by their headings the evaluation's names of the scores."""
    scores = {}
    for name, heading in HEADINGS.items():
        scores[heading] = name
        for ood in evaluation.ood:
            short = "" if len(evaluation.ood) == 1 else f" {ood}"
            for kind, abbreviation in UNCERTAINTIES.items():
                scores[f"{heading} {abbreviation}{short}"] = f"{ood}/{name}_{kind}"
    return {heading: score for heading, score in scores.items() if score in evaluation.rows[predictor]}


def comparison_rows(comparison: Comparison) -> list[Row]:
    """Return a comparison's rows: each method's mean and draws, or the one predictor of a point."""
    # Lower is better but for accuracy and AUROC. ``train s`` is the time of training and fitting, ``predict s`` that of
    # the test predictions, ``train ×`` and ``predict ×`` are their ratios to MAP's, ``memory MB`` is the highest that
    # either took, ``disk MB`` the posterior's size.
    rows = []
    base = {seed: result.cost for seed, result in comparison.results.get("map", {}).items()}
    for method, by_seed in comparison.results.items():
        first = next(iter(by_seed.values()))
        single = all(result.prediction.draws == 1 for result in by_seed.values())
        one = single or first.temperature is not None  # another temperature has the same mean
        for predictor in ("draws",) if one else ("mean", "draws"):
            draws = f"{method}, {first.prediction.draws} draws"
            label = method if single else f"{method}, mean" if predictor == "mean" else draws
            numbers = {
                heading: [result.evaluation.value(predictor, score) for result in by_seed.values()]
                for heading, score in columns(first.evaluation, predictor).items()
            }
            if predictor == "draws":
                numbers |= _costs({seed: result.cost for seed, result in by_seed.items()}, base)
            rows.append(Row(label, method, predictor, numbers))
    return rows


def marked(
    comparison: Comparison, rows: Sequence[Row], labels: Int[Tensor, " N"], *, bins: int = 15, resamples: int = 1000
) -> list[Row]:
    """Return the rows of a comparison with their marks."""
    # A row is tied with the best of a column if the 95 % paired bootstrap interval of their difference holds 0: test
    # rows are drawn, the same for both, and scores averaged over the seeds: nothing on other seeds or training rows.
    table = measures(bins)
    by_row: list[list[dict[str, tuple[Measure, list[Sample]]]]] = []  # and by seed and score
    for row in rows:
        results = comparison.results[row.method].values()
        by_seed = [scored(table, result.prediction, result.ood, labels)[row.predictor] for result in results]
        by_row.append([{name: (m, of) for chosen, of in groups for name, m in chosen.items()} for groups in by_seed])
    all_marks: list[dict[str, Mark]] = [{} for _ in rows]
    scored_by: dict[str, str] = {}  # the base has fewer columns than methods
    for row in rows:
        first = next(iter(comparison.results[row.method].values()))
        scored_by |= columns(first.evaluation, row.predictor)
    for heading, score in scored_by.items():
        seeds = {i: [of[score] for of in by_row[i]] for i, row in enumerate(rows) if score in by_row[i][0]}
        if len(seeds) < 2:
            continue
        means = {i: statistics.fmean(rows[i].numbers[heading]) for i in seeds}
        best = (max if seeds[min(seeds)][0][0].higher_is_better else min)(means, key=means.__getitem__)
        all_marks[best][heading] = "best"
        scores = {
            i: torch.stack([resampled(measure.score, *of, resamples=resamples) for measure, of in of_row]).mean(0)
            for i, of_row in seeds.items()
        }
        for i in seeds.keys() - {best}:
            low, high = interval(scores[i] - scores[best])
            if not (low > 0 or high < 0):
                all_marks[i][heading] = "tied"
    return [replace(row, marks=marks) for row, marks in zip(rows, all_marks, strict=True)]


def text_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Return rows as a table for the terminal, or in Markdown; below rows with marks stands their `LEGEND`."""
    fullest = sorted(rows, key=lambda row: -len(row.numbers))  # whose headings are in their order
    headings = list(dict.fromkeys(heading for row in fullest for heading in row.numbers))
    cells = [["", *headings]]
    for row in rows:
        marks = row.marks or {}
        cells.append([row.name, *(_cell(row.numbers.get(h, ()), h, marks.get(h)) for h in headings)])
    legend = ["", LEGEND] if any(row.marks for row in rows) else []
    if markdown:
        head, *body = ("| " + " | ".join(line) + " |" for line in cells)
        return "\n".join([head, "|---" + "|---:" * len(headings) + "|", *body, *legend])
    head, *body = aligned(cells, numbers=True)
    return "\n".join([head, "─" * len(head), *body, *legend])


def warnings(comparison: Comparison) -> list[str]:
    """Return one line a method whose evaluations warn, with its seeds and the sentence of the first."""
    lines = []
    for method, by_seed in comparison.results.items():
        sentences = {seed: r.evaluation.warning for seed, r in by_seed.items() if r.evaluation.warning}
        if sentences:
            lines.append(f"Warning: {method}, seed {', '.join(map(str, sentences))}: {next(iter(sentences.values()))}.")
    return lines


def recommendations(comparison: Comparison) -> list[str]:
    """Return a line for each method and answer to whether the mean alone does, with the seeds that give it."""
    lines = []
    for method, by_seed in comparison.results.items():
        found = {seed: each for seed, r in by_seed.items() if (each := r.evaluation.recommendation) is not None}
        for suffices in (True, False):
            texts = {seed: each.text for seed, each in found.items() if each.mean_suffices is suffices}
            if texts and not method.endswith(VARIANTS):  # whose draws are the method's own
                lines.append(f"Cost: {method}, seed {', '.join(map(str, texts))}: {next(iter(texts.values()))}.")
    return lines


def _costs(costs: Mapping[int, Cost], base: Mapping[int, Cost]) -> dict[str, list[float]]:
    """Return what a method cost, also relative to MAP where MAP is there."""
    numbers: dict[str, list[float]] = {
        "train s": [c.train_seconds for c in costs.values()],
        "predict s": [c.predict_seconds for c in costs.values() if c.predict_seconds is not None],
    }
    if costs.keys() <= base.keys():
        numbers["train ×"] = [c.train_seconds / max(1e-9, base[s].train_seconds) for s, c in costs.items()]
        numbers["predict ×"] = [
            c.predict_seconds / max(1e-9, base[s].predict_seconds or 0.0)
            for s, c in costs.items()
            if c.predict_seconds is not None and base[s].predict_seconds is not None
        ]
    numbers["memory MB"] = [c.memory / 1e6 for c in costs.values() if c.memory is not None]
    numbers["disk MB"] = [c.disk / 1e6 for c in costs.values()]
    return {heading: values for heading, values in numbers.items() if values}


def _cell(values: Sequence[float], heading: str, mark: Mark | None) -> str:
    """Return one number, or mean ± standard deviation, and its mark."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    digits = 3 if not heading.endswith((" s", "×", "MB")) else 0 if max(finite) >= 10 else 1
    mean = f"{statistics.fmean(finite):.{digits}f}"
    spread = "" if len(finite) == 1 else f" ± {statistics.stdev(finite):.{digits}f}"
    return f"{mean}{spread}{_SIGNS[mark]}"
