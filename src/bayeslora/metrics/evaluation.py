"""Scores of a prediction, each with its bootstrap interval.

Two predictors are always scored: ``draws``, the average of the draws' probabilities, and ``mean``, one pass at the
posterior mean's weights, where the prediction has it. What the draws add is the difference between the two: it says
whether they are worth their passes, and where it is accuracy lost, there is a warning. The untuned ``base`` is a third
one where the prediction has its answers, and a witness for the other two, which it tells foreign data by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics import uncertainty
from bayeslora.metrics.bootstrap import Sample, bootstrap
from bayeslora.metrics.classification import Binning, check_labels
from bayeslora.metrics.measures import UNCERTAINTIES, Measure, measures
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.recommendation import Recommendation, recommended
from bayeslora.tasks.types import Split

Scored = tuple[dict[str, Measure], list[Sample]]
"""Measures by the names of their scores, and the samples that they all take."""


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
    """The scores of the predictors ``mean``, ``draws`` and ``base`` on one set of examples.

    Attributes:
        rows: Predictor -> score -> estimate. The scores are ``accuracy``, ``nll``, ``brier``, ``ece``, ``ece_mass``,
            ``sce``, ``aurc``, where the truth is known ``kl_to_truth``, and for each out-of-distribution set
            ``SET/auroc_entropy``, ``SET/aupr_out_entropy``, ``SET/aupr_in_entropy``, ``SET/fpr95_entropy``, for the
            draws also ``..._mutual_information``, and with the base's answers, for mean and draws,
            ``..._likelihood_ratio`` and ``..._drift``.
        n: Number of examples.
        draws: Number of draws.
        bins: Number of bins of the calibration errors.
        binning: Bins of ``ece`` and ``sce``; ``ece_mass`` always has bins of equal mass.
        resamples: Number of bootstrap resamples behind each interval.
        ood: Number of examples of each out-of-distribution set.
        warning: A sentence, if the draws are right less often than the mean by more than chance allows.
        recommendation: What the draws add to the mean, and whether to take them; None where that cannot be told.
    """

    rows: dict[str, dict[str, Estimate]]
    n: int
    draws: int
    bins: int
    binning: str
    resamples: int
    ood: dict[str, int]
    warning: str | None = None
    recommendation: Recommendation | None = None

    def value(self, predictor: str, metric: str) -> float:
        """Look up one score.

        Args:
            predictor: ``mean``, ``draws`` or ``base``.
            metric: Name of the score, such as ``nll``.

        Returns:
            The score without its interval.

        Raises:
            InputError: If there is no such predictor or score.
        """
        if predictor not in self.rows:
            raise InputError(f"there is no predictor {predictor!r} here; choose from {', '.join(self.rows)}")
        if metric not in self.rows[predictor]:
            raise InputError(
                f"{predictor!r} has no score {metric!r} here; choose from {', '.join(self.rows[predictor])}"
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
            was scored; and the warning and the recommendation, if there are any.
        """
        names = list(dict.fromkeys(name for scores in self.rows.values() for name in scores))
        cells = [["", *self.rows]]
        cells += [[name, *(_cell(scores.get(name)) for scores in self.rows.values())] for name in names]
        sets = "".join(f", {name}: {count} examples" for name, count in self.ood.items())
        intervals = f"95 % intervals from {self.resamples} resamples" if self.resamples else "no intervals"
        head = f"{self.n} examples, {self.draws} draws, {self.bins} bins of equal {self.binning}, {intervals}{sets}"
        notes = [f"Warning: {self.warning}."] if self.warning else []
        notes += [f"Cost: {self.recommendation.text}."] if self.recommendation is not None else []
        return "\n".join([head, "", *aligned(cells), *(["", *notes] if notes else [])])


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
        raise InputError(f"resamples is {resamples}; give a number >= 0, where 0 means no intervals")
    labels, truth = _answers(prediction, labels_or_split)
    sets = {"ood": ood} if isinstance(ood, Prediction) else dict(ood or {})
    groups = scored(measures(bins, binning), prediction, sets, labels, truth)
    return Evaluation(
        rows={
            predictor: {name: e for group in of for name, e in estimates(*group, resamples, seed).items()}
            for predictor, of in groups.items()
        },
        n=len(labels),
        draws=prediction.draws,
        bins=bins,
        binning=binning,
        resamples=resamples,
        ood={name: other.log_probs.shape[1] for name, other in sets.items()},
        warning=_lost_by_draws(prediction, labels),
        recommendation=recommended(prediction, labels, resamples=resamples, seed=seed),
    )


