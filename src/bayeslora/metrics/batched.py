"""The arithmetic of the scores, for many sets of examples at once: [K N …] in, float64 [K] out, nothing checked.

`metrics.classification` and `detection` are the functions to call on one set; the bootstrap scores its resamples
with these, a thousand at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslora._typing import Float, Int


def accuracy(log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"]) -> Float[Tensor, " K"]:
    """Return the shares of right answers; see `bayeslora.metrics.classification.accuracy`."""
    return (log_p.argmax(-1) == labels).double().mean(-1)


def nll(log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"]) -> Float[Tensor, " K"]:
    """Return the mean negative log-likelihoods; see `bayeslora.metrics.classification.nll`."""
    return -log_p.gather(-1, labels[..., None]).squeeze(-1).double().mean(-1)


def brier(log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"]) -> Float[Tensor, " K"]:
    """Return the Brier scores; see `bayeslora.metrics.classification.brier`."""
    probs = log_p.double().exp()
    right = probs.gather(-1, labels[..., None]).squeeze(-1)
    return (probs.square().sum(-1) - 2 * right + 1).mean(-1)


def kl_to_truth(log_p: Float[Tensor, "K N C"], truth: Float[Tensor, "K N C"]) -> Float[Tensor, " K"]:
    """Return the mean divergences from the true probabilities; see `bayeslora.metrics.classification.kl_to_truth`."""
    cross = torch.where(truth > 0, truth * log_p.double(), 0.0)
    return (torch.xlogy(truth, truth) - cross).sum(-1).mean(-1)


def ece(
    log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"], bins: int = 15, binning: str = "width"
) -> Float[Tensor, " K"]:
    """Return the calibration errors of the most probable choice; see `bayeslora.metrics.classification.ece`."""
    best, answer = log_p.max(-1)
    return _gap(best.double().exp(), (answer == labels).double(), bins, binning)


def static_calibration_error(
    log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"], bins: int = 15, binning: str = "width"
) -> Float[Tensor, " K"]:
    """Return the mean classwise calibration errors; see `bayeslora.metrics.classification.static_calibration_error`."""
    classes = range(log_p.shape[-1])
    gaps = [_gap(log_p[..., c].double().exp(), (labels == c).double(), bins, binning) for c in classes]
    return torch.stack(gaps).mean(0)


def _gap(confidence: Float[Tensor, "K N"], hit: Float[Tensor, "K N"], bins: int, binning: str) -> Float[Tensor, " K"]:
    """Return Σ_b |hits_b − confidence_b| / N."""
    _, expected, happened, _ = binned(confidence, hit, bins, binning)
    return (happened - expected).abs().sum(-1) / confidence.shape[-1]


def binned(
    confidence: Float[Tensor, "K N"], hit: Float[Tensor, "K N"], bins: int, binning: str
) -> tuple[Float[Tensor, "K edges"], Float[Tensor, "K bins"], Float[Tensor, "K bins"], Float[Tensor, "K bins"]]:
    """Return the edges of the bins and, bin by bin, the sums of confidence, of hits and of 1; each row for itself.

    Args:
        confidence: Probabilities of events.
        hit: 1 where the event happened, 0 elsewhere.
        bins: Number of bins.
        binning: ``width`` or ``mass``; see `bayeslora.metrics.classification.reliability`.

    Returns:
        Edges and the three sums.
    """
    sets, rows = confidence.shape
    if binning == "width":
        edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device).repeat(sets, 1)
    else:
        ordered = confidence.sort(-1).values
        last = [-(-rows * k // bins) - 1 for k in range(1, bins + 1)]
        edges = ordered[:, [0, *last]]
    index = torch.searchsorted(edges[:, 1:-1].contiguous(), confidence.contiguous())
    sums = confidence.new_zeros(3, sets, bins)
    for total, values in zip(sums, (confidence, hit, torch.ones_like(hit)), strict=True):
        total.scatter_add_(-1, index, values)
    return edges, sums[0], sums[1], sums[2]


def risk(
    log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"], score: Float[Tensor, "K N"]
) -> Float[Tensor, "K N"]:
    """Return the error rates among the k examples of highest score, k = 1 … N; see `detection.risk_coverage`.

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        score: Higher for the examples to answer first; equal scores spread their errors evenly.

    Returns:
        The error rates in float64.
    """
    ordered, order = score.neg().sort(-1)
    wrong = (log_p.argmax(-1) != labels).gather(-1, order).double()
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    block = begins.long().cumsum(-1) - 1
    errors, sizes = torch.zeros_like(wrong), torch.zeros_like(wrong)
    errors.scatter_add_(-1, block, wrong)
    sizes.scatter_add_(-1, block, torch.ones_like(wrong))
    spread = (errors / sizes.clamp_min(1)).gather(-1, block)
    return spread.cumsum(-1) / torch.arange(1, wrong.shape[-1] + 1, dtype=torch.float64, device=wrong.device)


def aurc(log_p: Float[Tensor, "K N C"], labels: Int[Tensor, "K N"]) -> Float[Tensor, " K"]:
    """Return the areas under the risk-coverage curves of the confidences; see `bayeslora.metrics.detection.aurc`."""
    return risk(log_p, labels, log_p.amax(-1)).mean(-1)


def auroc(negative: Float[Tensor, "K N"], positive: Float[Tensor, "K M"]) -> Float[Tensor, " K"]:
    """Return the areas under the ROC curves; see `bayeslora.metrics.detection.auroc`."""
    negative, positive = _ascending(negative), _ascending(positive)
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return (below + not_above).double().mean(-1) / (2 * negative.shape[-1])


def aupr_out(negative: Float[Tensor, "K N"], positive: Float[Tensor, "K M"]) -> Float[Tensor, " K"]:
    """Return the average precisions of finding the positives; see `bayeslora.metrics.detection.aupr_out`."""
    negative, positive = _ascending(negative), _ascending(positive)
    # The recall rises by 1/M at each positive, so the sum over thresholds is the mean precision over positives.
    true = positive.shape[-1] - torch.searchsorted(positive, positive)
    false = negative.shape[-1] - torch.searchsorted(negative, positive)
    return (true.double() / (true + false)).mean(-1)


def aupr_in(negative: Float[Tensor, "K N"], positive: Float[Tensor, "K M"]) -> Float[Tensor, " K"]:
    """Return the average precisions of finding the negatives; see `bayeslora.metrics.detection.aupr_in`."""
    return aupr_out(-positive, -negative)


def fpr95(negative: Float[Tensor, "K N"], positive: Float[Tensor, "K M"]) -> Float[Tensor, " K"]:
    """Return the shares of negatives flagged with 95 % of the positives; see `bayeslora.metrics.detection.fpr95`."""
    negative, positive = _ascending(negative), _ascending(positive)
    flagged = -(-95 * positive.shape[-1] // 100)
    threshold = positive[:, positive.shape[-1] - flagged, None].contiguous()
    return 1 - torch.searchsorted(negative, threshold)[:, 0].double() / negative.shape[-1]


def _ascending(values: Tensor) -> Tensor:
    """Return each row sorted, in float64."""
    return values.double().sort(-1).values
