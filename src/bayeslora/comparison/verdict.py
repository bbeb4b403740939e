"""What a comparison shows, in sentences made of its numbers: which method cured, which did not, what to try next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics import batched as scoring
from bayeslora.metrics.bootstrap import paired_bootstrap
from bayeslora.metrics.classification import accuracy, ece, kl_to_truth
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.prediction import Prediction

Outcome = Literal["reference", "cured", "better", "same", "worse"]

HALF, POINTS = 0.5, 0.02
"""Cured is what has at most half of the reference's calibration error at no more than two points of accuracy."""

CALM = 0.05
"""A predictor is over-confident if what it says is that much above how often it is right."""

ADVICE = {
    "ensemble": "An ensemble cures what its members disagree on: train more members, or members of ivon or blob.",
    "swag": "SWAG's spread is the path at its constant learning rate: raise swag.learning_rate.",
    "multiswag": "SWAG's spread is the path at its constant learning rate: raise multiswag.learning_rate.",
    "blob": "BLoB's noise is set by relative_spread and its prior by temperature: raise either, or use update=elbo.",
    "ivon": "IVON's noise is set by sigma0 and its prior by temperature: raise either.",
    "temperature": "Temperature scaling needs validation rows like those to come: give it more.",
}
"""What to change of a method that did not cure, by its name."""


@dataclass(frozen=True)
class Verdict:
    """What one predictor shows beside the reference.

    Attributes:
        name: The method.
        says: Mean confidence.
        right: Accuracy.
        error: Expected calibration error, 15 bins.
        divergence: Mean KL(truth ‖ predicted) in nats, where the truth is known.
        detection: AUROC of telling the other data by entropy, if there are other data.
        outcome: ``reference``; ``cured``: at most half of the reference's calibration error, at most two points of
            accuracy lost, and where the truth is known closer to it than a guess; ``better`` and ``worse``: the 95 %
            paired bootstrap interval of the errors' difference is on one side of 0, or more than two points of
            accuracy are lost beyond chance; else ``same``.
    """

    name: str
    says: float
    right: float
    error: float
    divergence: float | None
    detection: float | None
    outcome: Outcome


def verdicts(
    predictions: Mapping[str, Prediction],
    labels: Int[Tensor, " N"],
    ood: Mapping[str, Prediction] | None = None,
    truth: Float[Tensor, "N C"] | None = None,
    *,
    resamples: int = 500,
) -> list[Verdict]:
    """Judge predictors by the first of them.

    Args:
        predictions: Predictor -> its prediction of the same N examples; the first is the reference.
        labels: Index of the right choice of each example.
        ood: Predictor -> its prediction of other data.
        truth: True probabilities, where they are known.
        resamples: Bootstrap resamples of the test rows.

    Returns:
        A verdict for each.

    Raises:
        InputError: If there is no predictor.
    """
    if not predictions:
        raise InputError("there is nothing to judge; give at least one predictor with its prediction")
    found: list[Verdict] = []
    first = next(iter(predictions.values())).log_p
    for name, prediction in predictions.items():
        log_p = prediction.log_p
        other = None if ood is None or name not in ood else auroc(prediction.entropy, ood[name].entropy)
        verdict = Verdict(
            name,
            float(prediction.confidence.mean()),
            accuracy(log_p, labels),
            ece(log_p, labels),
            None if truth is None else kl_to_truth(log_p, truth),
            other,
            "reference",
        )
        if found:
            verdict = _judged(verdict, found[0], first, log_p, labels, truth, resamples)
        found.append(verdict)
    return found


def _judged(
    own: Verdict, reference: Verdict, first: Tensor, log_p: Tensor, labels: Tensor, truth: Tensor | None, resamples: int
) -> Verdict:
    """Return a verdict with its outcome."""

    def difference(score: object) -> tuple[float, float]:
        """Return the interval of a score's difference from the reference's."""
        return paired_bootstrap(score, [log_p, labels], [first, labels], resamples=resamples, batched=True)  # type: ignore[arg-type]

    lost = reference.right - own.right > POINTS
    knows = truth is None or own.divergence is None or own.divergence < guess(truth)
    outcome: Outcome = "same"
    if own.error <= HALF * reference.error and not lost and knows:
        outcome = "cured"
    else:
        low, high = difference(partial(scoring.ece, bins=15))
        if low > 0 or (lost and difference(scoring.accuracy)[1] < 0):
            outcome = "worse"
        elif high < 0:
            outcome = "better"
    return replace(own, outcome=outcome)


def guess(truth: Float[Tensor, "N C"]) -> float:
    """Return how far one is from the truth who holds all choices for equally likely.

    Args:
        truth: True probabilities; 0 for choices that an example lacks.

    Returns:
        The mean divergence in nats.
    """
    there = truth > 0
    even = there.double() / there.sum(-1, keepdim=True)
    return kl_to_truth(even.log(), truth)


