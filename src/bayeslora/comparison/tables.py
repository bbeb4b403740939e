"""Tables of comparisons: numbers over seeds as mean ± standard deviation, as text, Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bayeslora.comparison.run import Comparison
from bayeslora.metrics.evaluation import Evaluation
from bayeslora.metrics.layout import aligned
from bayeslora.metrics.measures import UNCERTAINTIES, measures

MEASURES = ("accuracy", "nll", "ece", "brier", "kl_to_truth", "aurc", "auroc")
"""Measures of a comparison's table, in its order; those that an evaluation lacks are left out."""
LEGEND = "* best; ~ not told from the best by a 95 % paired bootstrap of the test rows (seeds averaged)"
Mark = Literal["best", "tied"]
_SIGNS: dict[Mark | None, str] = {"best": " *", "tied": " ~", None: ""}


@dataclass(frozen=True)
class Column:
    """One score of an evaluation, ``key``, as a table shows it: the measure and, for detection, what it compares."""

    key: str
    heading: str
    measure: str
    ood: str = ""
    uncertainty: str = ""


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


def columns(evaluation: Evaluation, predictor: str = "draws") -> list[Column]:
    """Return the columns that a predictor's row has."""
    table, possible = measures(), []
    for name in MEASURES:
        measure = table[name]
        if measure.needs != "ood":
            possible.append(Column(name, measure.heading, name))
            continue
        for ood in evaluation.ood:
            short = "" if len(evaluation.ood) == 1 else f" {ood}"
            possible += [
                Column(f"{ood}/{name}_{kind}", f"{measure.heading} {abbreviation}{short}", name, ood, kind)
                for kind, abbreviation in UNCERTAINTIES.items()
            ]
    return [column for column in possible if column.key in evaluation.rows[predictor]]


def comparison_rows(comparison: Comparison) -> list[Row]:
    """Return a comparison's rows: each method's mean and draws, or the one predictor of a point.

    Lower is better but for accuracy and AUROC. ``train s`` is the time of training and fitting as if a method shared no
    run, ``predict s`` that of its test predictions, ``train ×`` and ``predict ×`` their ratios to MAP's where MAP is
    there, ``memory MB`` the highest that either took, ``disk MB`` the posterior's size.
    """
    rows = []
    for method, by_seed in comparison.evaluations.items():
        predictions = comparison.predictions[method]
        single = all(p.draws == 1 for p in predictions.values())
        one = single or method in comparison.temperatures  # another temperature has the same mean
        for predictor in ("draws",) if one else ("mean", "draws"):
            draws = next(iter(predictions.values())).draws
            label = method if single else f"{method}, mean" if predictor == "mean" else f"{method}, {draws} draws"
            numbers = {
                column.heading: [e.rows[predictor][column.key].value for e in by_seed.values()]
                for column in columns(next(iter(by_seed.values())), predictor)
            }
            if predictor == "draws":
                numbers |= _costs(comparison, method)
            rows.append(Row(label, method, predictor, numbers))
    return rows


def text_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Return rows as a table for the terminal, or in Markdown.

    A cell is the number, or mean ± standard deviation where there are several seeds. Rows with marks have ``*`` at the
    best of a column and ``~`` at what the bootstrap does not tell from it, and `LEGEND`.
    """
    headings = list(dict.fromkeys(heading for row in rows for heading in row.numbers))
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
    for method, by_seed in comparison.evaluations.items():
        sentences = {seed: e.warning for seed, e in by_seed.items() if e.warning}
        if sentences:
            lines.append(f"Warning: {method}, seed {', '.join(map(str, sentences))}: {next(iter(sentences.values()))}.")
    return lines


def _costs(comparison: Comparison, method: str) -> dict[str, list[float]]:
    """Return what a method cost, also relative to MAP where MAP is there."""
    costs, base = comparison.costs[method], comparison.costs.get("map", {})
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
