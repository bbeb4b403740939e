"""A comparison on disk: its table as Markdown, its numbers as JSON, and its pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from bayeslora.comparison.plots import (
    overconfidence_picture,
    reliability_diagram,
    risk_coverage_plot,
    save,
    tradeoff_plot,
)
from bayeslora.comparison.significance import marked
from bayeslora.comparison.tables import comparison_rows, text_table, warnings
from bayeslora.errors import InputError
from bayeslora.files import write_json, write_text

if TYPE_CHECKING:
    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.comparison.run import Comparison


def write_table(runs: CachedRuns, comparison: Comparison) -> str:
    """Write ``results.md`` and ``results.json`` into their folder, and return the table with its notes."""
    out, task = runs.out, runs.task
    rows = comparison_rows(comparison)
    if runs.resamples and task.test is not None:
        rows = marked(comparison, rows, task.test.labels, bins=runs.bins, resamples=runs.resamples)
    failed = [
        f"no row for {name}: under seed {seed} {reason}"
        for name, by_seed in comparison.failures.items()
        for seed, reason in by_seed.items()
    ]
    notes = [*failed, *warnings(comparison)]
    write_text(out / "results.md", "\n\n".join([text_table(rows, markdown=True), *notes]) + "\n")
    numbers = {
        "rows": [row.to_dict() for row in rows],
        "temperatures": comparison.temperatures,
        "failures": comparison.failures,
        "evaluations": {m: {s: e.to_dict() for s, e in by.items()} for m, by in comparison.evaluations.items()},
        "train_rows": len(task.train) if task.train is not None else 0,
        "test_rows": len(task.test) if task.test is not None else 0,
    }
    write_json(out / "results.json", numbers)
    return "\n".join([text_table(rows), *notes])


def write_pictures(runs: CachedRuns, comparison: Comparison, image: str) -> list[Path]:
    """Draw the trade-off as the mean over the seeds, the rest of the first seed; nothing without matplotlib."""
    test = runs.task.test
    assert test is not None
    seed = next(iter(next(iter(comparison.predictions.values()))))
    predictions = {name: by_seed[seed] for name, by_seed in comparison.predictions.items()}
    curves = {name: (p.log_p, test.labels) for name, p in predictions.items()}
    ood = {name: list(comparison.ood[name][seed].values()) for name in predictions}
    points = {
        name: (
            fmean(e.value("draws", "accuracy") for e in by_seed.values()),
            fmean(e.value("draws", "ece") for e in by_seed.values()),
            fmean(c.train_seconds + (c.predict_seconds or 0.0) for c in comparison.costs[name].values()),
        )
        for name, by_seed in comparison.evaluations.items()
        if not name.endswith((" + T", " tuned"))
    }
    try:
        figures = {
            "reliability": reliability_diagram(curves),
            "risk-coverage": risk_coverage_plot(curves),
            "trade-off": tradeoff_plot(points),
            "overconfidence": overconfidence_picture(
                predictions, test.labels, {n: o[0] for n, o in ood.items() if o} or None, test.probs
            ),
        }
    except InputError as error:
        runs.report(f"no figures: {error}")
        return []
    files = {runs.out / f"{name}.{image}": figure for name, figure in figures.items()}
    for file, figure in files.items():
        save(figure, file)
    return list(files)
