"""The plot of overconfidence: what predictors say, how often they are right, and what they make of the unknown.

A column for each predictor. Its rows: confidence against accuracy; the uncertainty of in-distribution examples
against that of out-of-distribution ones; and, where the data were generated and the truth is known, predicted against
true probabilities. More than four predictors stand in several rows of columns, with flatter panels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.comparison.plots import style
from bayeslora.comparison.plots.curves import AVERAGE, draw_diagonal, draw_reliability, legend_below
from bayeslora.errors import InputError
from bayeslora.metrics.classification import accuracy, check_labels, kl_to_truth, reliability
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Score = Literal["entropy", "mutual_information"]

_WORDS: dict[Score, str] = {"entropy": "uncertainty (entropy, nats)", "mutual_information": "mutual information (nats)"}
_PALE, _DARK = "#E2E2E2", "#3B3B3B"
_TITLE_LENGTHS = {1: 38, 2: 58}
_FLAT = 0.72
"""Height of the panels where the predictors need several rows, against those of one row."""


def overconfidence_picture(
    predictions: Mapping[str, Prediction],
    labels: Int[Tensor, " N"],
    ood: Mapping[str, Prediction] | None = None,  # predictions for the same out-of-distribution examples
    truth: Float[Tensor, "N C"] | None = None,  # true probabilities
    title: str | None = None,
    *,
    bins: int = 10,  # of the confidence; twice as many of the uncertainty
    score: Score = "entropy",
) -> Figure:
    """Draw how confident predictors are against how right, and whether they notice what they were not trained for."""
    _check(predictions, labels, ood, truth, score)
    rows, width = style.grid(len(predictions))
    height = style.side(width) * (1.0 if rows == 1 else _FLAT)
    heights = {"reliability": height + 0.75}
    if ood:
        heights["uncertainty"] = 0.62 * height + 0.75
        top = _top([*predictions.values(), *ood.values()], score)
    if truth is not None:
        heights["truth"] = height + 0.75
    low = _lowest(predictions.values(), labels, bins)
    lines = textwrap.wrap(title or "", _TITLE_LENGTHS.get(width, 84))
    with style.styled():
        figure, columns = style.new_columns(list(predictions), heights, 0.3, 0.5 + 0.3 * len(lines))
        if lines:
            figure.suptitle("\n".join(lines), x=0.012, ha="left")
        for column in columns:
            prediction = predictions[column.name]
            words = _draw_confidence(column, prediction, labels, bins, low)
            style.headline(column.panels["reliability"], column.name, width, words)
            if ood:
                _draw_uncertainty(column, prediction, ood[column.name], score, top, 2 * bins)
            if truth is not None:
                _draw_truth(column, prediction.log_p, truth)
        legend_below(figure, width, average=True)
    return figure


def _draw_confidence(column: style.Column, prediction: Prediction, labels: Tensor, bins: int, low: float) -> str:
    """Draw a reliability diagram; return in words what the predictor claims and what is true on average."""
    axes, log_p = column.panels["reliability"], prediction.log_p.detach()
    says, right = float(log_p.double().amax(-1).exp().mean()), float(accuracy(log_p, labels))
    draw_reliability(axes, reliability(log_p, labels, bins), column.colour)
    axes.plot([says, says], [says, right], label="average", zorder=4, **AVERAGE)
    style.percent_axis(axes, "x", "confidence", low=low)
    style.percent_axis(axes, "y", "accuracy", labels=column.first)
    return f"says {100 * says:.0f} %, is right {100 * right:.0f} %"


def _draw_uncertainty(
    column: style.Column, known: Prediction, unknown: Prediction, score: Score, top: float, bins: int
) -> None:
    """Draw the distributions of the uncertainty from 0 to ``top`` back to back, in-distribution upwards."""
    from matplotlib.ticker import MaxNLocator

    axes = column.panels["uncertainty"]
    inside, outside = _scores(known, score), _scores(unknown, score)
    edges = torch.linspace(0, top, bins + 1, dtype=torch.float64)
    upward, downward = (_shares(values, edges) for values in (inside, outside))
    place: style.Settings = {"x": edges[:-1].numpy(), "width": top / bins, "align": "edge", "linewidth": 0.6}
    axes.bar(**place, height=upward.numpy(), color=column.colour, edgecolor="white", label="in-distribution")
    axes.bar(**place, height=-downward.numpy(), color=_PALE, edgecolor=_DARK, label="out-of-distribution")
    axes.axhline(0, color=style.QUIET, linewidth=0.7)
    limit = 1.08 * float(torch.cat([upward, downward]).max())
    axes.set(xlim=(0, top), ylim=(-limit, limit), xlabel=_WORDS[score], title=f"AUROC {auroc(inside, outside):.2f}")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines["left"].set_visible(False)
    words = ["in-\ndistribution", "out-of-\ndistribution"] if column.first else ["", ""]
    axes.set_yticks([limit / 2, -limit / 2], words)
    axes.tick_params(axis="y", length=0)


def _draw_truth(column: style.Column, log_p: Tensor, truth: Tensor) -> None:
    """Draw predicted against true probabilities, a dot for each choice that an example has."""
    axes, log_p, truth = column.panels["truth"], log_p.detach().cpu(), truth.cpu()
    real = ~(torch.isneginf(log_p) & (truth == 0))
    draw_diagonal(axes)
    dots: style.Settings = {"s": 9, "color": column.colour, "alpha": 0.6, "linewidths": 0, "label": "choices"}
    axes.scatter(truth[real].numpy(), log_p[real].exp().numpy(), rasterized=int(real.sum()) > 2000, **dots)
    axes.set_title(f"KL {kl_to_truth(log_p, truth):.2f} nats from the truth")
    style.percent_axis(axes, "x", "true probability")
    style.percent_axis(axes, "y", "predicted probability", labels=column.first)


def _scores(prediction: Prediction, score: Score) -> Tensor:
    """Return the uncertainty of each example, [N], on the CPU."""
    return (prediction.entropy if score == "entropy" else prediction.mutual_information).detach().cpu().double()


def _shares(values: Tensor, edges: Tensor) -> Tensor:
    """Return the share of the values in each bin; what lies on the ends counts to the outer bins."""
    index = torch.searchsorted(edges[1:-1], values)
    return torch.bincount(index, minlength=len(edges) - 1).double() / len(values)


def _lowest(predictions: Iterable[Prediction], labels: Tensor, bins: int) -> float:
    """Return where the axis of the confidence begins: at half for two choices with no filled bin below, else at 0."""
    log_ps = [prediction.log_p.detach() for prediction in predictions]
    if any(log_p.shape[-1] != 2 for log_p in log_ps):
        return 0.0
    diagrams = [reliability(log_p, labels, bins) for log_p in log_ps]
    return 0.0 if any(bool(d.count[d.edges[1:] <= 0.5].any()) for d in diagrams) else 0.5


def _top(predictions: Iterable[Prediction], score: Score) -> float:
    """Return where the axis of the uncertainty ends: log C for the entropy, the largest value for the information."""
    if score == "entropy":
        return max(math.log(max(2, prediction.log_probs.shape[-1])) for prediction in predictions)
    return max(float(_scores(prediction, score).max()) for prediction in predictions) or 1.0


def _check(
    predictions: Mapping[str, Prediction],
    labels: Tensor,
    ood: Mapping[str, Prediction] | None,
    truth: Tensor | None,
    score: str,
) -> None:
    """Refuse what cannot be drawn."""
    if not predictions:
        raise InputError("there is nothing to draw; give at least one predictor with its prediction")
    if score not in _WORDS:
        raise InputError(f"score is {score!r}; choose from {', '.join(_WORDS)}")
    for name, prediction in predictions.items():
        check_labels(prediction.log_p, labels, f"the labels for {name!r}")
        if truth is not None:
            kl_to_truth(prediction.log_p, truth)
    if ood and set(ood) != set(predictions):
        odd = sorted(set(ood) ^ set(predictions))
        raise InputError(f"predictions and ood do not have the same predictors ({', '.join(odd)}); give both for each")
