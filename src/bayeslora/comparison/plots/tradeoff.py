"""A plot of what a method gains and costs: accuracy against calibration error, with the time as the size of a dot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bayeslora.comparison.plots import style
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AREA = 60.0
"""Area in points² of a dot that costs as much as the cheapest."""


def tradeoff_plot(points: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Draw each method's (accuracy, ECE, seconds of training and prediction): a dot whose area is the time."""
    if not points:
        raise InputError("there is nothing to draw; give at least one method with accuracy, ECE and time")
    if not all(math.isfinite(v) for numbers in points.values() for v in numbers):
        raise InputError("a method's accuracy, ECE or time is not finite; leave it out")
    cheapest = max(1e-9, min(seconds for *_, seconds in points.values()))
    with style.styled():
        figure = style.new_figure(3, max(4.6, 0.8 + 0.29 * len(points)))
        axes = figure.add_subplot(label="trade-off")
        for number, (name, look) in enumerate(style.looks(points).items(), 1):
            accuracy, error, seconds = points[name]
            cost = max(1.0, seconds / cheapest)
            label = f"{number}  {style.shortened(name)}  {cost:.1f}×"
            dot: style.Settings = {"color": (look.colour, 0.75), "edgecolor": "white", "linewidth": 0.8}
            axes.scatter(error, accuracy, s=_AREA * cost, label=label, zorder=3, **dot)
            place: style.Settings = {"ha": "center", "va": "center", "zorder": 4}
            axes.annotate(str(number), (error, accuracy), fontsize=style.SMALL, **place)
        axes.margins(0.14)
        axes.xaxis.set_major_formatter(style.percent)
        axes.yaxis.set_major_formatter(style.percent)
        axes.grid()
        axes.set(xlabel="calibration error (ECE), lower is better", ylabel="accuracy, higher is better")
        handles, words = axes.get_legend_handles_labels()
        legend = style.legend_beside(axes, "time, by the cheapest", handles, words, labelspacing=0.8)
        for handle in legend.legend_handles:
            handle.set_sizes([_AREA])  # type: ignore[union-attr]
        legend.get_title().set_color(style.QUIET)
    return figure
