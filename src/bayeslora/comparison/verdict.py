"""What a comparison shows, in sentences made of its numbers: which method cured, which did not, what to try next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.metrics.bootstrap import Interval, Score, paired_bootstrap
from bayeslora.metrics.classification import accuracy, ece, kl_to_truth
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.prediction import Prediction

Outcome = Literal["reference", "cured", "better", "same", "worse"]

CURED_SHARE, MAX_LOST_ACCURACY = 0.5, 0.02
"""Cured is what has at most half of the reference's calibration error at no more than two points of accuracy."""

MIN_EXCESS = 0.05
"""A predictor is over-confident if its mean confidence is that much above its accuracy."""

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
    """What one predictor shows beside the reference; ``ece`` has 15 bins, ``auroc`` is that of telling by entropy."""

    name: str
    confidence: float
    accuracy: float
    ece: float
    kl: float | None  # mean KL(truth ‖ predicted) in nats, where the truth is known
    auroc: float | None
    outcome: Outcome = "reference"

    @property
    def method(self) -> str:
        """The method of a name such as ``ensemble:3``."""
        return self.name.partition(":")[0]


def verdicts(
    predictions: Mapping[str, Prediction],
    labels: Int[Tensor, " N"],
    ood: Mapping[str, Prediction] | None = None,
    truth: Float[Tensor, "N C"] | None = None,
    *,
    resamples: int = 500,
) -> list[Verdict]:
    """Judge predictors of the same N examples by the first of them, the reference."""
    if not predictions:
        raise InputError("there is nothing to judge; give at least one predictor with its prediction")
    judged: list[Verdict] = []
    reference = next(iter(predictions.values())).log_p
    even = None if truth is None else guess(truth)
    for name, prediction in predictions.items():
        log_p = prediction.log_p
        verdict = Verdict(
            name,
            confidence=float(prediction.confidence.mean()),
            accuracy=float(accuracy(log_p, labels)),
            ece=float(ece(log_p, labels)),
            kl=None if truth is None else float(kl_to_truth(log_p, truth)),
            auroc=None if ood is None or name not in ood else float(auroc(prediction.entropy, ood[name].entropy)),
        )
        if judged:
            difference = partial(
                paired_bootstrap, first=(log_p, labels), second=(reference, labels), resamples=resamples
            )
            verdict = replace(verdict, outcome=_outcome(verdict, judged[0], even, difference))
        judged.append(verdict)
    return judged


def _outcome(
    verdict: Verdict, reference: Verdict, even: float | None, difference: Callable[[Score], Interval]
) -> Outcome:
    """Return the outcome of a verdict, given how far a guess is from the truth and the intervals of differences."""
    # Cured: at most half of the calibration error, no accuracy lost and, where the truth is known, closer to it than a
    # guess. Better or worse: beyond chance, in calibration error or by lost accuracy.
    lost = reference.accuracy - verdict.accuracy > MAX_LOST_ACCURACY
    closer = even is None or verdict.kl is None or verdict.kl < even
    if verdict.ece <= CURED_SHARE * reference.ece and not lost and closer:
        return "cured"
    low, high = difference(ece)
    if low > 0 or (lost and difference(accuracy)[1] < 0):
        return "worse"
    return "better" if high < 0 else "same"


def guess(truth: Float[Tensor, "N C"]) -> float:
    """Return the mean divergence in nats of a guess, all of an example's choices equally likely, from the truth."""
    possible = truth > 0
    even = possible.double() / possible.sum(-1, keepdim=True)
    return float(kl_to_truth(even.log(), truth))


def in_words(
    judged: Sequence[Verdict],
    even: float | None = None,  # a guess's divergence from the truth
    other: str = "the other data",
    settings: Mapping[str, str] | None = None,  # of a predictor, as on the command line
) -> list[str]:
    """Return what the verdicts, the reference first, show: a sentence for each, and what follows from them."""
    reference, rest = judged[0], judged[1:]
    lines = [_line(verdict) for verdict in judged]
    if even is not None:
        lines.append(f"(All choices held for equally likely: KL {even:.2f}.)")
    excess = reference.confidence - reference.accuracy
    if excess < MIN_EXCESS:
        lines.append(f"{reference.name} is hardly over-confident here, so there is little to cure.")
    else:
        names = {
            outcome: ", ".join(v.name for v in rest if v.outcome == outcome) or "–" for outcome in get_args(Outcome)
        }
        lines.append(
            f"{reference.name} is over-confident by {100 * excess:.0f} points. Cured (at most half of its calibration "
            f"error, at most two points of accuracy lost): {names['cured']}. Better, but not cured: "
            f"{names['better']}. No difference beyond chance: {names['same']}. Worse: {names['worse']}."
        )
        lines += _next(rest, settings or {})
    areas = {v.name: v.auroc for v in judged if v.auroc is not None}
    if reference.auroc is not None:
        best = max(areas, key=areas.__getitem__)
        lines.append(
            f"Told from the test rows by entropy, {other}: AUROC {reference.auroc:.2f} by {reference.name}, at "
            f"best {areas[best]:.2f} by {best} (chance is 0.50)."
        )
    return lines


def _line(verdict: Verdict) -> str:
    """Return what one predictor says and how right it is."""
    kl = "" if verdict.kl is None else f", KL to the truth {verdict.kl:.2f}"
    return (
        f"{verdict.name} says {verdict.confidence:.0%} on average and is right {verdict.accuracy:.0%} of the time; "
        f"calibration error {verdict.ece:.3f}{kl}."
    )


def _next(rest: Sequence[Verdict], settings: Mapping[str, str]) -> list[str]:
    """Return what to try next."""
    lines = []
    # how far a predictor is from the truth where that is known, else its calibration error
    badness = {v.name: v.ece if v.kl is None else v.kl for v in rest}
    scaled = next((v for v in rest if v.method == "temperature"), None)
    cured = [v.name for v in rest if v is not scaled and v.outcome == "cured"]
    if cured:
        best = min(cured, key=badness.__getitem__)
        options = f" --set {settings[best]}" if best in settings else ""
        lines.append(f"Next: `bayeslora train --method {best}{options} …` on your data.")
        if scaled is not None and badness[scaled.name] <= badness[best]:
            measure = "calibration error" if scaled.kl is None else "KL to the truth"
            lines.append(
                f"But one number fitted on held-out rows ({scaled.name}) does no worse: {measure} "
                f"{badness[scaled.name]:.3f} against {badness[best]:.3f}."
            )
    elif scaled is not None and scaled.outcome == "cured":
        lines.append(f"Next: one number fitted on held-out rows does it, `bayeslora train --method {scaled.name} …`.")
    uncured = {v.method for v in rest if v.outcome != "cured"}
    lines += [f"Of what did not cure: {advice}" for method, advice in ADVICE.items() if method in uncured]
    return lines
