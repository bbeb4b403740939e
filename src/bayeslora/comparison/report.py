"""A comparison on disk: its table as Markdown, its numbers as JSON, and its pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from bayeslora.comparison import plots
from bayeslora.comparison.base import BASE
from bayeslora.comparison.run import VARIANTS
from bayeslora.comparison.tables import comparison_rows, marked, recommendations, text_table, warnings
from bayeslora.errors import InputError
from bayeslora.files import write_json, write_text

if TYPE_CHECKING:
    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.comparison.run import Comparison


def write_table(runs: CachedRuns, comparison: Comparison) -> str:
    """Write ``results.md`` and ``results.json`` into their folder, and return the table with its notes."""
    rows = comparison_rows(comparison)
    if runs.resamples:
        rows = marked(comparison, rows, runs.test.labels, bins=runs.bins, resamples=runs.resamples)
    failed = [
        f"no row for {name}: under seed {seed} {reason}"
        for name, by_seed in comparison.failures.items()
        for seed, reason in by_seed.items()
    ]
    notes = [*failed, *warnings(comparison), *recommendations(comparison)]
    write_text(runs.out / "results.md", "\n\n".join([text_table(rows, markdown=True), *notes]) + "\n")
    results = {name: by_seed.items() for name, by_seed in comparison.results.items()}
    temperatures = {
        name: {s: r.temperature for s, r in of if r.temperature is not None} for name, of in results.items()
    }
    numbers = {
        "rows": [row.to_dict() for row in rows],
        "temperatures": {name: by_seed for name, by_seed in temperatures.items() if by_seed},
        "failures": comparison.failures,
        "evaluations": {name: {seed: r.evaluation.to_dict() for seed, r in of} for name, of in results.items()},
        "train_rows": len(runs.task.train) if runs.task.train is not None else 0,
        "test_rows": len(runs.test),
    }
    write_json(runs.out / "results.json", numbers)
    return "\n".join([text_table(rows), *notes])


def write_pictures(runs: CachedRuns, comparison: Comparison, image: str) -> list[Path]:
    """Draw the trade-off as the mean over the seeds, the rest of the first seed; nothing without matplotlib."""
    test = runs.test
    names = sorted(comparison.results, key=BASE.__eq__)  # the base after the methods
    first = {name: next(iter(comparison.results[name].values())) for name in names}
    predictions = {name: result.prediction for name, result in first.items()}
    ood = {name: next(iter(result.ood.values())) for name, result in first.items() if result.ood}
    curves = {name: (prediction.log_p, test.labels) for name, prediction in predictions.items()}
    points = {
        name: (
            fmean(r.evaluation.value("draws", "accuracy") for r in by_seed.values()),
            fmean(r.evaluation.value("draws", "ece") for r in by_seed.values()),
            fmean(r.cost.train_seconds + (r.cost.predict_seconds or 0.0) for r in by_seed.values()),
        )
        for name, by_seed in comparison.results.items()
        if name != BASE and not name.endswith(VARIANTS)
    }
    try:
        figures = {
            "reliability": plots.reliability_diagram(curves),
            "risk-coverage": plots.risk_coverage_plot(curves),
            "trade-off": plots.tradeoff_plot(points),
            "overconfidence": plots.overconfidence_picture(predictions, test.labels, ood, test.probs),
        }
    except InputError as error:
        runs.report(f"no figures: {error}")
        return []
    files = {runs.out / f"{name}.{image}": figure for name, figure in figures.items()}
    for file, figure in files.items():
        plots.save(figure, file)
    return list(files)
