"""Measures of predicted probabilities against the right answers, on batches of test sets.

Every measure takes ``log_p [*B N C]`` and ``labels [*B N]`` and returns one float64 number for each of the *B sets; *B
is empty for a single set, and the bootstrap's resamples are R sets. ``log_p`` holds natural logarithms, ``-inf`` for
choices that an example does not have; such a choice has probability 0 everywhere below. Sums run in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError

Binning = Literal["width", "mass"]
LogProbs = Float[Tensor, "*B N C"]
Labels = Int[Tensor, "*B N"]
PerSet = Float[Tensor, " *B"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: the predictions grouped by confidence.

    Bin b holds the confidences in (edges[b], edges[b + 1]]; the first one also those equal to its lower edge. Mean
    confidence and share of right answers are NaN for an empty bin.
    """

    edges: Float[Tensor, "*B edges"]
    confidence: Float[Tensor, "*B bins"]
    accuracy: Float[Tensor, "*B bins"]
    count: Int[Tensor, "*B bins"]


def check_labels(log_p: Tensor, labels: Tensor, where: str = "labels") -> Tensor:
    """Return labels [*B N] as int64 on the device of ``log_p`` [*B N C]; refuse what no measure is defined for."""
    if log_p.numel() == 0 or not 2 <= log_p.ndim <= max(2, labels.ndim + 1):
        raise InputError(f"log_p has shape {list(log_p.shape)}; give [examples, choices] with at least one of each")
    rows, choices = log_p.shape[-2:]
    if labels.shape != log_p.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(
            f"{where} must be {rows} integers, one per row of the predictions, "
            f"but has shape {list(labels.shape)} and type {labels.dtype}"
        )
    labels = labels.to(log_p.device, torch.long)
    unknown = (labels < 0) | (labels >= choices)
    if bool(unknown.any()):
        row, value = _first_row(unknown), int(labels[unknown][0])
        if value == -1:
            raise InputError(f"{where}: row {row} has no known answer (-1); leave such rows out before scoring")
        raise InputError(f"{where}: row {row} is {value}, but the predictions have {choices} choices (0-{choices - 1})")
    if bool(log_p.isnan().any()):
        raise InputError(
            f"log_p: row {_first_row(log_p.isnan().any(-1))} is NaN; the model's output overflowed, predict again in "
            "float32 or bfloat16"
        )
    return labels


def accuracy(log_p: LogProbs, labels: Labels) -> PerSet:
    """Compute the share of examples whose most probable choice, the first where some tie, is the right one."""
    labels = check_labels(log_p, labels)
    return (log_p.argmax(-1) == labels).double().mean(-1)


def nll(log_p: LogProbs, labels: Labels) -> PerSet:
    """Compute the mean negative log-likelihood in nats; ``inf`` where a right choice has probability 0."""
    labels = check_labels(log_p, labels)
    return -log_p.gather(-1, labels[..., None]).squeeze(-1).double().mean(-1)


def brier(log_p: LogProbs, labels: Labels) -> PerSet:
    """Compute (1/N) Σ_n Σ_c (p_nc - 1[y_n = c])², between 0 and 2, summed over the choices (Brier, 1950, eq. 2)."""
    labels = check_labels(log_p, labels)
    probs = log_p.double().exp()
    right = probs.gather(-1, labels[..., None]).squeeze(-1)
    return (probs.square().sum(-1) - 2 * right + 1).mean(-1)


def reliability(log_p: LogProbs, labels: Labels, bins: int = 15, binning: Binning = "width") -> Reliability:
    """Return the examples grouped by the probability of their most probable choice."""
    confidence, hit = _most_probable(log_p, check_labels(log_p, labels))
    edges, expected, happened, count = _binned(confidence, hit, bins, binning)
    return Reliability(edges, expected / count, happened / count, count.long())


def ece(log_p: LogProbs, labels: Labels, bins: int = 15, binning: Binning = "width") -> PerSet:
    """Compute the expected calibration error Σ_b (n_b/N) |accuracy_b - confidence_b| (Guo et al., 2017, eq. 3)."""
    return _calibration_error(*_most_probable(log_p, check_labels(log_p, labels)), bins, binning)