def scored(
    table: Mapping[str, Measure],
    prediction: Prediction,
    ood: Mapping[str, Prediction],
    labels: Int[Tensor, " N"],
    truth: Float[Tensor, "N C"] | None = None,
) -> dict[str, list[Scored]]:
    """Return what ``draws``, and where they are there ``mean`` and ``base``, are scored by, all on the CPU."""
    by_need = {need: {k: m for k, m in table.items() if m.needs == need} for need in ("labels", "probs", "ood")}
    others = {name: _outputs(other) for name, other in ood.items()}
    groups: dict[str, list[Scored]] = {}
    for predictor, outputs in _outputs(prediction).items():
        groups[predictor] = [(by_need["labels"], [[outputs["log_p"], labels]])]
        if truth is not None:
            groups[predictor].append((by_need["probs"], [[outputs["log_p"], truth]]))
        for name, by_predictor in others.items():
            unknown = by_predictor.get(predictor, {})
            for kind in (kind for kind in UNCERTAINTIES if kind in outputs and kind in unknown):
                detection = {f"{name}/{measure}_{kind}": m for measure, m in by_need["ood"].items()}
                groups[predictor].append((detection, [[outputs[kind]], [unknown[kind]]]))
    return groups


def aligned(cells: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """Return a table's lines with each column as wide as its widest cell; ``numbers`` end where their column ends."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded) if numbers else "  ".join(padded).rstrip())
    return lines


def mcnemar(only_one: int, only_other: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (1947) of what each predictor alone gets right."""
    differing, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**differing)


def _outputs(prediction: Prediction) -> dict[str, dict[str, Tensor]]:
    """Return each predictor's log-probabilities, ``log_p``, and the uncertainties that it has."""
    log_probs = {"mean": prediction.mean_log_probs, "draws": prediction.log_p, "base": prediction.base_log_probs}
    outputs = {
        name: {"log_p": log_p.cpu(), "entropy": uncertainty.entropy(log_p.cpu())}
        for name, log_p in log_probs.items()
        if log_p is not None
    }
    outputs["draws"]["mutual_information"] = prediction.mutual_information.cpu()
    if "base" in outputs:
        base = outputs["base"]["log_p"]
        for of in (outputs[name] for name in ("mean", "draws") if name in outputs):
            of["likelihood_ratio"] = -uncertainty.likelihood_ratio(of["log_p"], base)
            of["drift"] = -uncertainty.drift(of["log_p"], base)
    return outputs


def _lost_by_draws(prediction: Prediction, labels: Int[Tensor, " N"]) -> str | None:
    """Say so, with advice, if the draws' average is right less often than the mean, by more than chance allows."""
    if prediction.mean_log_probs is None:
        return None
    by_mean, by_draws = (log_p.cpu().argmax(-1) == labels for log_p in (prediction.mean_log_probs, prediction.log_p))
    lost, won = int((by_mean & ~by_draws).sum()), int((by_draws & ~by_mean).sum())
    if lost <= won or mcnemar(lost, won) >= 0.05:
        return None
    of_draws, of_mean = (float(right.double().mean()) for right in (by_draws, by_mean))
    return (
        f"the draws cost accuracy: {of_draws:.3f} against {of_mean:.3f} of the mean, more than a paired 95 % interval "
        f"allows ({lost} right answers lost, {won} won); the noise is too wide for this model, so narrow it with a "
        "lower temperature (bayeslora.tempered(posterior, 1 / 4), --temperature 0.25) or train colder"
    )


def _answers(prediction: Prediction, answers: Tensor | Split) -> tuple[Int[Tensor, " N"], Float[Tensor, "N C"] | None]:
    """Return the labels and, where every example has them, the true probabilities, on the CPU."""
    log_p = prediction.log_probs[0].cpu()
    if isinstance(answers, Tensor):
        return check_labels(log_p, answers.cpu()), None
    labels = check_labels(log_p, answers.labels, f"the labels of {answers.name}")
    truth = [example.probs for example in answers.examples if example.probs is not None]
    if len(truth) < len(labels):
        return labels, None
    choices = log_p.shape[1]
    for row, probs in enumerate(truth):
        if len(probs) > choices:
            raise InputError(
                f"{answers.name}: row {row} has {len(probs)} true probabilities, "
                f"but the prediction has {choices} choices"
            )
    return labels, torch.tensor([[*p, *[0.0] * (choices - len(p))] for p in truth], dtype=torch.float64)


def estimates(
    chosen: Mapping[str, Measure], samples: Sequence[Sample], resamples: int, seed: int
) -> dict[str, Estimate]:
    """Return measures of the same samples with their intervals; every measure sees the same resamples."""

    def scores(*arrays: Tensor) -> Float[Tensor, "*B measures"]:
        """Return each measure of samples."""
        return torch.stack([measure.score(*arrays) for measure in chosen.values()], -1)

    values = scores(*chain.from_iterable(samples))
    low = high = torch.full_like(values, math.nan)
    if resamples:
        low, high = bootstrap(scores, *samples, resamples=resamples, seed=seed)
    numbers = zip(chosen, values.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: Estimate(*estimate) for name, *estimate in numbers}


def _cell(estimate: Estimate | None) -> str:
    """Return an estimate as text, empty where there is none."""
    if estimate is None:
        return ""
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{estimate.value:.4f}{ends}"
