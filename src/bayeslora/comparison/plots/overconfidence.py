"""The picture of overconfidence: what predictors say, how often they are right, and what they make of the unknown.

A column for each predictor. Its rows: confidence against accuracy; the uncertainty of in-distribution examples
against that of out-of-distribution ones; and, where the data were generated and the truth is known, predicted against
true probabilities. More than four predictors stand in several rows of columns, with flatter panels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.comparison.plots.curves import AVERAGE, DIAGONAL, GAP, draw_reliability, explain
from bayeslora.comparison.plots.style import QUIET, grid, headline, looks, page, percent_axis, styled
from bayeslora.errors import InputError
from bayeslora.metrics.classification import accuracy, check_labels, kl_to_truth, reliability
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Score = Literal["entropy", "mutual_information"]

_WORDS: dict[Score, str] = {"entropy": "uncertainty (entropy, nats)", "mutual_information": "mutual information (nats)"}
_HEIGHTS = {"reliability": 1.0, "uncertainty": 0.62, "truth": 1.0}
_PALE, _DARK = "#E2E2E2", "#3B3B3B"
_TITLE = {1: 38, 2: 58}
_FLAT = 0.72
"""Height of the panels where the predictors need several rows, against those of one row."""


def overconfidence_picture(
    predictions: Mapping[str, Prediction],
    labels: Int[Tensor, " N"],
    ood: Mapping[str, Prediction] | None = None,
    truth: Float[Tensor, "N C"] | None = None,
    title: str | None = None,
    *,
    bins: int = 10,
    score: Score = "entropy",
) -> Figure:
    """Draw how confident predictors are against how right, and whether they notice what they were not trained for.

    Args:
        predictions: Predictor -> its prediction for the same N examples.
        labels: Index of the right choice of each example.
        ood: Predictor -> its prediction for the same out-of-distribution examples; adds a row with the distributions
            of the uncertainty and the area under the ROC curve (AUROC) of telling them apart.
        truth: True probabilities, where they are known; adds a row with one dot for each choice, and the mean
            divergence KL(truth || predicted).
        title: Line above the figure.
        bins: Number of bins, of equal width, of confidence and of uncertainty (twice as many).
        score: The uncertainty: ``entropy`` of the averaged draws, or the ``mutual_information`` between answer and
            draw, which is 0 for a single draw.

    Returns:
        The figure; the confidence of two choices begins at 50 %, unless a bin below it is filled. Axes are labelled
        ``reliability NAME``, ``uncertainty NAME`` and ``truth NAME``.

    Raises:
        InputError: If there is no predictor, or labels, ``ood`` or ``truth`` do not fit the predictions.
    """
    _check(predictions, labels, ood, truth, score)
    kinds = ["reliability", *(["uncertainty"] if ood else []), *(["truth"] if truth is not None else [])]
    blocks, columns = grid(len(predictions))
    side = 7.4 / columns if columns > 2 else 2.9
    side *= 1.0 if blocks == 1 else _FLAT
    heights = [side * _HEIGHTS[kind] + 0.75 for kind in kinds]
    low = _lowest(predictions, labels, bins)
    top = _largest([*predictions.values(), *ood.values()], score) if ood else 0.0
    lines = textwrap.wrap(title or "", _TITLE.get(columns, 84))
    with styled():
        figure = page(columns, blocks * (sum(heights) + 0.3) + (blocks - 1) * GAP + 0.5 + 0.3 * len(lines))
        if lines:
            figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=12.5, fontweight="bold")
        stride = len(kinds) + 1
        cells = figure.add_gridspec(stride * blocks - 1, columns, height_ratios=([*heights, GAP] * blocks)[:-1])
        for place, (name, look) in enumerate(looks(predictions).items()):
            block, column = divmod(place, columns)
            panels = {
                kind: figure.add_subplot(cells[block * stride + row, column], label=f"{kind} {name}")
                for row, kind in enumerate(kinds)
            }
            first, prediction = column == 0, predictions[name]
            words = _draw_confidence(panels["reliability"], prediction, labels, (bins, low), look.colour, first)
            headline(panels["reliability"], name, columns, words)
            if ood:
                scale = (score, top, 2 * bins)
                _draw_uncertainty(panels["uncertainty"], prediction, ood[name], scale, look.colour, first)
            if truth is not None:
                _draw_truth(panels["truth"], prediction.log_p, truth, look.colour, first)
        explain(figure, columns, average=True)
    return figure


def _draw_confidence(
    axes: Axes, prediction: Prediction, labels: Tensor, scale: tuple[int, float], colour: str, first: bool
) -> str:
    """Draw a reliability diagram; return in words what the predictor claims and what is true on average."""
    bins, low = scale
    log_p = prediction.log_p.detach()
    says, right = float(log_p.double().amax(-1).exp().mean()), float(accuracy(log_p, labels))
    draw_reliability(axes, reliability(log_p, labels, bins), colour)
    axes.plot([says, says], [says, right], label="average", zorder=4, **AVERAGE)
    percent_axis(axes, "x", low=low)
    percent_axis(axes, "y", labels=first)
    axes.set_xlabel("confidence")
    if first:
        axes.set_ylabel("accuracy")
    return f"says {100 * says:.0f} %, is right {100 * right:.0f} %"


def _draw_uncertainty(
    axes: Axes, known: Prediction, unknown: Prediction, scale: tuple[Score, float, int], colour: str, first: bool
) -> None:
    """Draw the distributions of the uncertainty back to back, in-distribution upwards."""
    from matplotlib.ticker import MaxNLocator

    score, top, bins = scale
    inside, outside = _scores(known, score), _scores(unknown, score)
    edges = torch.linspace(0, top, bins + 1, dtype=torch.float64)
    upward, downward = (_shares(values, edges) for values in (inside, outside))
    place: dict[str, Any] = {"x": edges[:-1].numpy(), "width": top / bins, "align": "edge", "linewidth": 0.6}
    axes.bar(**place, height=upward.numpy(), color=colour, edgecolor="white", label="in-distribution")
    axes.bar(
        **place,
        height=-downward.numpy(),
        color=_PALE,
        edgecolor=_DARK,
        label="out-of-distribution",
    )
    axes.axhline(0, color=QUIET, linewidth=0.7)
    axes.set_xlim(0, top)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    limit = 1.08 * float(torch.cat([upward, downward]).max())
    axes.set_ylim(-limit, limit)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([limit / 2, -limit / 2], ["in-\ndistribution", "out-of-\ndistribution"] if first else ["", ""])
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"AUROC {auroc(inside, outside):.2f}", loc="left")
    axes.set_xlabel(_WORDS[score])


def _draw_truth(axes: Axes, log_p: Tensor, truth: Tensor, colour: str, first: bool) -> None:
    """Draw predicted against true probabilities, a dot for each choice that an example has."""
    log_p, truth = log_p.detach().cpu(), truth.cpu()
    real = ~(torch.isneginf(log_p) & (truth == 0))
    axes.plot([0, 1], [0, 1], label="diagonal", zorder=3, **DIAGONAL)
    axes.scatter(
        truth[real].numpy(),
        log_p[real].exp().numpy(),
        s=9,
        color=colour,
        alpha=0.6,
        linewidths=0,
        rasterized=int(real.sum()) > 2000,
        label="choices",
    )
    axes.set_title(f"KL {kl_to_truth(log_p, truth):.2f} nats from the truth", loc="left")
    percent_axis(axes, "x")
    percent_axis(axes, "y", labels=first)
    axes.set_xlabel("true probability")
    if first:
        axes.set_ylabel("predicted probability")


def _scores(prediction: Prediction, score: Score) -> Tensor:
    """Return the uncertainty of each example, [N], on the CPU."""
    return (prediction.entropy if score == "entropy" else prediction.mutual_information).detach().cpu().double()


def _shares(values: Tensor, edges: Tensor) -> Tensor:
    """Return the share of the values in each bin; what lies on the ends counts to the outer bins."""
    index = torch.searchsorted(edges[1:-1], values)
    return torch.bincount(index, minlength=len(edges) - 1).double() / len(values)


def _lowest(predictions: Mapping[str, Prediction], labels: Tensor, bins: int) -> float:
    """Return where the axis of the confidence begins: at half for two choices with no filled bin below, else at 0."""
    if any(prediction.log_probs.shape[-1] != 2 for prediction in predictions.values()):
        return 0.0
    diagrams = [reliability(prediction.log_p.detach(), labels, bins) for prediction in predictions.values()]
    return 0.0 if any(bool(d.count[d.edges[1:] <= 0.5].any()) for d in diagrams) else 0.5


def _largest(predictions: list[Prediction], score: Score) -> float:
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
    """Refuse what cannot be drawn.

    Raises:
        InputError: If there is no predictor, or labels, ``ood``, ``truth`` or ``score`` do not fit.
    """
    if not predictions:
        raise InputError("there is nothing to draw; give at least one predictor with its prediction.")
    if score not in _WORDS:
        raise InputError(f"score is {score!r}; choose from {', '.join(_WORDS)}.")
    for name, prediction in predictions.items():
        check_labels(prediction.log_p, labels, f"the labels for {name!r}")
        if truth is not None:
            kl_to_truth(prediction.log_p, truth)
    if ood and set(ood) != set(predictions):
        odd = sorted(set(ood) ^ set(predictions))
        raise InputError(f"predictions and ood do not have the same predictors ({', '.join(odd)}); give both for each.")
