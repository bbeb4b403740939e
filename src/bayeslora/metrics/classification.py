"""How good predicted probabilities are, given the right answers: pure functions of ``(log_p [N C], labels [N])``.

``log_p`` holds natural logarithms, ``-inf`` for choices that an example does not have; such a choice has probability 0
everywhere below. Sums run in float64 and every score is a Python float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics import batched as scoring

Binning = Literal["width", "mass"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: the predictions grouped by confidence.

    Bin b holds the confidences in (edges[b], edges[b + 1]]; the first one also those equal to its lower edge.

    Attributes:
        edges: Edges of the bins, ascending, [bins + 1].
        confidence: Mean confidence of each bin, NaN for an empty one.
        accuracy: Share of right answers of each bin, NaN for an empty one.
        count: Number of examples of each bin.
    """

    edges: Float[Tensor, " edges"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]
    count: Int[Tensor, " bins"]


def check_labels(log_p: Tensor, labels: Tensor, where: str = "labels") -> Tensor:
    """Refuse predictions and labels that no score is defined for.

    Args:
        log_p: Log-probabilities, [N C].
        labels: Index of the right choice, [N].
        where: What the labels are, for the message.

    Returns:
        The labels as int64 on the device of ``log_p``.

    Raises:
        InputError: If the shapes do not fit, a probability is NaN, or a label is unknown (-1) or out of range.
    """
    if log_p.ndim != 2 or log_p.numel() == 0:
        raise InputError(f"log_p has shape {list(log_p.shape)}; give [examples, choices] with at least one of each.")
    rows, choices = log_p.shape
    if labels.shape != (rows,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"{where} must be {rows} integers, one per row of the predictions, "
            f"but has shape {list(labels.shape)} and type {labels.dtype}."
        )
    labels = labels.to(log_p.device, torch.long)
    if bool(((labels < 0) | (labels >= choices)).any()):
        row = int(((labels < 0) | (labels >= choices)).nonzero()[0])
        value = int(labels[row])
        if value == -1:
            raise InputError(f"{where}: row {row} has no known answer (-1); leave such rows out before scoring.")
        raise InputError(
            f"{where}: row {row} is {value}, but the predictions have {choices} choices (0-{choices - 1})."
        )
    if bool(log_p.isnan().any()):
        row = int(log_p.isnan().any(-1).nonzero()[0])
        raise InputError(
            f"log_p: row {row} is NaN; the model's output overflowed, predict again in float32 or bfloat16."
        )
    return labels