def classwise_calibration_error(
    log_p: LogProbs, labels: Labels, bins: int = 15, binning: Binning = "width"
) -> Float[Tensor, "*B C"]:
    """Compute for each class c, with bins of its own, the calibration error of p_c as the probability of answer c."""
    labels = check_labels(log_p, labels)
    happened = functional.one_hot(labels, log_p.shape[-1]).double()
    return _calibration_error(log_p.double().exp().mT, happened.mT, bins, binning)


def static_calibration_error(log_p: LogProbs, labels: Labels, bins: int = 15, binning: Binning = "width") -> PerSet:
    """Average the classwise calibration error over the classes (Nixon et al., 2019, *Measuring Calibration*, eq. 3)."""
    return classwise_calibration_error(log_p, labels, bins, binning).mean(-1)


def kl_to_truth(log_p: LogProbs, true_probs: LogProbs) -> PerSet:
    """Compute the mean KL(truth || predicted) = Σ_c t_c (log t_c - log p_c) in nats, where 0 log 0 = 0."""
    # inf where a possible choice has predicted probability 0
    if log_p.ndim < 2 or log_p.numel() == 0 or true_probs.shape != log_p.shape:
        raise InputError(f"true_probs has shape {list(true_probs.shape)}; the predictions have {list(log_p.shape)}")
    truth = true_probs.to(log_p.device, torch.float64)
    sound = (truth >= 0).all(-1) & ((truth.sum(-1) - 1).abs() < 1e-3)
    if not bool(sound.all()):
        row = _first_row(~sound)
        raise InputError(f"true_probs: row {row} is not a distribution; give probabilities >= 0 that sum to 1")
    cross = torch.where(truth > 0, truth * log_p.double(), 0.0)
    return (torch.xlogy(truth, truth) - cross).sum(-1).mean(-1)


def _most_probable(log_p: LogProbs, labels: Labels) -> tuple[Float[Tensor, "*B N"], Float[Tensor, "*B N"]]:
    """Return the probability of the most probable choice, and 1 where it is the right one."""
    best, answer = log_p.max(-1)
    return best.double().exp(), (answer == labels).double()


def _calibration_error(
    confidence: Float[Tensor, "*B N"], hit: Float[Tensor, "*B N"], bins: int, binning: Binning
) -> PerSet:
    """Return Σ_b |hits_b − confidence_b| / N for probabilities of events and whether these happened."""
    _, expected, happened, _ = _binned(confidence, hit, bins, binning)
    return (happened - expected).abs().sum(-1) / confidence.shape[-1]


def _binned(
    confidence: Float[Tensor, "*B N"], hit: Float[Tensor, "*B N"], bins: int, binning: Binning
) -> tuple[Float[Tensor, "*B edges"], Float[Tensor, "*B bins"], Float[Tensor, "*B bins"], Float[Tensor, "*B bins"]]:
    """Return the edges of the bins and, bin by bin, the sums of confidence, of hits and of 1; each set for itself."""
    # Bins of equal width divide [0, 1]. Bins of equal mass end at the quantiles of the confidences: they hold equally
    # many examples to within one, except that equal confidences share a bin, whatever the order of the rows.
    if bins < 1 or binning not in get_args(Binning):
        raise InputError(f"bins={bins}, binning={binning!r}: give at least one bin and binning 'width' or 'mass'")
    *sets, rows = confidence.shape
    if binning == "width":
        edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device).repeat(*sets, 1)
    else:
        last = [-(-rows * k // bins) - 1 for k in range(1, bins + 1)]
        edges = confidence.sort(-1).values[..., [0, *last]]
    edges = edges.reshape(*sets, bins + 1)
    index = torch.searchsorted(edges[..., 1:-1].contiguous(), confidence.contiguous())
    expected, happened, count = (
        confidence.new_zeros(*sets, bins).scatter_add_(-1, index, values)
        for values in (confidence, hit, torch.ones_like(hit))
    )
    return edges, expected, happened, count


def _first_row(bad: Tensor) -> int:
    """Return the number of the first bad row in [*B N]."""
    return int(bad.nonzero()[0, -1])
