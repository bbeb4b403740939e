"""How well a score separates what to trust from what not: selective answering and out-of-distribution detection.

Detection functions take ``(negative_scores [N], positive_scores [M])``, where a higher score says more
out-of-distribution: the negatives are the in-distribution (ID) examples, the positives the out-of-distribution (OOD)
ones. Equal scores are one threshold, so no result depends on the order of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics import batched as scoring
from bayeslora.metrics.classification import check_labels


def risk_coverage(
    log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"], score: Float[Tensor, " N"] | None = None
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Compute the error rate among the most confident k examples, for k = 1 ... N.

    Examples of equal score are one block: within it the errors are spread evenly, which is the expectation over the
    orders that the block could be answered in.

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        score: Higher for the examples to answer first; None: the probability of the most probable choice.

    Returns:
        ``(coverage, risk)`` in float64: coverage k/N ascending, and the error rate at that coverage.

    Raises:
        InputError: If ``score`` is not one number per example.
    """
    labels = check_labels(log_p, labels)
    ranking = log_p.amax(-1) if score is None else score.to(log_p.device)
    if ranking.shape != labels.shape or bool(ranking.isnan().any()):
        raise InputError(
            f"score has shape {list(ranking.shape)} or a NaN; give one number for each of {len(labels)} rows."
        )
    risk = scoring.risk(log_p[None], labels[None], ranking[None])[0]
    return torch.arange(1, len(labels) + 1, dtype=torch.float64, device=log_p.device) / len(labels), risk


def aurc(log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"], score: Float[Tensor, " N"] | None = None) -> float:
    """Compute the area under the risk-coverage curve, (1/N) Σ_k risk_k (Geifman et al., 2019, eq. 4).

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        score: Higher for the examples to answer first; None: the probability of the most probable choice.

    Returns:
        Area between 0 and 1, lower is better; the error rate if the order says nothing.
    """
    return float(risk_coverage(log_p, labels, score)[1].mean())


def auroc(negative_scores: Float[Tensor, " N"], positive_scores: Float[Tensor, " M"]) -> float:
    """Compute the area under the ROC curve, P(positive > negative) + P(positive = negative) / 2 (Mann-Whitney).

    Args:
        negative_scores: Scores of the in-distribution examples.
        positive_scores: Scores of the out-of-distribution examples.

    Returns:
        Area between 0 and 1; 0.5 if the score says nothing.
    """
    return float(scoring.auroc(*_checked(negative_scores, positive_scores)))


def aupr_out(negative_scores: Float[Tensor, " N"], positive_scores: Float[Tensor, " M"]) -> float:
    """Compute the average precision of finding the out-of-distribution examples, Σ_t (R_t - R_{t-1}) P_t.

    Args:
        negative_scores: Scores of the in-distribution examples.
        positive_scores: Scores of the out-of-distribution examples.

    Returns:
        Average precision with OOD as the positive class; its share M/(N+M) if the score says nothing.
    """
    return float(scoring.aupr_out(*_checked(negative_scores, positive_scores)))


def aupr_in(negative_scores: Float[Tensor, " N"], positive_scores: Float[Tensor, " M"]) -> float:
    """Compute the average precision of finding the in-distribution examples by the negated score.

    Args:
        negative_scores: Scores of the in-distribution examples.
        positive_scores: Scores of the out-of-distribution examples.

    Returns:
        Average precision with ID as the positive class; its share N/(N+M) if the score says nothing.
    """
    return aupr_out(-positive_scores, -negative_scores)


def fpr95(negative_scores: Float[Tensor, " N"], positive_scores: Float[Tensor, " M"]) -> float:
    """Compute the share of ID examples flagged when at least 95 % of the OOD examples are flagged (OOD positive).

    The threshold is the highest score t for which the share of OOD scores >= t is at least 0.95.

    Args:
        negative_scores: Scores of the in-distribution examples.
        positive_scores: Scores of the out-of-distribution examples.

    Returns:
        False positive rate at 95 % true positive rate, lower is better.
    """
    return float(scoring.fpr95(*_checked(negative_scores, positive_scores)))


def _checked(negative: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return both samples with a leading axis of one.

    Raises:
        InputError: If a sample is empty, has more than one axis or a NaN.
    """
    for name, scores in (("negative_scores", negative), ("positive_scores", positive)):
        if scores.ndim != 1 or len(scores) == 0:
            raise InputError(f"{name} has shape {list(scores.shape)}; give one score for each of at least one example.")
        if bool(scores.isnan().any()):
            raise InputError(f"{name}: row {int(scores.isnan().nonzero()[0])} is NaN; a score must be a number.")
    return negative[None], positive.to(negative.device)[None]
