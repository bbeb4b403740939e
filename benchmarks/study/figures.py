"""The study's figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import torch
from paired import Lines, Row
from questions import LONG, by_size, main_row
from tables import label

from bayeslora.metrics.classification import reliability

COLOURS = {
    "map": "#444444", "map + T": "#999999", "ivon": "#c2410c", "blob": "#1d4ed8", "ensemble": "#15803d",
    "laplace": "#7e22ce", "swag": "#eab308", "blob elbo": "#0891b2", "multiswag": "#4d7c0f", "tfb": "#be185d",
    "isotropic": "#7c4a21", "mc-dropout": "#64748b",
}  # fmt: skip


SHOWN = [main_row(name) for name in ("map", "map + T", "ensemble", "swag", "laplace", "tfb", "ivon", "blob")]
"""What the figure of over-confidence shows."""
RELIABLE = ("map", "map + T", "ivon", "blob")
"""Of which it draws the reliability, averaged over the seeds: by fifths of the answers."""
FIFTHS = 5


def write(found: Lines, cells: Sequence[str], folder: Path) -> None:
    """Write all figures for which there are lines into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    by_draws(found, cells, folder / "study-draws.png")
    by_data(found, folder / "study-data.png")
    calibration(found, cells, folder / "study-calibration.png")
    whole = [cell for cell in cells if all(found.seeds(cell, name) for name in RELIABLE)]
    overconfidence(found, whole or cells, folder / "study-overconfidence.png")


def by_draws(found: Lines, cells: Sequence[str], path: Path) -> None:
    """Draw NLL less that of the mean by the number of draws, averaged over the seeds, a panel a cell."""
    figure, panels = _panels(cells)
    for axes, cell in zip(panels, cells, strict=False):
        ticks: set[int] = set()
        for name, colour in COLOURS.items():
            if scores := found.by_draws(cell, name, "nll"):
                mean = fmean(found.values(cell, Row(name, "mean"), "nll"))
                less = [score - mean for score in scores.values()]
                axes.plot(list(scores), less, marker="o", markersize=3, linewidth=1, color=colour, label=label(name))
                ticks |= set(scores)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        first = axes is panels[0]
        axes.set(xlabel="draws", ylabel="NLL less that of the mean (nats)" if first else "", title=cell)
        _log_scale(axes, ticks)
    _legend(panels)
    _save(figure, path)


def by_data(found: Lines, path: Path) -> None:
    """Draw NLL and ECE by the number of training rows for the cells that differ in nothing else."""
    sizes = {cell: found.train_rows(cell) for cell in by_size(found) if not cell.endswith(LONG)}
    figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.2))
    for axes, score, title in zip(panels, ("nll", "ece"), ("NLL (nats)", "ECE"), strict=True):
        for name in ("map", "map + T", "ensemble", "laplace", "ivon", "blob"):
            points = sorted(
                (sizes[cell], found.values(cell, main_row(name), score)) for cell in sizes if found.seeds(cell, name)
            )
            if points:
                rows, values = [p[0] for p in points], [p[1] for p in points]
                spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
                axes.errorbar(
                    rows, [fmean(v) for v in values], spread, marker="o", markersize=3, capsize=2, linewidth=1,
                    color=COLOURS[name], label=label(name),
                )  # fmt: skip
        axes.set(xlabel="training rows", ylabel=title)
        _log_scale(axes, sizes.values())
    _legend(panels)
    _save(figure, path)


def calibration(found: Lines, cells: Sequence[str], path: Path) -> None:
    """Draw each method's NLL by its ECE, averaged over the seeds, a panel a cell."""
    figure, panels = _panels(cells)
    for axes, cell in zip(panels, cells, strict=False):
        for name, colour in COLOURS.items():
            if not found.seeds(cell, name):
                continue
            x, y = (fmean(found.values(cell, main_row(name), score)) for score in ("ece", "nll"))
            axes.scatter([x], [y], color=colour, s=18, zorder=3, label=label(name))
        axes.set(xlabel="ECE", ylabel="NLL (nats)" if axes is panels[0] else "", title=cell)
    _legend(panels)
    _save(figure, path)


def overconfidence(found: Lines, cells: Sequence[str], path: Path) -> None:
    """Draw confidence against accuracy in the first cell, and the ECE under every seed in every cell."""
    figure, panels = plt.subplots(1, 1 + len(cells), figsize=(3.2 + 2.3 * len(cells), 3.2))
    shown = [row for row in SHOWN if any(found.seeds(cell, row.name) for cell in cells)]
    for row in shown:
        if row.name in RELIABLE and found.seeds(cells[0], row.name):
            answers = [found.answers(cells[0], row, seed) for seed in found.common(cells[0], row)]
            diagrams = [reliability(log_p, labels, FIFTHS, "mass") for log_p, labels in answers]
            confidence, right = (  # a bin is empty where many answers are equally sure
                torch.stack([getattr(diagram, of) for diagram in diagrams]).nanmean(0)
                for of in ("confidence", "accuracy")
            )
            panels[0].plot(confidence, right, marker="o", markersize=3, color=COLOURS[row.name], label=label(row.name))
    panels[0].plot([0.5, 1], [0.5, 1], color="#bbbbbb", linewidth=0.8, zorder=0)
    panels[0].set(xlabel="confidence", ylabel="share that is right", title=cells[0])
    panels[0].legend(frameon=False, fontsize=7)
    for axes, cell in zip(panels[1:], cells, strict=True):
        for place, row in enumerate(reversed(shown)):
            if values := found.values(cell, row, "ece"):
                axes.scatter(values, [place] * len(values), color=COLOURS[row.name], s=9, alpha=0.6, linewidths=0)
                axes.plot([fmean(values)] * 2, [place - 0.3, place + 0.3], color=COLOURS[row.name], linewidth=2)
        names = [label(row.name) for row in reversed(shown)] if axes is panels[1] else [""] * len(shown)
        axes.set_yticks(range(len(shown)), names)
        axes.set(xlabel="ECE", title=cell, ylim=(-0.6, len(shown) - 0.4))
    widest = max(axes.get_xlim()[1] for axes in panels[1:])
    for axes in panels[1:]:
        axes.set_xlim(0, widest)
    _save(figure, path)


def _panels(cells: Sequence[str]) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    """Return a figure of one panel a cell, at least one."""
    figure, panels = plt.subplots(1, max(1, len(cells)), figsize=(3.0 * max(1, len(cells)), 3.2), squeeze=False)
    return figure, list(panels[0])


def _log_scale(axes: plt.Axes, ticks: Collection[int]) -> None:
    """Scale x by logarithms, with ticks at these numbers alone."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.minorticks_off()


def _legend(panels: Sequence[plt.Axes]) -> None:
    """Put one legend of all panels at the right of the last."""
    marks = {words: mark for axes in panels for mark, words in zip(*axes.get_legend_handles_labels(), strict=True)}
    if marks:
        where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        panels[-1].legend(marks.values(), marks, frameon=False, fontsize=7, **where)


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a figure; without a date, so that the same lines give the same file."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": ""})
    plt.close(figure)
