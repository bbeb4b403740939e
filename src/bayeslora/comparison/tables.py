"""Tables of comparisons: numbers over seeds as mean ± standard deviation, as text, Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bayeslora.comparison.run import Comparison
from bayeslora.metrics.evaluation import Evaluation

COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "kl_to_truth": "KL to truth",
    "aurc": "AURC",
}
"""Metrics of a comparison's table and their headings; those that were not measured are left out."""

LEGEND = "* best; ~ not told from the best by a 95 % paired bootstrap of the test rows (seeds averaged)"
_WORDS = ("name", "method", "predictor", "marks")


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a comparison's rows: each method's mean and draws, or the one predictor of a point.

    Args:
        comparison: What was found.

    Returns:
        One row a predictor: ``name``, ``method`` and ``predictor``, then for each heading a list with one number per
        seed; lower is better but for accuracy and AUROC. ``train s`` is the time of training and fitting as if a
        method shared no run, ``predict s`` that of its test predictions, ``train ×`` and ``predict ×`` their ratios to
        MAP's where MAP is there, ``memory MB`` the highest that either took, ``disk MB`` the posterior's size.
    """
    rows = []
    for method, by_seed in comparison.evaluations.items():
        predictions = comparison.predictions[method]
        single = all(p.draws == 1 for p in predictions.values())
        one = single or method in comparison.temperatures  # another temperature has the same mean
        for predictor in ("draws",) if one else ("mean", "draws"):
            draws = next(iter(predictions.values())).draws
            label = method if single else f"{method}, mean" if predictor == "mean" else f"{method}, {draws} draws"
            row: dict[str, Any] = {"name": label, "method": method, "predictor": predictor}
            for key, heading in _headings(next(iter(by_seed.values())), predictor).items():
                row[heading] = [e.rows[predictor][key].value for e in by_seed.values()]
            if predictor == "draws":
                row |= _costs(comparison, method)
            rows.append(row)
    return rows


def text_table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """Return rows as a table for the terminal, or in Markdown.

    Args:
        rows: Rows of `comparison_rows`.
        markdown: Whether to write Markdown.

    Returns:
        The table; a cell is the number, or mean ± standard deviation where there are several seeds. Rows with marks
        have ``*`` at the best of a column and ``~`` at what the bootstrap does not tell from it, and `LEGEND`.
    """
    headings = ["name", *dict.fromkeys(key for row in rows for key in row if key not in _WORDS)]
    cells = [["" if h == "name" else h for h in headings]]
    cells += [[row["name"], *(_cell(row.get(h), h, row.get("marks", {}).get(h)) for h in headings[1:])] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    legend = ["", LEGEND] if any(row.get("marks") for row in rows) else []
    if not markdown:
        return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:], *legend])
    body = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([body[0], "|---" + "|---:" * (len(headings) - 1) + "|", *body[1:], *legend])


def warnings(comparison: Comparison) -> list[str]:
    """Return the warnings of a comparison's evaluations.

    Args:
        comparison: What was found.

    Returns:
        One line a method that has any, with its seeds and the sentence of the first.
    """
    lines = []
    for method, by_seed in comparison.evaluations.items():
        there = {seed: e.warning for seed, e in by_seed.items() if e.warning}
        if there:
            seeds = ", ".join(map(str, there))
            lines.append(f"Warning: {method}, seed {seeds}: {next(iter(there.values()))}.")
    return lines


def _costs(comparison: Comparison, method: str) -> dict[str, list[float]]:
    """Return what a method cost, also relative to MAP where MAP is there."""
    own, base = comparison.costs[method], comparison.costs.get("map", {})
    found: dict[str, list[float]] = {
        "train s": [c.train_seconds for c in own.values()],
        "predict s": [c.predict_seconds for c in own.values() if c.predict_seconds is not None],
    }
    if own.keys() <= base.keys():
        found["train ×"] = [c.train_seconds / max(1e-9, base[s].train_seconds) for s, c in own.items()]
        found["predict ×"] = [
            c.predict_seconds / max(1e-9, base[s].predict_seconds or 0.0)
            for s, c in own.items()
            if c.predict_seconds is not None and base[s].predict_seconds is not None
        ]
    found["memory MB"] = [c.memory / 1e6 for c in own.values() if c.memory is not None]
    found["disk MB"] = [c.disk / 1e6 for c in own.values()]
    return {heading: values for heading, values in found.items() if values}


def _headings(evaluation: Evaluation, predictor: str) -> dict[str, str]:
    """Return the metrics that an evaluation has, and their headings."""
    there = evaluation.rows[predictor]
    found = {key: heading for key, heading in COLUMNS.items() if key in there}
    for name in evaluation.ood:
        short = "" if len(evaluation.ood) == 1 else f" {name}"
        found |= {f"{name}/auroc_entropy": f"AUROC H{short}", f"{name}/auroc_mutual_information": f"AUROC MI{short}"}
    return {key: heading for key, heading in found.items() if key in there}


def _cell(values: Sequence[float] | None, heading: str, mark: str | None = None) -> str:
    """Return one number, or mean ± standard deviation, and its mark."""
    kept = [v for v in values or () if math.isfinite(v)]
    if not kept:
        return ""
    digits = 3 if not heading.endswith((" s", "×", "MB")) else 0 if max(kept) >= 10 else 1
    mean = f"{statistics.fmean(kept):.{digits}f}"
    text = mean if len(kept) == 1 else f"{mean} ± {statistics.stdev(kept):.{digits}f}"
    return text + {"best": " *", "tied": " ~"}.get(mark or "", "")
