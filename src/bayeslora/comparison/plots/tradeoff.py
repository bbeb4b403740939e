"""A figure of what a method gains and costs: accuracy against calibration error, with the time as the size of a dot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bayeslora.comparison.plots.style import INK, QUIET, RULE, SMALL, looks, page, shortened, styled
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AREA = 60.0
"""Area in points² of a dot that costs as much as the cheapest."""


def tradeoff_plot(points: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Draw accuracy against calibration error, each method a dot whose area grows with its cost.

    Args:
        points: Method -> accuracy, calibration error (ECE) and time in seconds, training and prediction together.

    Returns:
        The figure; better is up and to the left, cheaper is smaller. Dots are numbered as in the legend, which gives
        the cost relative to the cheapest.

    Raises:
        InputError: If there is no method, or a number is not finite.
    """
    if not points:
        raise InputError("there is nothing to draw; give at least one method with accuracy, ECE and time.")
    if not all(math.isfinite(v) for numbers in points.values() for v in numbers):
        raise InputError("a method's accuracy, ECE or time is not finite; leave it out.")
    cheapest = max(1e-9, min(seconds for *_, seconds in points.values()))
    with styled():
        figure = page(3, max(4.6, 0.8 + 0.29 * len(points)))
        axes = figure.add_subplot(label="trade-off")
        for number, (name, look) in enumerate(looks(points).items(), 1):
            accuracy, error, seconds = points[name]
            share = max(1.0, seconds / cheapest)
            axes.scatter(
                error,
                accuracy,
                s=_AREA * share,
                color=(look.colour, 0.75),
                edgecolor="white",
                linewidth=0.8,
                label=f"{number}  {shortened(name, 24)}  {share:.1f}×",
                zorder=3,
            )
            axes.annotate(str(number), (error, accuracy), color=INK, fontsize=SMALL, ha="center", va="center", zorder=4)
        axes.margins(0.14)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.grid(color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("calibration error (ECE), lower is better")
        axes.set_ylabel("accuracy, higher is better")
        legend = axes.legend(
            title="time, by the cheapest",
            title_fontsize=SMALL,
            alignment="left",
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            labelspacing=0.8,
        )
        for handle in legend.legend_handles:
            handle.set_sizes([_AREA])  # type: ignore[union-attr]
        legend.get_title().set_color(QUIET)
    return figure