def in_words(
    found: Sequence[Verdict],
    even: float | None = None,
    other: str = "the other data",
    settings: Mapping[str, str] | None = None,
) -> list[str]:
    """Return what the verdicts show: a sentence for each, and what follows from them.

    Args:
        found: Verdicts, the reference first.
        even: The divergence of a guess from the truth, where that is known.
        other: What the other data are.
        settings: Predictor -> the settings that it has beside the defaults, as on the command line.

    Returns:
        The lines.
    """
    reference, rest = found[0], found[1:]
    lines = [_line(verdict) for verdict in found]
    if even is not None:
        lines.append(f"(All choices held for equally likely: KL {even:.2f}.)")
    excess = reference.says - reference.right
    if excess < CALM:
        lines.append(f"{reference.name} is hardly over-confident here, so there is little to cure.")
    else:
        lines.append(
            f"{reference.name} is over-confident by {100 * excess:.0f} points. Cured (at most half of its calibration "
            f"error, at most two points of accuracy lost): {_names(rest, 'cured')}. Better, but not cured: "
            f"{_names(rest, 'better')}. No difference beyond chance: {_names(rest, 'same')}. Worse: "
            f"{_names(rest, 'worse')}."
        )
        lines += _next(rest, even is not None, settings or {})
    known = [v for v in found if v.detection is not None]
    if known and reference.detection is not None:
        best = max(known, key=lambda v: v.detection or 0.0)
        lines.append(
            f"Told from the test rows by entropy, {other}: AUROC {reference.detection:.2f} by {reference.name}, at "
            f"best {best.detection:.2f} by {best.name} (chance is 0.50)."
        )
    return lines


def _line(verdict: Verdict) -> str:
    """Return what one predictor says and how right it is."""
    divergence = "" if verdict.divergence is None else f", KL to the truth {verdict.divergence:.2f}"
    return (
        f"{verdict.name} says {verdict.says:.0%} on average and is right {verdict.right:.0%} of the time; "
        f"calibration error {verdict.error:.3f}{divergence}."
    )


def _names(verdicts_: Sequence[Verdict], outcome: Outcome) -> str:
    """Return the names of those with an outcome, or a dash."""
    return ", ".join(v.name for v in verdicts_ if v.outcome == outcome) or "–"


def _next(rest: Sequence[Verdict], truth: bool, settings: Mapping[str, str]) -> list[str]:
    """Return what to try next."""

    def badness(verdict: Verdict) -> float:
        """Return how far a predictor is from the truth where that is known, else its calibration error."""
        return verdict.divergence if verdict.divergence is not None else verdict.error

    lines = []
    scaled = next((v for v in rest if _kind(v.name) == "temperature"), None)
    learned = [v for v in rest if v is not scaled]
    cured = sorted((v for v in learned if v.outcome == "cured"), key=badness)
    if cured:
        best = cured[0]
        own = f" --set {settings[best.name]}" if best.name in settings else ""
        lines.append(f"Next: `bayeslora train --method {best.name}{own} …` on your data.")
        if scaled is not None and badness(scaled) <= badness(best):
            measure = "KL to the truth" if truth else "calibration error"
            lines.append(
                f"But one number fitted on held-out rows ({scaled.name}) does no worse: {measure} "
                f"{badness(scaled):.3f} against {badness(best):.3f}."
            )
    elif scaled is not None and scaled.outcome == "cured":
        lines.append(f"Next: one number fitted on held-out rows does it, `bayeslora train --method {scaled.name} …`.")
    kinds = {_kind(v.name) for v in rest if v.outcome not in ("cured", "reference")}
    lines += [f"Of what did not cure: {ADVICE[kind]}" for kind in ADVICE if kind in kinds]
    return lines


def _kind(name: str) -> str:
    """Return the method of a name such as ``ensemble:3``."""
    return name.partition(":")[0]


def median_seed(errors: Mapping[int, Sequence[float]]) -> int:
    """Return the seed whose errors are the most usual.

    Args:
        errors: Seed -> the errors of its predictors, in the same order for all.

    Returns:
        The seed with the smallest sum of distances from the medians over the seeds, in units of their spread.

    Raises:
        InputError: If there is no seed.
    """
    if not errors:
        raise InputError("there is no seed to choose from")
    values = torch.tensor([list(row) for row in errors.values()], dtype=torch.float64)
    middle = values.median(0).values
    spread = (values - middle).abs().mean(0).clamp_min(1e-12)
    distances = ((values - middle).abs() / spread).sum(1)
    return min(zip(errors, distances.tolist(), strict=True), key=lambda pair: (pair[1], pair[0]))[0]
