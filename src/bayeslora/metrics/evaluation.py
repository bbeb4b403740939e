"""Scores of a prediction, each with its bootstrap interval.

Two predictors are always scored: ``draws``, the average of the draws' probabilities, and ``mean``, one pass at the
posterior mean's weights, where the prediction has it. What the draws add is the difference between the two; where that
is accuracy lost, a warning says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bayeslora.errors import InputError
from bayeslora.metrics import batched as scoring
from bayeslora.metrics import classification as metrics
from bayeslora.metrics import detection, uncertainty
from bayeslora.metrics.bootstrap import bootstrap, bootstrap_two
from bayeslora.metrics.classification import Binning, check_labels
from bayeslora.metrics.paired import lost_by_draws
from bayeslora.metrics.prediction import Prediction
from bayeslora.tasks.types import Split

Score = tuple[Callable[..., float], Callable[..., Tensor]]
"""A score of one set of examples, which checks what it is given, and the same of many sets."""

_DETECTION: dict[str, Score] = {
    "auroc": (detection.auroc, scoring.auroc),
    "aupr_out": (detection.aupr_out, scoring.aupr_out),
    "aupr_in": (detection.aupr_in, scoring.aupr_in),
    "fpr95": (detection.fpr95, scoring.fpr95),
}


@dataclass(frozen=True)
class Estimate:
    """A score and its 95 % bootstrap interval.

    Attributes:
        value: The score on the given examples.
        low: Lower end of the interval; NaN if none was computed.
        high: Upper end of the interval; NaN if none was computed.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The scores of the predictors ``mean`` and ``draws`` on one set of examples.

    Attributes:
        rows: Predictor -> score -> estimate. The scores are ``accuracy``, ``nll``, ``brier``, ``ece``, ``ece_mass``,
            ``sce``, ``aurc``, where the truth is known ``kl_to_truth``, and for each out-of-distribution set
            ``SET/auroc_entropy``, ``SET/aupr_out_entropy``, ``SET/aupr_in_entropy``, ``SET/fpr95_entropy``, for the
            draws also ``..._mutual_information``.
        n: Number of examples.
        draws: Number of draws.
        bins: Number of bins of the calibration errors.
        binning: Bins of ``ece`` and ``sce``; ``ece_mass`` always has bins of equal mass.
        resamples: Number of bootstrap resamples behind each interval.
        ood: Number of examples of each out-of-distribution set.
        warning: A sentence, if the draws are right less often than the mean by more than chance allows.
    """

    rows: dict[str, dict[str, Estimate]]
    n: int
    draws: int
    bins: int
    binning: str
    resamples: int
    ood: dict[str, int]
    warning: str | None = None

    def value(self, predictor: str, metric: str) -> float:
        """Look up one score.

        Args:
            predictor: ``mean`` or ``draws``.
            metric: Name of the score, such as ``nll``.

        Returns:
            The score without its interval.

        Raises:
            InputError: If there is no such predictor or score.
        """
        if predictor not in self.rows:
            raise InputError(f"there is no predictor {predictor!r} here; choose from {', '.join(self.rows)}.")
        if metric not in self.rows[predictor]:
            raise InputError(
                f"{predictor!r} has no score {metric!r} here; choose from {', '.join(self.rows[predictor])}."
            )
        return self.rows[predictor][metric].value

    def to_dict(self) -> dict[str, Any]:
        """Convert to what JSON can hold.

        Returns:
            The attributes as nested dictionaries; numbers that are not finite become None.
        """
        content = asdict(self)
        for scores in content["rows"].values():
            for name, estimate in scores.items():
                scores[name] = {key: number if math.isfinite(number) else None for key, number in estimate.items()}
        return content

    def table(self) -> str:
        """Lay the scores out for a terminal.

        Returns:
            One line per score and one column per predictor, as ``value [low, high]``, under a line that says what
            was scored; and the warning, if there is one.
        """
        names = list(dict.fromkeys(name for scores in self.rows.values() for name in scores))
        cells = [["", *self.rows]]
        cells += [[name, *(_cell(scores.get(name)) for scores in self.rows.values())] for name in names]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        sets = "".join(f", {name}: {count} examples" for name, count in self.ood.items())
        intervals = f"95 % intervals from {self.resamples} resamples" if self.resamples else "no intervals"
        head = f"{self.n} examples, {self.draws} draws, {self.bins} bins of equal {self.binning}, {intervals}{sets}"
        return "\n".join([head, "", *lines, *(["", f"Warning: {self.warning}."] if self.warning else [])])


def evaluate(
    prediction: Prediction,
    labels_or_split: Tensor | Split,
    ood: Prediction | Mapping[str, Prediction] | None = None,
    *,
    bins: int = 15,
    binning: Binning = "width",
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score a prediction against the right answers, and against out-of-distribution predictions.

    Args:
        prediction: What the posterior says about the examples.
        labels_or_split: Index of the right choice of each example, [N], or the split that was predicted; a split whose
            examples all have ``probs`` is also scored by the divergence from them.
        ood: Predictions of the same posterior on out-of-distribution examples, one (named ``ood``) or several by name.
        bins: Number of bins of the calibration errors.
        binning: Bins of ``ece`` and ``sce``: of equal ``width`` or ``mass``.
        resamples: Number of bootstrap resamples; 0 for no intervals.
        seed: Seed of the resampling.

    Returns:
        Every score of every predictor with its interval.

    Raises:
        InputError: If the labels do not fit the prediction or are unknown, or a setting is out of range.
    """
    if resamples < 0:
        raise InputError(f"resamples is {resamples}; give a number >= 0, where 0 means no intervals.")
    labels, truth = _answers(prediction, labels_or_split)
    sets = {"ood": ood} if isinstance(ood, Prediction) else dict(ood or {})
    table = _scores(bins, binning)
    rows: dict[str, dict[str, Estimate]] = {}
    predictors = _predictors(prediction)
    for predictor, log_p in predictors.items():
        row = {name: _estimate(score, log_p, labels, resamples, seed) for name, score in table.items()}
        if truth is not None:
            row["kl_to_truth"] = _estimate((metrics.kl_to_truth, scoring.kl_to_truth), log_p, truth, resamples, seed)
        known = _uncertainties(prediction, predictor)
        for set_name, other in sets.items():
            unknown = _uncertainties(other, predictor)
            for kind in (kind for kind in known if kind in unknown):
                for name, detect in _DETECTION.items():
                    row[f"{set_name}/{name}_{kind}"] = _separation(detect, known[kind], unknown[kind], resamples, seed)
        rows[predictor] = row
    return Evaluation(
        rows=rows,
        n=len(labels),
        draws=prediction.draws,
        bins=bins,
        binning=binning,
        resamples=resamples,
        ood={name: other.log_probs.shape[1] for name, other in sets.items()},
        warning=lost_by_draws(**predictors, labels=labels) if "mean" in predictors else None,
    )


