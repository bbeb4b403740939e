"""Tables of comparisons: numbers over seeds as mean ± standard deviation, as text, Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bayeslora.compare import Comparison
from bayeslora.evaluation import Evaluation

COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "kl_to_truth": "KL to truth",
    "aurc": "AURC",
}
"""Metrics of a comparison's table and their headings; those that were not measured are left out."""


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a comparison's rows: each method's mean and draws, or the one predictor of a point.

    Args:
        comparison: What was found.

    Returns:
        One row a predictor: ``name``, then for each heading a list with one number per seed; lower is better but for
        accuracy and AUROC. ``train s`` is each method's training time as if it shared no run, ``predict s`` the time
        of its test predictions.
    """
    rows = []
    for method, by_seed in comparison.evaluations.items():
        predictions = comparison.predictions[method]
        single = all(p.draws == 1 for p in predictions.values())
        one = single or method in comparison.temperatures  # another temperature has the same mean
        for predictor in ("draws",) if one else ("mean", "draws"):
            draws = next(iter(predictions.values())).draws
            label = method if single else f"{method}, mean" if predictor == "mean" else f"{method}, {draws} draws"
            row: dict[str, Any] = {"name": label}
            for key, heading in _headings(next(iter(by_seed.values())), predictor).items():
                row[heading] = [e.rows[predictor][key].value for e in by_seed.values()]
            if predictor == "draws":
                row["train s"] = list(comparison.train_seconds[method].values())
                row["predict s"] = [p.seconds for p in predictions.values() if p.seconds is not None]
            rows.append(row)
    return rows


def text_table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """Return rows as a table for the terminal, or in Markdown.

    Args:
        rows: Rows of `comparison_rows`.
        markdown: Whether to write Markdown.

    Returns:
        The table; a cell is the number, or mean ± standard deviation where there are several seeds.
    """
    headings = ["name", *dict.fromkeys(key for row in rows for key in row if key != "name")]
    cells = [["" if h == "name" else h for h in headings]]
    cells += [[row["name"], *(_cell(row.get(h), h) for h in headings[1:])] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    if not markdown:
        return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
    body = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([body[0], "|---" + "|---:" * (len(headings) - 1) + "|", *body[1:]])


def _headings(evaluation: Evaluation, predictor: str) -> dict[str, str]:
    """Return the metrics that an evaluation has, and their headings."""
    there = evaluation.rows[predictor]
    found = {key: heading for key, heading in COLUMNS.items() if key in there}
    for name in evaluation.ood:
        short = "" if len(evaluation.ood) == 1 else f" {name}"
        found |= {f"{name}/auroc_entropy": f"AUROC H{short}", f"{name}/auroc_mutual_information": f"AUROC MI{short}"}
    return {key: heading for key, heading in found.items() if key in there}


def _cell(values: Sequence[float] | None, heading: str) -> str:
    """Return one number, or mean ± standard deviation."""
    kept = [v for v in values or () if math.isfinite(v)]
    if not kept:
        return ""
    digits = 3 if not heading.endswith(" s") else 0 if max(kept) >= 10 else 1
    mean = f"{statistics.fmean(kept):.{digits}f}"
    return mean if len(kept) == 1 else f"{mean} ± {statistics.stdev(kept):.{digits}f}"
