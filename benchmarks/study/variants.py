"""What a method's posterior answers, and the rows that follow from it: scaled by temperature, and controls.

The controls are isotropic noise around the method's own mean, in the parameters in which the method has noise: of the
``same`` average variance, or ``matched``, of the variance whose single draws cost as much NLL on the validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cells import Entry, validation_of

import bayeslora as bl
from bayeslora.comparison.base import BASE, Witness
from bayeslora.comparison.cached_runs import CachedRuns, Learned, predicted
from bayeslora.comparison.run import scaled_prediction
from bayeslora.methods import Temperature
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import DiagonalGaussian, Posterior, Scaled
from bayeslora.tasks.types import Split, Task
from bayeslora.training import keys

TEST, VALIDATION = "test", "validation"
_WIDEST, _HALVINGS = 64.0, 7
"""Matched noise: the widest factor on the variance, and how often its range is halved."""


@dataclass(frozen=True)
class Answers:
    """The predictions of one row of the study: of ``test``, ``validation`` and each foreign set."""

    row: str
    predictions: dict[str, Prediction]
    notes: dict[str, Any]  # what was chosen on validation rows
    ratios: dict[str, torch.Tensor] = field(default_factory=dict)  # of each split's prompts: likelihood by the base's

    def foreign(self) -> dict[str, Prediction]:
        """Return the predictions of the foreign sets."""
        return {name: p for name, p in self.predictions.items() if name not in (TEST, VALIDATION)}


def splits_of(runs: CachedRuns) -> dict[str, Split]:
    """Return all splits that are answered, by the names of their predictions."""
    return {TEST: runs.test, VALIDATION: validation_of(runs), **runs.ood}


def of_base(runs: CachedRuns, base: Witness) -> Answers:
    """Return the base's answers."""
    found = {name: base.of(split)[0] for name, split in splits_of(runs).items()}
    return Answers(BASE, {name: replace(p, mean_log_probs=p.log_probs[0]) for name, p in found.items()}, {})


def answers_of(runs: CachedRuns, base: Witness | None, fitted: Learned, row: str, seed: int, **notes: Any) -> Answers:
    """Return what a posterior answers to all splits, from the files of the runs if it is there."""
    found = {}
    for name, split in splits_of(runs).items():
        prediction, _ = predicted(runs, fitted, split, seed, row, f"{row}@{name}".replace(",", ""))
        found[name] = prediction if base is None else base.beside(prediction, split)
    return Answers(row, found, notes)


def prompt_ratios(runs: CachedRuns, posterior: Posterior) -> dict[str, torch.Tensor]:
    """Return how much likelier tuning made each prompt, by the mean, of the test rows and of the foreign ones."""
    splits = {TEST: runs.test, **runs.ood}
    return {
        name: bl.prompt_likelihood_ratio(runs.model, posterior, split, 0, tokenizer=runs.tokenizer)
        for name, split in splits.items()
    }


def with_temperature(answers: Answers, posterior: Posterior, rows: Task, method: Temperature) -> Answers:
    """Return answers with a temperature that is fitted to those of the validation rows, by labels or by the base."""
    scaling = method.scaling(answers.predictions[VALIDATION], method.rows(rows))
    scaled = Scaled(posterior, scaling)
    found = {name: scaled_prediction(scaled, p) for name, p in answers.predictions.items()}
    chosen = {f"temperature of the {of}": 1 / float(scaling[f"{of}.weight"]) for of in ("draws", "mean")}
    row = f"{answers.row} + T" if method.labels else f"{answers.row} + T without labels"
    return Answers(row, found, {**answers.notes, **chosen})


def controls(
    runs: CachedRuns, base: Witness | None, entry: Entry, fitted: Learned, answers: Answers, seed: int
) -> Iterator[Answers]:
    """Yield the answers under isotropic noise around the method's mean."""
    if not entry.controls:
        return
    posterior = fitted.posterior
    assert isinstance(posterior, DiagonalGaussian)
    noisy = {name: v for name, v in posterior.variance.items() if bool(v.any())}
    average = float(torch.cat([v.flatten() for v in noisy.values()]).double().mean())
    for control in entry.controls:
        variance = average if control == "same" else _matched(runs, posterior, noisy, average, answers, seed)
        flat = _flat(posterior, noisy, variance)
        key = keys.key_of({"posterior": fitted.key, "control": control})
        words = {"same": "isotropic of the same variance", "matched": "isotropic of the same cost"}[control]
        flat_fit, row = replace(fitted, posterior=flat, key=key), f"{entry.name}, {words}"
        yield answers_of(runs, base, flat_fit, row, seed, sigma=math.sqrt(variance))


def _flat(posterior: DiagonalGaussian, noisy: dict[str, Any], variance: float) -> DiagonalGaussian:
    """Return the posterior with one variance in all parameters that have noise."""
    return replace(posterior, variance={name: torch.full_like(v, variance) for name, v in noisy.items()})


def _matched(
    runs: CachedRuns, posterior: DiagonalGaussian, noisy: dict[str, Any], start: float, answers: Answers, seed: int
) -> float:
    """Return the variance whose single draws have, on average, the NLL on validation rows that the method's have."""
    rows = validation_of(runs)
    wanted = _cost(answers.predictions[VALIDATION], rows.labels)
    low, high = start / _WIDEST, start * _WIDEST
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        draws = replace(bl.Draws.of(runs.draws), seed=seed)
        said = bl.predict(
            runs.model, _flat(posterior, noisy, middle), rows, draws, tokenizer=runs.tokenizer,
            token_budget=runs.token_budget, mean=False,
        )  # fmt: skip
        low, high = (middle, high) if _cost(said, rows.labels) < wanted else (low, middle)
    return math.sqrt(low * high)


def _cost(prediction: Prediction, labels: torch.Tensor) -> float:
    """Return the average NLL of single draws."""
    return float(nll(prediction.log_probs.flatten(0, 1), labels.repeat(prediction.draws)))