def accuracy(log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Compute the share of examples whose most probable choice is the right one.

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.

    Returns:
        Accuracy between 0 and 1; choices that tie count as the first of them.
    """
    labels = check_labels(log_p, labels)
    return float(scoring.accuracy(log_p[None], labels[None]))


def nll(log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Compute the mean negative log-likelihood of the right choices.

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.

    Returns:
        Negative log-likelihood in nats per example; ``inf`` where a right choice has probability 0.
    """
    labels = check_labels(log_p, labels)
    return float(scoring.nll(log_p[None], labels[None]))


def brier(log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Compute the Brier score (1/N) Σ_n Σ_c (p_nc - 1[y_n = c])², summed over the choices (Brier, 1950, eq. 2).

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.

    Returns:
        Brier score between 0 and 2.
    """
    labels = check_labels(log_p, labels)
    return float(scoring.brier(log_p[None], labels[None]))


def reliability(
    log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"], bins: int = 15, binning: Binning = "width"
) -> Reliability:
    """Group the examples by the probability of their most probable choice.

    Bins of equal width divide [0, 1]. Bins of equal mass end at the quantiles of the confidences: they hold equally
    many examples to within one, except that equal confidences share a bin, so that the order of the rows is irrelevant.

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        bins: Number of bins.
        binning: ``width`` or ``mass``.

    Returns:
        Edges, mean confidence, accuracy and number of examples of each bin.
    """
    labels = check_labels(log_p, labels)
    best, answer = log_p.max(-1)
    hit = (answer == labels).double()
    _check_bins(bins, binning)
    edges, confidence, hits, count = scoring.binned(best.double().exp()[None], hit[None], bins, binning)
    return Reliability(edges[0], confidence[0] / count[0], hits[0] / count[0], count[0].long())


def ece(log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"], bins: int = 15, binning: Binning = "width") -> float:
    """Compute the expected calibration error Σ_b (n_b/N) |accuracy_b - confidence_b| of the most probable choice.

    Guo et al., 2017, *On Calibration of Modern Neural Networks*, eq. 3, with their bins ((b-1)/B, b/B] for ``width``.

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        bins: Number of bins.
        binning: ``width`` or ``mass``, as in `reliability`.

    Returns:
        Calibration error between 0 and 1.
    """
    labels = check_labels(log_p, labels)
    _check_bins(bins, binning)
    return float(scoring.ece(log_p[None], labels[None], bins, binning))


def classwise_calibration_error(
    log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"], bins: int = 15, binning: Binning = "width"
) -> Float[Tensor, " C"]:
    """Compute for each class c the calibration error of p_c as the probability of the event "the answer is c".

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        bins: Number of bins.
        binning: ``width`` or ``mass``; masses are those of each class's own probabilities.

    Returns:
        Σ_b (n_bc/N) |frequency_bc - mean p_bc| of each class, float64.
    """
    labels = check_labels(log_p, labels)
    probs = log_p.double().exp().T.contiguous()
    event = (labels == torch.arange(len(probs), device=labels.device)[:, None]).double()
    _check_bins(bins, binning)
    _, expected, happened, _ = scoring.binned(probs, event, bins, binning)
    return (happened - expected).abs().sum(-1) / len(labels)


def static_calibration_error(
    log_p: Float[Tensor, "N C"], labels: Int[Tensor, " N"], bins: int = 15, binning: Binning = "width"
) -> float:
    """Average the classwise calibration error over the classes (Nixon et al., 2019, *Measuring Calibration*, eq. 3).

    Args:
        log_p: Predicted log-probabilities.
        labels: Index of the right choice.
        bins: Number of bins.
        binning: ``width`` or ``mass``, as in `classwise_calibration_error`.

    Returns:
        (1/C) Σ_c of the classwise calibration errors.
    """
    return float(classwise_calibration_error(log_p, labels, bins, binning).mean())


def kl_to_truth(log_p: Float[Tensor, "N C"], true_probs: Float[Tensor, "N C"]) -> float:
    """Compute the mean divergence KL(truth || predicted) = Σ_c t_c (log t_c - log p_c), where 0 log 0 = 0.

    Args:
        log_p: Predicted log-probabilities.
        true_probs: The probabilities that the labels were drawn from, 0 for choices that an example does not have.

    Returns:
        Divergence in nats per example; ``inf`` where a possible choice has predicted probability 0.

    Raises:
        InputError: If the shapes differ or a row of ``true_probs`` is not a distribution.
    """
    if log_p.ndim != 2 or log_p.numel() == 0 or true_probs.shape != log_p.shape:
        raise InputError(f"true_probs has shape {list(true_probs.shape)}; the predictions have {list(log_p.shape)}.")
    truth = true_probs.to(log_p.device, torch.float64)
    sound = (truth >= 0).all(-1) & ((truth.sum(-1) - 1).abs() < 1e-3)
    if not bool(sound.all()):
        row = int((~sound).nonzero()[0])
        raise InputError(f"true_probs: row {row} is not a distribution; give probabilities >= 0 that sum to 1.")
    return float(scoring.kl_to_truth(log_p[None], truth[None]))


def _check_bins(bins: int, binning: str) -> None:
    """Refuse no bins, or an unknown binning."""
    if bins < 1 or binning not in get_args(Binning):
        raise InputError(f"bins={bins}, binning={binning!r}: give at least one bin and binning 'width' or 'mass'.")
