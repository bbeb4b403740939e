"""Figures of how far predictions can be trusted: reliability, selective answering.

Each predictor is ``(log_p [N C], labels [N])`` under its name; the numbers drawn are those of `bayeslora.metrics` and
`bayeslora.detection`. Figures belong to no window: write them with `bayeslora.report.save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.detection import aurc, risk_coverage
from bayeslora.errors import InputError
from bayeslora.metrics import Reliability, check_labels, ece, reliability
from bayeslora.report.style import INK, QUIET, RULE, SMALL, grid, looks, page, percent_axis, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOISE = 0.05


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
    _check(curves)
    diagrams = {name: reliability(log_p, labels, bins) for name, (log_p, labels) in curves.items()}
    most = max(int(diagram.count.max()) for diagram in diagrams.values())
    rows, columns = grid(len(curves))
    side = 7.6 / columns if columns > 2 else 2.9
    with styled():
        figure = page(columns, rows * (side + 1.2) + 0.35)
        blocks = figure.add_gridspec(rows, columns)
        for place, (name, look) in enumerate(looks(curves).items()):
            row, column = divmod(place, columns)
            cell = blocks[row, column].subgridspec(2, 1, height_ratios=(side, 0.5), hspace=0.02)
            upper = figure.add_subplot(cell[0], label=f"reliability {name}")
            lower = figure.add_subplot(cell[1], label=f"counts {name}")
            draw_reliability(upper, diagrams[name], look.colour)
            _draw_counts(lower, diagrams[name], look.colour, most)
            upper.set_title(shortened(name, columns), loc="left", fontweight="bold", fontsize=10.5)
            upper.set_title(f"ECE {ece(*curves[name], bins):.3f}", loc="right")
            percent_axis(upper, "y", labels=column == 0)
            percent_axis(upper, "x", labels=False)
            percent_axis(lower, "x", labels=True)
            lower.set_yticks([0, most], ["0", f"{most:,}"] if column == 0 else ["", ""])
            if column == 0:
                upper.set_ylabel("accuracy")
                lower.set_ylabel("examples", fontsize=SMALL)
            if place + columns >= len(curves):
                lower.set_xlabel("confidence")
        gap_legend(figure)
    return figure


def risk_coverage_plot(curves: Mapping[str, tuple[Float[Tensor, "N C"], Int[Tensor, " N"]]]) -> Figure:
    """Draw the error rate among the questions that are answered when the least confident are left out.

    Args:
        curves: Predictor -> its log-probabilities and the index of the right choices.

    Returns:
        The figure; the legend lists the predictors by the area under their curves (AURC), the best first. The height
        is cut to what is seen from a coverage of 5 %, below which a curve is a few examples.

    Raises:
        InputError: If there is no predictor, or labels do not fit the predictions.
    """
    _check(curves)
    areas = {name: aurc(log_p, labels) for name, (log_p, labels) in curves.items()}
    with styled():
        figure = page(3, 4.2)
        axes = figure.add_subplot(label="risk-coverage")
        top = 0.0
        for name, look in looks(curves).items():
            coverage, risk = (values.cpu() for values in risk_coverage(*curves[name]))
            axes.plot(coverage.numpy(), risk.numpy(), color=look.colour, linestyle=look.dash, linewidth=1.8, label=name)
            top = max(top, float(risk[coverage >= min(_NOISE, float(coverage[-1]))].max()))
        percent_axis(axes, "x")
        axes.set_ylim(0, min(1.0, 1.12 * top) or 1.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.yaxis.get_major_locator().set_params(nbins=5)
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("share of questions answered, the most confident first")
        axes.set_ylabel("wrong among the answered")
        lines = dict(zip(curves, axes.lines, strict=True))
        ranked = sorted(areas, key=areas.__getitem__)
        axes.legend(
            [lines[name] for name in ranked],
            [f"{shortened(name, 1)}  {areas[name]:.3f}" for name in ranked],
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

    Args:
        axes: Empty axes.
        diagram: The bins.
        colour: Colour of the bars.
    """
    seen = (diagram.count > 0).cpu()
    left, right = diagram.edges[:-1].cpu()[seen], diagram.edges[1:].cpu()[seen]
    accuracy, confidence = diagram.accuracy.cpu()[seen], diagram.confidence.cpu()[seen]
    place = {"x": left.numpy(), "width": (right - left).numpy(), "align": "edge"}
    axes.bar(**place, height=accuracy.numpy(), color=colour, edgecolor="white", linewidth=0.6, label="accuracy")
    axes.bar(
        **place,
        height=(confidence - accuracy).abs().numpy(),
        bottom=torch.minimum(accuracy, confidence).numpy(),
        color=(1, 1, 1, 0.45),
        edgecolor=INK,
        linewidth=0.5,
        hatch="//////",
        label="gap",
    )
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.9, linestyle=(0, (4, 2)), label="diagonal", zorder=3)


def gap_legend(figure: Figure) -> None:
    """Say below a figure what bars, shading and diagonal of its reliability diagrams are.

    Args:
        figure: The figure.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(facecolor=QUIET, label="accuracy in the bin"),
            Patch(facecolor="white", edgecolor=INK, linewidth=0.5, hatch="//////", label="gap to the confidence"),
            Line2D([], [], color=QUIET, linewidth=0.9, linestyle=(0, (4, 2)), label="perfectly calibrated"),
        ],
        loc="outside lower center",
        ncols=3,
        columnspacing=2.4,
    )


def _draw_counts(axes: Axes, diagram: Reliability, colour: str, most: int) -> None:
    """Draw the number of examples of each bin, the axis ending at ``most``."""
    edges = diagram.edges.cpu()
    axes.bar(
        edges[:-1].numpy(),
        diagram.count.cpu().numpy(),
        width=edges.diff().numpy(),
        align="edge",
        color=colour,
        edgecolor="white",
        linewidth=0.6,
        label="count",
    )
    axes.set_ylim(0, most)


def _check(curves: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse curves that cannot be drawn.

    Raises:
        InputError: If there is no predictor, or labels do not fit the predictions.
    """
    if not curves:
        raise InputError("there is nothing to draw; give at least one predictor with its log-probabilities and labels.")
    for name, (log_p, labels) in curves.items():
        check_labels(log_p, labels, f"the labels of {name!r}")
