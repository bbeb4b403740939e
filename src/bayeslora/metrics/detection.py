"""How well a score separates what to trust from what not: selective answering and out-of-distribution detection.

Detection measures take ``(negative_scores [*B N], positive_scores [*B M])``, where a higher score says more
out-of-distribution: the negatives are the in-distribution (ID) examples, the positives the out-of-distribution (OOD)
ones. They return one float64 number for each of the *B pairs of sets. Equal scores are one threshold, so no result
depends on the order of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.metrics.classification import Labels, LogProbs, PerSet, check_labels


def risk_coverage(
    log_p: LogProbs, labels: Labels, score: Float[Tensor, "*B N"] | None = None
) -> tuple[Float[Tensor, " N"], Float[Tensor, "*B N"]]:
    """Compute ``(coverage, risk)``: k/N, and the error rate of the k examples of highest score, for k = 1 ... N."""
    labels = check_labels(log_p, labels)
    ranking = log_p.amax(-1) if score is None else score.to(log_p.device)
    rows = labels.shape[-1]
    if ranking.shape != labels.shape or bool(ranking.isnan().any()):
        raise InputError(f"score has shape {list(ranking.shape)} or a NaN; give one number for each of {rows} rows")
    # Examples of equal score are one block: within it the errors are spread evenly, which is the expectation over the
    # orders that it could be answered in.
    ordered, order = ranking.neg().sort(-1)
    wrong = (log_p.argmax(-1) != labels).gather(-1, order).double()
    block = functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0)).cumsum(-1)
    errors, sizes = (torch.zeros_like(wrong).scatter_add_(-1, block, v) for v in (wrong, torch.ones_like(wrong)))
    spread = (errors / sizes).gather(-1, block)
    count = torch.arange(1, rows + 1, dtype=torch.float64, device=wrong.device)
    return count / rows, spread.cumsum(-1) / count


def aurc(log_p: LogProbs, labels: Labels, score: Float[Tensor, "*B N"] | None = None) -> PerSet:
    """Compute the area under the risk-coverage curve, (1/N) Σ_k risk_k (Geifman et al., 2019, eq. 4)."""
    return risk_coverage(log_p, labels, score)[1].mean(-1)


def auroc(negative_scores: Float[Tensor, "*B N"], positive_scores: Float[Tensor, "*B M"]) -> PerSet:
    """Compute the area under the ROC curve, P(positive > negative) + P(positive = negative) / 2 (Mann-Whitney)."""
    negative, positive = _ascending(negative_scores, positive_scores)
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return (below + not_above).double().mean(-1) / (2 * negative.shape[-1])


def aupr_out(negative_scores: Float[Tensor, "*B N"], positive_scores: Float[Tensor, "*B M"]) -> PerSet:
    """Compute the average precision of finding the OOD examples, Σ_t (R_t - R_{t-1}) P_t; at chance M/(N+M)."""
    # the recall rises by 1/M at each positive, so the sum over thresholds is the mean precision over positives
    negative, positive = _ascending(negative_scores, positive_scores)
    true = positive.shape[-1] - torch.searchsorted(positive, positive)
    false = negative.shape[-1] - torch.searchsorted(negative, positive)
    return (true.double() / (true + false)).mean(-1)


def aupr_in(negative_scores: Float[Tensor, "*B N"], positive_scores: Float[Tensor, "*B M"]) -> PerSet:
    """Compute the average precision of finding the in-distribution examples by the negated score; at chance N/(N+M)."""
    return aupr_out(-positive_scores, -negative_scores)


def fpr95(negative_scores: Float[Tensor, "*B N"], positive_scores: Float[Tensor, "*B M"]) -> PerSet:
    """Compute the share of ID examples flagged by the highest threshold that flags 95 % of the OOD examples."""
    negative, positive = _ascending(negative_scores, positive_scores)
    rows = positive.shape[-1]
    first_flagged = rows - -(-95 * rows // 100)
    threshold = positive[..., first_flagged, None].contiguous()
    return 1 - torch.searchsorted(negative, threshold)[..., 0].double() / negative.shape[-1]


def _ascending(negative: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return both samples in float64, each set sorted, or refuse an empty sample, other sets or a NaN."""
    for name, scores in (("negative_scores", negative), ("positive_scores", positive)):
        if scores.ndim == 0 or scores.shape[-1] == 0 or scores.ndim > min(negative.ndim, positive.ndim):
            raise InputError(f"{name} has shape {list(scores.shape)}; give one score for each of at least one example")
        if bool(scores.isnan().any()):
            row = int(scores.isnan().nonzero()[0, -1])
            raise InputError(f"{name}: row {row} is NaN; a score must be a number")
    return negative.double().sort(-1).values, positive.to(negative.device).double().sort(-1).values
