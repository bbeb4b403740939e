"""Plots of how far predictions can be trusted: reliability, selective answering.

The numbers drawn are those of `bayeslora.metrics.classification` and `bayeslora.metrics.detection`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.comparison.plots import style
from bayeslora.errors import InputError
from bayeslora.metrics.classification import Reliability, check_labels, ece, reliability
from bayeslora.metrics.detection import aurc, risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]]
"""Predictor -> its log-probabilities and the index of the right choices."""

DIAGONAL: style.Settings = {"color": style.QUIET, "linewidth": 0.9, "linestyle": (0, (4, 2))}
AVERAGE: style.Settings = {
    "color": style.INK,
    "linewidth": 1.4,
    "marker": "o",
    "markersize": 6.5,
    "markeredgecolor": "white",
    "markevery": [-1],
}
_SHADED: style.Settings = {"facecolor": (1, 1, 1, 0.45), "edgecolor": style.INK, "linewidth": 0.5, "hatch": "//////"}
_MIN_COUNT = 10
"""Examples of a bin below which its height is the luck of a few, and its bar pale."""
_MIN_COVERAGE = 0.05
"""Coverage below which the risk is the luck of a few examples, and is not drawn; the area counts all."""


def reliability_diagram(curves: Curves, bins: int = 15) -> Figure:
    """Draw accuracy against confidence, and the examples in each bin; ECE averages the shaded gaps between the two."""
    curves = _checked(curves)
    diagrams = {name: reliability(log_p, labels, bins) for name, (log_p, labels) in curves.items()}
    top = max(int(diagram.count.max()) for diagram in diagrams.values())
    _, width = style.grid(len(curves))
    with style.styled():
        heights = {"reliability": style.side(width), "counts": 0.45}
        figure, columns = style.new_columns(list(curves), heights, 0.85, 0.35)
        for column in columns:
            name, upper, lower = column.name, column.panels["reliability"], column.panels["counts"]
            draw_reliability(upper, diagrams[name], column.colour)
            style.headline(upper, name, width, f"ECE {ece(*curves[name], bins):.3f}")
            style.percent_axis(upper, "y", "accuracy", labels=column.first)
            style.percent_axis(upper, "x", "", labels=False)
            _draw_counts(lower, diagrams[name], column.colour, top)
            style.percent_axis(lower, "x", "confidence")
            lower.set_yticks([0, top], ["0", f"{top:,}"] if column.first else ["", ""])
            if column.first:
                lower.set_ylabel("examples", fontsize=style.SMALL)
        legend_below(figure, width)
    return figure


def risk_coverage_plot(curves: Curves) -> Figure:
    """Draw the error rate of the answers when the least confident are left out; the legend gives the areas (AURC)."""
    curves = _checked(curves)
    areas = {name: float(aurc(log_p, labels)) for name, (log_p, labels) in curves.items()}
    with style.styled():
        from matplotlib.ticker import MaxNLocator

        figure = style.new_figure(3, 4.2)
        axes = figure.add_subplot(label="risk-coverage")
        lines, top = {}, 0.0
        for name, look in style.looks(curves).items():
            coverage, risk = risk_coverage(*curves[name])
            shown = coverage >= _MIN_COVERAGE
            x, y = coverage[shown].numpy(), risk[shown].numpy()
            (lines[name],) = axes.plot(x, y, color=look.colour, linestyle=look.dash, lw=1.8, label=name)
            top = max(top, float(y.max()))
        style.percent_axis(axes, "x", "share of questions answered, the most confident first")
        axes.set(ylim=(0, min(1.0, 1.1 * top) or 1.0), ylabel="wrong among the answered")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(style.percent)
        axes.grid(axis="y")
        ranked = sorted(areas, key=areas.__getitem__)
        words = [f"{areas[name]:.3f}  {style.shortened(name)}" for name in ranked]
        handles = [lines[name] for name in ranked]
        style.legend_beside(axes, "AURC (lower is better)", handles, words, handlelength=3.2)
    return figure


def draw_reliability(axes: Axes, diagram: Reliability, colour: str) -> None:
    """Draw the bars of one reliability diagram, the gaps to the confidence and the diagonal."""
    left, width = diagram.edges[:-1].cpu(), diagram.edges.diff().cpu()
    height, confidence, count = diagram.accuracy.cpu(), diagram.confidence.cpu(), diagram.count.cpu()
    low, high = torch.minimum(height, confidence), torch.maximum(height, confidence)
    many = count >= _MIN_COUNT
    for kind, bins, strength in (("", many, 1.0), ("few ", ~many & (count > 0), 0.3)):
        place: style.Settings = {"x": left[bins].numpy(), "width": width[bins].numpy(), "align": "edge"}
        bars: style.Settings = {"color": (colour, strength), "edgecolor": "white", "linewidth": 0.6}
        axes.bar(height=height[bins].numpy(), label=f"{kind}accuracy", **place, **bars)
        gap = _SHADED | {"edgecolor": (style.INK, strength)}
        axes.bar(height=(high - low)[bins].numpy(), bottom=low[bins].numpy(), label=f"{kind}gap", **place, **gap)
    draw_diagonal(axes)


def draw_diagonal(axes: Axes) -> None:
    """Draw the line of what is said and what is true being equal."""
    axes.plot([0, 1], [0, 1], label="diagonal", zorder=3, **DIAGONAL)


def legend_below(figure: Figure, columns: int, average: bool = False) -> None:
    """Say below a figure of so many columns what the bars, shades and lines of its reliability diagrams are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(facecolor=style.QUIET, label="accuracy in the bin")]
    if any(bars.get_label() == "few accuracy" and len(bars) for axes in figure.axes for bars in axes.containers):
        handles.append(Patch(facecolor=(style.QUIET, 0.3), label=f"fewer than {_MIN_COUNT} examples"))
    handles.append(Patch(label="gap to the confidence", **_SHADED))
    handles.append(Line2D([], [], label="perfectly calibrated", **DIAGONAL))
    if average:
        handles.append(Line2D([], [], label="average of all examples", **AVERAGE))
    ncols = {1: 1, 2: 2}.get(columns, 3 if average else 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, columnspacing=2.0, handlelength=2.2)


def _draw_counts(axes: Axes, diagram: Reliability, colour: str, top: int) -> None:
    """Draw the number of examples of each bin on an axis that ends at ``top``."""
    left, width = diagram.edges[:-1].cpu().numpy(), diagram.edges.diff().cpu().numpy()
    bars: style.Settings = {"color": colour, "edgecolor": "white", "linewidth": 0.6}
    axes.bar(left, diagram.count.cpu().numpy(), width, align="edge", label="count", **bars)
    axes.set_ylim(0, top)


def _checked(curves: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the curves on the CPU; refuse none at all, and labels that do not fit the predictions."""
    if not curves:
        raise InputError("there is nothing to draw; give at least one predictor with its log-probabilities and labels")
    for name, (log_p, labels) in curves.items():
        check_labels(log_p, labels, f"the labels of {name!r}")
    return {name: (log_p.detach().cpu(), labels.cpu()) for name, (log_p, labels) in curves.items()}