def _scores(bins: int, binning: Binning) -> dict[str, Score]:
    """Return the scores of (log_p, labels) by name."""
    return {
        "accuracy": (metrics.accuracy, scoring.accuracy),
        "nll": (metrics.nll, scoring.nll),
        "brier": (metrics.brier, scoring.brier),
        "ece": (
            partial(metrics.ece, bins=bins, binning=binning),
            partial(scoring.ece, bins=bins, binning=binning),
        ),
        "ece_mass": (
            partial(metrics.ece, bins=bins, binning="mass"),
            partial(scoring.ece, bins=bins, binning="mass"),
        ),
        "sce": (
            partial(metrics.static_calibration_error, bins=bins, binning=binning),
            partial(scoring.static_calibration_error, bins=bins, binning=binning),
        ),
        "aurc": (detection.aurc, scoring.aurc),
    }


def _answers(prediction: Prediction, given: Tensor | Split) -> tuple[Tensor, Tensor | None]:
    """Return the labels [N] and, where every example has them, the true probabilities [N C], on the CPU.

    Raises:
        InputError: If an example has more true probabilities than there are choices.
    """
    log_p = prediction.log_probs[0].cpu()
    if isinstance(given, Tensor):
        return check_labels(log_p, given.cpu()), None
    labels = check_labels(log_p, given.labels, f"the labels of {given.name}")
    truth = torch.zeros(log_p.shape, dtype=torch.float64)
    for row, example in enumerate(given.examples):
        if example.probs is None:
            return labels, None
        if len(example.probs) > log_p.shape[1]:
            raise InputError(
                f"{given.name}: row {row} has {len(example.probs)} true probabilities, "
                f"but the prediction has {log_p.shape[1]} choices."
            )
        truth[row, : len(example.probs)] = torch.tensor(example.probs, dtype=torch.float64)
    return labels, truth


def _predictors(prediction: Prediction) -> dict[str, Tensor]:
    """Return the log-probabilities [N C] of each predictor."""
    mean = prediction.mean_log_probs
    draws = {"draws": prediction.log_p.cpu()}
    return draws if mean is None else {"mean": mean.cpu()} | draws


def _uncertainties(prediction: Prediction, predictor: str) -> dict[str, Tensor]:
    """Return the scores [N] by which a predictor tells out-of-distribution examples; none where it is not there."""
    if predictor == "draws":
        return {
            "entropy": prediction.entropy.cpu(),
            "mutual_information": prediction.mutual_information.cpu(),
        }
    mean = prediction.mean_log_probs
    return {} if mean is None else {"entropy": uncertainty.entropy(mean.cpu())}


def _estimate(score: Score, log_p: Tensor, answers: Tensor, resamples: int, seed: int) -> Estimate:
    """Return a score of predictions and its interval."""
    value = score[0](log_p, answers)
    if not resamples:
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, *bootstrap(score[1], log_p, answers, resamples=resamples, seed=seed, batched=True))


def _separation(score: Score, known: Tensor, unknown: Tensor, resamples: int, seed: int) -> Estimate:
    """Return a score of two samples and its interval."""
    value = score[0](known, unknown)
    if not resamples:
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, *bootstrap_two(score[1], known, unknown, resamples=resamples, seed=seed, batched=True))


def _cell(estimate: Estimate | None) -> str:
    """Return an estimate as text, empty where there is none."""
    if estimate is None:
        return ""
    interval = "" if math.isnan(estimate.low) else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{estimate.value:.4f}{interval}"
