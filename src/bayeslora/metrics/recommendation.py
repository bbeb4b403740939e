"""What a posterior's draws add to its mean on the rows at hand, and how to predict the next ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from bayeslora._typing import Int
from bayeslora.metrics.bootstrap import paired_bootstrap
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction


@dataclass(frozen=True)
class Recommendation:
    """The negative log-likelihood of the mean less that of the draws, in nats a row, and what follows.

    Attributes:
        gain: What the draws gain over the mean; negative where the mean does better.
        low: Lower end of its paired 95 % bootstrap interval over the rows.
        high: Upper end.
        mean_suffices: Whether the interval leaves open that the draws gain nothing: then one pass does.
        text: The same as a sentence.
    """

    gain: float
    low: float
    high: float
    mean_suffices: bool
    text: str


def recommended(
    prediction: Prediction, labels: Int[Tensor, " N"], *, resamples: int = 1000, seed: int = 0
) -> Recommendation | None:
    """Return whether the draws of a prediction are worth their passes.

    Args:
        prediction: What the posterior says about the rows.
        labels: Index of the right choice of each row.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The recommendation; None where there is nothing to compare: no resamples, no pass at the mean, draws that are
        all the mean, or a right choice that has no probability.
    """
    mean, count = prediction.mean_log_probs, prediction.draws
    if mean is None or not resamples or (prediction.log_probs == mean).all():
        return None
    of_mean, of_draws = ((log_p.cpu(), labels) for log_p in (mean, prediction.log_p))
    ends = paired_bootstrap(nll, of_mean, of_draws, resamples=resamples, seed=seed)
    scores, (low, high) = (float(nll(*of_mean)), float(nll(*of_draws))), map(float, ends)
    if not all(map(math.isfinite, (*scores, low, high))):
        return None
    who = "the mean alone" if prediction.components is None else "the first member's mean alone"
    numbers = f"NLL {scores[0]:.4f} against {scores[1]:.4f}, paired 95 % interval of the gain [{low:.4f}, {high:.4f}]"
    if low > 0:
        text = f"{count} draws add something to {who} ({numbers}): keep them"
    elif high < 0:
        text = f"{who} does better than {count} draws ({numbers}): predict with --draws 0 (draws=0)"
    else:
        text = f"{who} is within the interval of {count} draws ({numbers}): predict with --draws 0 (draws=0)"
    return Recommendation(scores[0] - scores[1], low, high, low <= 0, text)
