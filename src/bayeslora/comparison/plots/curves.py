"""Figures of how far predictions can be trusted: reliability, selective answering.

Each predictor is ``(log_p [N C], labels [N])`` under its name; the numbers drawn are those of `classification` and
`bayeslora.metrics.detection`. Figures belong to no window: write them with `bayeslora.comparison.plots.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.comparison.plots.style import (
    INK,
    QUIET,
    RULE,
    SMALL,
    grid,
    headline,
    looks,
    page,
    percent_axis,
    shortened,
    styled,
)
from bayeslora.errors import InputError
from bayeslora.metrics.classification import Reliability, check_labels, ece, reliability
from bayeslora.metrics.detection import aurc, risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 0.16
"""Height in inches between the rows of predictors."""

DIAGONAL: dict[str, Any] = {"color": QUIET, "linewidth": 0.9, "linestyle": (0, (4, 2))}
AVERAGE: dict[str, Any] = {
    "color": INK,
    "linewidth": 1.4,
    "marker": "o",
    "markersize": 6.5,
    "markeredgecolor": "white",
    "markevery": [-1],
}
_SHADED: dict[str, Any] = {"facecolor": (1, 1, 1, 0.45), "edgecolor": INK, "linewidth": 0.5, "hatch": "//////"}
_MANY = 10
_SEEN = 0.05


def reliability_diagram(curves: Mapping[str, tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]], bins: int = 15) -> Figure:
    """Draw accuracy against confidence, a panel for each predictor, over the number of examples in each bin.

    Bars are the accuracy of each bin of equal width; the shaded part of a column lies between the accuracy and the mean
    confidence of the bin, which is what ECE averages.

    Args:
        curves: Predictor -> its log-probabilities and the index of the right choices.
        bins: Number of bins.

    Returns:
        The figure; axes are labelled ``reliability NAME`` and ``counts NAME``.

    Raises:
        InputError: If there is no predictor, or labels do not fit the predictions.
    """
    curves = _checked(curves)
    diagrams = {name: reliability(log_p, labels, bins) for name, (log_p, labels) in curves.items()}
    most = max(int(diagram.count.max()) for diagram in diagrams.values())
    rows, columns = grid(len(curves))
    side = 7.4 / columns if columns > 2 else 2.9
    with styled():
        figure = page(columns, rows * (side + 1.3) + (rows - 1) * GAP + 0.35)
        cells = figure.add_gridspec(3 * rows - 1, columns, height_ratios=([side, 0.45, GAP] * rows)[:-1])
        for place, (name, look) in enumerate(looks(curves).items()):
            row, column = divmod(place, columns)
            upper = figure.add_subplot(cells[3 * row, column], label=f"reliability {name}")
            lower = figure.add_subplot(cells[3 * row + 1, column], label=f"counts {name}")
            draw_reliability(upper, diagrams[name], look.colour)
            _draw_counts(lower, diagrams[name], look.colour, most)
            headline(upper, name, columns, f"ECE {ece(*curves[name], bins):.3f}")
            percent_axis(upper, "y", labels=column == 0)
            percent_axis(upper, "x", labels=False)
            percent_axis(lower, "x")
            lower.set_yticks([0, most], ["0", f"{most:,}"] if column == 0 else ["", ""])
            lower.set_xlabel("confidence")
            if column == 0:
                upper.set_ylabel("accuracy")
                lower.set_ylabel("examples", fontsize=SMALL)
        explain(figure, columns)
    return figure


def risk_coverage_plot(curves: Mapping[str, tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]]) -> Figure:
    """Draw the error rate among the questions that are answered when the least confident are left out.

    Args:
        curves: Predictor -> its log-probabilities and the index of the right choices.

    Returns:
        The figure; the legend lists the predictors by the area under their curves (AURC), the best first. Curves are
        drawn from a coverage of 5 %, below which they are the luck of a few examples; the area counts all.

    Raises:
        InputError: If there is no predictor, or labels do not fit the predictions.
    """
    curves = _checked(curves)
    areas = {name: float(aurc(log_p, labels)) for name, (log_p, labels) in curves.items()}
    with styled():
        from matplotlib.ticker import MaxNLocator

        figure = page(3, 4.2)
        axes = figure.add_subplot(label="risk-coverage")
        top = 0.0
        for name, look in looks(curves).items():
            coverage, risk = risk_coverage(*curves[name])
            seen = coverage >= _SEEN
            axes.plot(
                coverage[seen].numpy(), risk[seen].numpy(), color=look.colour, linestyle=look.dash, lw=1.8, label=name
            )
            top = max(top, float(risk[seen].max()))
        percent_axis(axes, "x")
        axes.set_ylim(0, min(1.0, 1.1 * top) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %" if value else "0")
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("share of questions answered, the most confident first")
        axes.set_ylabel("wrong among the answered")
        lines = dict(zip(curves, axes.lines, strict=True))
        ranked = sorted(areas, key=areas.__getitem__)
        axes.legend(
            [lines[name] for name in ranked],
            [f"{areas[name]:.3f}  {shortened(name, 24)}" for name in ranked],
            title="AURC (lower is better)",
            title_fontsize=SMALL,
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            handlelength=3.2,
        )
    return figure


def draw_reliability(axes: Axes, diagram: Reliability, colour: str) -> None:
    """Draw the bars of one reliability diagram, the gaps to the confidence and the diagonal.

    A bin with fewer than ten examples is pale: its height is the luck of a few.

    Args:
        axes: Empty axes.
        diagram: The bins.
        colour: Colour of the bars.
    """
    left, width = diagram.edges[:-1].cpu(), diagram.edges.diff().cpu()
    height, confidence, count = diagram.accuracy.cpu(), diagram.confidence.cpu(), diagram.count.cpu()
    low, high = torch.minimum(height, confidence), torch.maximum(height, confidence)
    many = count >= _MANY
    for kind, bins, strength in (("", many, 1.0), ("few ", ~many & (count > 0), 0.3)):
        place: dict[str, Any] = {"x": left[bins].numpy(), "width": width[bins].numpy(), "align": "edge"}
        bars: dict[str, Any] = {"color": (colour, strength), "edgecolor": "white", "linewidth": 0.6}
        axes.bar(height=height[bins].numpy(), label=f"{kind}accuracy", **place, **bars)
        gap = _SHADED | {"edgecolor": (INK, strength)}
        axes.bar(height=(high - low)[bins].numpy(), bottom=low[bins].numpy(), label=f"{kind}gap", **place, **gap)
    axes.plot([0, 1], [0, 1], label="diagonal", zorder=3, **DIAGONAL)


def explain(figure: Figure, columns: int, average: bool = False) -> None:
    """Say below a figure what the bars, shades and lines of its reliability diagrams are.

    Args:
        figure: The figure.
        columns: Number of panels side by side.
        average: Whether the diagrams also mark the average.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(facecolor=QUIET, label="accuracy in the bin")]
    if any(bars.get_label() == "few accuracy" and len(bars) for axes in figure.axes for bars in axes.containers):
        handles.append(Patch(facecolor=(QUIET, 0.3), label=f"fewer than {_MANY} examples"))
    handles.append(Patch(label="gap to the confidence", **_SHADED))
    handles.append(Line2D([], [], label="perfectly calibrated", **DIAGONAL))
    if average:
        handles.append(Line2D([], [], label="average of all examples", **AVERAGE))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols={1: 1, 2: 2}.get(columns, 3 if average else 4),
        columnspacing=2.0,
        handlelength=2.2,
    )


def _draw_counts(axes: Axes, diagram: Reliability, colour: str, most: int) -> None:
    """Draw the number of examples of each bin, the axis ending at ``most``."""
    edges = diagram.edges.cpu()
    axes.bar(
        edges[:-1].numpy(),
        diagram.count.cpu().numpy(),
        edges.diff().numpy(),
        align="edge",
        color=colour,
        edgecolor="white",
        linewidth=0.6,
        label="count",
    )
    axes.set_ylim(0, most)


def _checked(curves: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the curves on the CPU.

    Raises:
        InputError: If there is no predictor, or labels do not fit the predictions.
    """
    if not curves:
        raise InputError("there is nothing to draw; give at least one predictor with its log-probabilities and labels.")
    for name, (log_p, labels) in curves.items():
        check_labels(log_p, labels, f"the labels of {name!r}")
    return {name: (log_p.detach().cpu(), labels.cpu()) for name, (log_p, labels) in curves.items()}
