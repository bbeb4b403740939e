"""Scores of a prediction, each with its bootstrap interval.

Two predictors are always scored: ``draws``, the average of the draws' probabilities, and ``mean``, one pass at the
posterior mean's weights, where the prediction has it. What the draws add is the difference between the two; where that
is accuracy lost, a warning says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics import uncertainty
from bayeslora.metrics.bootstrap import Sample, interval, resampled
from bayeslora.metrics.classification import Binning, check_labels
from bayeslora.metrics.layout import aligned
from bayeslora.metrics.mcnemar import lost_by_draws
from bayeslora.metrics.measures import Measure, measures
from bayeslora.metrics.prediction import Prediction
from bayeslora.tasks.types import Split


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

    def to_dict(self) -> dict[str, object]:
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
        sets = "".join(f", {name}: {count} examples" for name, count in self.ood.items())
        intervals = f"95 % intervals from {self.resamples} resamples" if self.resamples else "no intervals"
        head = f"{self.n} examples, {self.draws} draws, {self.bins} bins of equal {self.binning}, {intervals}{sets}"
        return "\n".join([head, "", *aligned(cells), *(["", f"Warning: {self.warning}."] if self.warning else [])])


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
    table = measures(bins, binning)
    by_need = {need: {k: m for k, m in table.items() if m.needs == need} for need in ("labels", "probs", "ood")}
    estimates = partial(_estimates, resamples=resamples, seed=seed)
    rows: dict[str, dict[str, Estimate]] = {}
    log_ps = predictors(prediction)
    for predictor, log_p in log_ps.items():
        row = estimates(by_need["labels"], [log_p, labels])
        if truth is not None:
            row |= estimates(by_need["probs"], [log_p, truth])
        known = uncertainties(prediction, predictor)
        for set_name, other in sets.items():
            unknown = uncertainties(other, predictor)
            for kind in (kind for kind in known if kind in unknown):
                separations = estimates(by_need["ood"], [known[kind]], [unknown[kind]])
                row |= {f"{set_name}/{name}_{kind}": estimate for name, estimate in separations.items()}
        rows[predictor] = row
    return Evaluation(
        rows=rows,
        n=len(labels),
        draws=prediction.draws,
        bins=bins,
        binning=binning,
        resamples=resamples,
        ood={name: other.log_probs.shape[1] for name, other in sets.items()},
        warning=lost_by_draws(**log_ps, labels=labels) if "mean" in log_ps else None,
    )


def predictors(prediction: Prediction) -> dict[str, Float[Tensor, "N C"]]:
    """Return the log-probabilities of ``mean``, where the prediction has it, and ``draws``, on the CPU."""
    mean = prediction.mean_log_probs
    draws = {"draws": prediction.log_p.cpu()}
    return draws if mean is None else {"mean": mean.cpu()} | draws


def uncertainties(prediction: Prediction, predictor: str) -> dict[str, Float[Tensor, " N"]]:
    """Return the scores by which a predictor tells out-of-distribution examples; none where it is missing."""
    if predictor == "draws":
        return {"entropy": prediction.entropy.cpu(), "mutual_information": prediction.mutual_information.cpu()}
    mean = prediction.mean_log_probs
    return {} if mean is None else {"entropy": uncertainty.entropy(mean.cpu())}


def _answers(prediction: Prediction, answers: Tensor | Split) -> tuple[Int[Tensor, " N"], Float[Tensor, "N C"] | None]:
    """Return the labels and, where every example has them, the true probabilities, on the CPU."""
    log_p = prediction.log_probs[0].cpu()
    if isinstance(answers, Tensor):
        return check_labels(log_p, answers.cpu()), None
    labels = check_labels(log_p, answers.labels, f"the labels of {answers.name}")
    truth = torch.zeros(log_p.shape, dtype=torch.float64)
    for row, example in enumerate(answers.examples):
        if example.probs is None:
            return labels, None
        if len(example.probs) > log_p.shape[1]:
            raise InputError(
                f"{answers.name}: row {row} has {len(example.probs)} true probabilities, "
                f"but the prediction has {log_p.shape[1]} choices."
            )
        truth[row, : len(example.probs)] = torch.tensor(example.probs, dtype=torch.float64)
    return labels, truth


def _estimates(table: Mapping[str, Measure], *samples: Sample, resamples: int, seed: int) -> dict[str, Estimate]:
    """Return measures of the same samples with their intervals; every measure sees the same resamples."""

    def scores(*arrays: Tensor) -> Float[Tensor, "*B measures"]:
        return torch.stack([measure.score(*arrays) for measure in table.values()], -1)

    values = scores(*(array for sample in samples for array in sample))
    low = high = torch.full_like(values, math.nan)
    if resamples:
        low, high = interval(resampled(scores, *samples, resamples=resamples, seed=seed))
    numbers = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: Estimate(*estimate) for name, estimate in zip(table, numbers, strict=True)}


def _cell(estimate: Estimate | None) -> str:
    """Return an estimate as text, empty where there is none."""
    if estimate is None:
        return ""
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{estimate.value:.4f}{ends}"
