"""The study's figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
from paired import Lines

COLOURS = {
    "map": "#444444", "map + T": "#999999", "ivon": "#c2410c", "blob": "#1d4ed8", "ensemble": "#15803d",
    "laplace": "#7e22ce", "swag": "#b45309", "blob elbo": "#0891b2", "multiswag": "#4d7c0f", "tfb": "#be185d",
    "isotropic": "#a16207", "mc-dropout": "#64748b",
}  # fmt: skip


def write(found: Lines, cells: Sequence[str], folder: Path) -> None:
    """Write all figures for which there are lines into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    by_draws(found, folder / "study-draws.png")
    by_data(found, folder / "study-data.png")
    calibration(found, cells, folder / "study-calibration.png")


def by_draws(found: Lines, path: Path) -> None:
    """Draw NLL less that of the mean by the number of draws, averaged over cells and seeds."""
    figure, axes = plt.subplots(figsize=(5.5, 3.2))
    for name, colour in COLOURS.items():
        runs = [line for (_, row, _), line in found.by_run.items() if row == name and len(line["by draws"]) > 1]
        counts = sorted(set.intersection(*(set(map(int, run["by draws"])) for run in runs))) if runs else []
        if len(counts) > 1:
            less = [fmean(r["by draws"][str(c)]["nll"] - r["metrics"]["mean"]["nll"] for r in runs) for c in counts]
            axes.plot(counts, less, marker="o", markersize=3, color=colour, label=name)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8)
    axes.set(xscale="log", xlabel="draws", ylabel="NLL less that of the mean (nats)")
    axes.xaxis.set_major_formatter("{x:.0f}")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def by_data(found: Lines, path: Path) -> None:
    """Draw NLL and ECE by the number of training rows for the cells that differ in nothing else."""
    sizes = {cell: _train_rows(found, cell) for cell in found.cells if re.fullmatch(r"minilm-sst2(-\d+)?", cell)}
    figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.2))
    for axes, score, title in zip(panels, ("nll", "ece"), ("NLL (nats)", "ECE"), strict=True):
        for name in ("map", "map + T", "ensemble", "laplace", "ivon", "blob"):
            predictor = "mean" if name.startswith("map") else "draws"
            points = sorted(
                (sizes[cell], found.values(cell, (name, predictor), score)) for cell in sizes if found.seeds(cell, name)
            )
            if points:
                rows, values = [p[0] for p in points], [p[1] for p in points]
                spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
                axes.errorbar(
                    rows, [fmean(v) for v in values], spread, marker="o", markersize=3, capsize=2, linewidth=1,
                    color=COLOURS[name], label=name,
                )  # fmt: skip
        axes.set(xscale="log", xlabel="training rows", ylabel=title)
        ticks = sorted(sizes.values())
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    if panels[1].get_legend_handles_labels()[1]:
        panels[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def calibration(found: Lines, cells: Sequence[str], path: Path) -> None:
    """Draw each method's ECE beside its NLL, less MAP's, a panel a cell."""
    figure, panels = plt.subplots(1, max(1, len(cells)), figsize=(3.0 * max(1, len(cells)), 3.2), squeeze=False)
    for axes, cell in zip(panels[0], cells, strict=False):
        for name, colour in COLOURS.items():
            if not found.seeds(cell, name):
                continue
            predictor = "mean" if name.startswith("map") else "draws"
            x, y = (fmean(found.values(cell, (name, predictor), score)) for score in ("ece", "nll"))
            axes.scatter([x], [y], color=colour, s=18, zorder=3)
            axes.annotate(name, (x, y), fontsize=6, xytext=(3, 2), textcoords="offset points")
        axes.set(xlabel="ECE", ylabel="NLL (nats)" if axes is panels[0][0] else "", title=cell)
    _save(figure, path)


def _train_rows(found: Lines, cell: str) -> int:
    """Return a cell's number of training rows."""
    return next(int(line["config"]["train_rows"]) for (of, _, _), line in found.by_run.items() if of == cell)


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a figure; without a date, so that the same lines give the same file."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": ""})
    plt.close(figure)
