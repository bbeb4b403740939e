"""Several methods on one task, several seeds, one table.

What methods share is trained once, and everything is kept in the output folder as soon as it is there, so that a
comparison that was stopped goes on where it was: see `bayeslora.comparison.cached_runs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bayeslora.comparison.cached_runs import Learned, Study, posterior_of, predicted
from bayeslora.comparison.costs import Cost, most
from bayeslora.comparison.keys import key_of
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Inference, PostHoc, Temperature
from bayeslora.metrics.classification import nll
from bayeslora.metrics.evaluation import Evaluation, evaluate
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Scaled
from bayeslora.posteriors.transforms import tempered
from bayeslora.tasks.types import labelled


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        evaluations: The evaluation of each method under each seed.
        predictions: The test predictions of each method under each seed.
        ood: The predictions of each method under each seed on each other data set.
        costs: What each method cost under each seed, as if it shared nothing.
        temperatures: The temperature that was chosen for each ``<name> tuned`` under each seed.
        failures: Why a method could not be fitted, by seed; it is in none of the others.
    """

    evaluations: dict[str, dict[int, Evaluation]] = field(default_factory=dict)
    predictions: dict[str, dict[int, Prediction]] = field(default_factory=dict)
    ood: dict[str, dict[int, dict[str, Prediction]]] = field(default_factory=dict)
    costs: dict[str, dict[int, Cost]] = field(default_factory=dict)
    temperatures: dict[str, dict[int, float]] = field(default_factory=dict)
    failures: dict[str, dict[int, str]] = field(default_factory=dict)


def compare(study: Study, methods: Mapping[str, Inference], seeds: Sequence[int]) -> Comparison:
    """Train, predict and evaluate several methods under several seeds.

    Args:
        study: What is the same for all.
        methods: The methods by the names they have in the tables.
        seeds: The seeds.

    Returns:
        All evaluations and predictions; the posteriors are in the study's folder. A method that could not be fitted
        under some seed is left out, and the reason is in ``failures``.

    Raises:
        InputError: If there is no method, seed or test split, or no method could be fitted.
    """
    if not methods or not seeds:
        raise InputError("a comparison needs at least one method and one seed")
    if study.task.test is None or not len(study.task.test):
        raise InputError(f"the task {study.task.name} has no test examples to compare on")
    if study.temperatures:
        labelled(study.task.validation, "temperatures are chosen on validation rows")
    if study.scaling:
        Temperature().rows(study.task)
    for method in methods.values():
        single = method.member if isinstance(method, Ensemble) else method
        if isinstance(single, PostHoc):
            single.check(study.model, study.task)
    found = Comparison()
    for seed in seeds:
        for name, method in methods.items():
            if name in found.failures:
                continue
            try:
                learned = posterior_of(study, method, seed)
            except InputError as error:
                study.report(f"seed {seed}: {name} failed: {error}")
                found.failures[name] = {seed: str(error)}
                continue
            _measured(study, found, learned, name, seed)
            if study.scaling and learned.posterior.unscaled is learned.posterior:
                _scaled(study, found, learned, name, seed)
            if study.temperatures and learned.posterior.distinct is None:
                best = _best_temperature(study, learned, name, seed)
                tuned = f"{name} tuned"
                found.temperatures.setdefault(tuned, {})[seed] = best
                _measured(study, found, _tempered(learned, best), tuned, seed)
    _without_failures(found)
    return found


def _without_failures(found: Comparison) -> None:
    """Take what a method has under some seeds out, if it has nothing under another."""
    for name in found.failures:
        for results in (found.evaluations, found.predictions, found.ood, found.costs, found.temperatures):
            for row in (name, f"{name} + T", f"{name} tuned"):
                results.pop(row, None)
    if not found.predictions:
        name, by_seed = next(iter(found.failures.items()))
        seed, reason = next(iter(by_seed.items()))
        raise InputError(f"no method could be fitted; {name} under seed {seed}: {reason}")


def _tempered(learned: Learned, temperature: float) -> Learned:
    """Return what was learned with another covariance."""
    return replace(learned, posterior=tempered(learned.posterior, temperature), key=_tempered_key(learned, temperature))


def _tempered_key(learned: Learned, temperature: float) -> str:
    """Return the key of what was learned with another covariance."""
    return key_of({"posterior": learned.key, "temperature": float(temperature)})


def _measured(study: Study, found: Comparison, learned: Learned, name: str, seed: int) -> None:
    """Predict by a posterior, evaluate, and put the results where they belong."""
    assert study.task.test is not None
    stem = study.out / f"seed-{seed}" / name.replace(":", "-").replace(" ", "-")
    prediction, memory = predicted(study, learned.posterior, learned.key, study.task.test, stem, name, seed)
    others = {
        other: predicted(
            study, learned.posterior, learned.key, split, stem.with_name(f"{stem.name}@{other}"), name, seed
        )[0]
        for other, split in study.ood.items()
    }
    cost = replace(learned.cost, predict_seconds=prediction.seconds, memory=most(learned.cost.memory, memory))
    _noted(study, found, name, seed, prediction, others, cost)


def _scaled(study: Study, found: Comparison, learned: Learned, name: str, seed: int) -> None:
    """Scale a method's predictions by temperatures that are fitted on the validation split; its passes serve again."""
    method = Temperature()
    rows = method.rows(study.task)
    stem = study.out / f"seed-{seed}" / f"{name.replace(':', '-')}-validation-1"
    validation, _ = predicted(study, learned.posterior, _tempered_key(learned, 1), rows, stem, name, seed)
    scaled = Scaled(learned.posterior, method.scaling(validation, rows))
    others = {other: _after(scaled, p) for other, p in found.ood[name][seed].items()}
    prediction = _after(scaled, found.predictions[name][seed])
    _noted(study, found, f"{name} + T", seed, prediction, others, found.costs[name][seed])


def _after(scaled: Scaled, prediction: Prediction) -> Prediction:
    """Return what a scaled posterior would have predicted."""
    mean = prediction.mean_log_probs
    return replace(
        prediction,
        log_probs=scaled.apply(prediction.log_probs, "draws"),
        mean_log_probs=None if mean is None else scaled.apply(mean, "mean"),
    )


def _noted(
    study: Study,
    found: Comparison,
    name: str,
    seed: int,
    prediction: Prediction,
    others: dict[str, Prediction],
    cost: Cost,
) -> None:
    """Evaluate predictions, and put the results where they belong."""
    assert study.task.test is not None
    evaluation = evaluate(
        prediction, study.task.test, others or None, bins=study.bins, resamples=study.resamples, seed=seed
    )
    found.predictions.setdefault(name, {})[seed] = prediction
    found.ood.setdefault(name, {})[seed] = others
    found.costs.setdefault(name, {})[seed] = cost
    found.evaluations.setdefault(name, {})[seed] = evaluation


def _best_temperature(study: Study, learned: Learned, name: str, seed: int) -> float:
    """Return the temperature with which the draws have the lowest NLL on the validation split."""
    validation = study.task.validation
    assert validation is not None
    stem = f"{name.replace(':', '-')}-validation"
    scores = {}
    for temperature in study.temperatures:
        own, path = _tempered(learned, temperature), study.out / f"seed-{seed}" / f"{stem}-{temperature:g}"
        prediction, _ = predicted(study, own.posterior, own.key, validation, path, f"{name}, T={temperature:g},", seed)
        scores[temperature] = nll(prediction.log_p, validation.labels)
    return min(scores, key=lambda t: (scores[t], t))
