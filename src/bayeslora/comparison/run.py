"""Several methods on one task, several seeds, one table.

What methods share is trained once, and everything is kept in the output folder as soon as it is there, so that a
comparison that was stopped goes on where it was: see `bayeslora.comparison.cached_runs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bayeslora.comparison.cached_runs import CachedRuns, Learned, learned, predicted
from bayeslora.comparison.costs import Cost, max_known
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Inference, PostHoc, Temperature
from bayeslora.metrics.classification import nll
from bayeslora.metrics.evaluation import Evaluation, evaluate
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Scaled
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

    def add(
        self, name: str, seed: int, prediction: Prediction, ood: dict[str, Prediction], cost: Cost, runs: CachedRuns
    ) -> None:
        """Evaluate the predictions of a method under a seed, and keep all that belongs to it."""
        assert runs.task.test is not None
        self.predictions.setdefault(name, {})[seed] = prediction
        self.ood.setdefault(name, {})[seed] = ood
        self.costs.setdefault(name, {})[seed] = cost
        self.evaluations.setdefault(name, {})[seed] = evaluate(
            prediction, runs.task.test, ood or None, bins=runs.bins, resamples=runs.resamples, seed=seed
        )


def compare(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int]) -> Comparison:
    """Train, predict and evaluate several methods under several seeds.

    Args:
        runs: What is the same for all, and the folder in which runs and predictions are kept.
        methods: The methods by the names they have in the tables.
        seeds: The seeds.

    Returns:
        All evaluations and predictions; the posteriors are in the folder. A method that could not be fitted under some
        seed is left out, and the reason is in ``failures``.

    Raises:
        InputError: If there is no method, seed or test split, or no method could be fitted.
    """
    runs = replace(runs)  # what was read off the model in an earlier comparison is read again
    _check(runs, methods, seeds)
    comparison = Comparison()
    for seed in seeds:
        for name, method in methods.items():
            if name in comparison.failures:
                continue
            try:
                result = learned(runs, method, seed)
            except InputError as error:
                runs.report(f"seed {seed}: {name} failed: {error}")
                comparison.failures[name] = {seed: str(error)}
                continue
            _measure(runs, comparison, result, name, seed)
            if runs.scaling and result.posterior.unscaled is result.posterior:
                _measure_scaled(runs, comparison, result, name, seed)
            if runs.temperatures and result.posterior.distinct is None:
                best = _best_temperature(runs, result, name, seed)
                tuned = f"{name} tuned"
                comparison.temperatures.setdefault(tuned, {})[seed] = best
                _measure(runs, comparison, result.tempered(best), tuned, seed)
    _without_failures(comparison)
    return comparison


def _check(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int]) -> None:
    """Refuse what could not be compared, before anything is trained."""
    if not methods or not seeds:
        raise InputError("a comparison needs at least one method and one seed")
    if runs.task.test is None or not len(runs.task.test):
        raise InputError(f"the task {runs.task.name} has no test examples to compare on")
    if runs.temperatures:
        labelled(runs.task.validation, "temperatures are chosen on validation rows")
    if runs.scaling:
        Temperature().rows(runs.task)
    for method in methods.values():
        single = method.member if isinstance(method, Ensemble) else method
        if isinstance(single, PostHoc):
            single.check(runs.model, runs.task)


def _without_failures(comparison: Comparison) -> None:
    """Take what a method has under some seeds out, if it has nothing under another."""
    for name in comparison.failures:
        for results in (
            comparison.evaluations,
            comparison.predictions,
            comparison.ood,
            comparison.costs,
            comparison.temperatures,
        ):
            for row in (name, f"{name} + T", f"{name} tuned"):
                results.pop(row, None)
    if not comparison.predictions:
        name, by_seed = next(iter(comparison.failures.items()))
        seed, reason = next(iter(by_seed.items()))
        raise InputError(f"no method could be fitted; {name} under seed {seed}: {reason}")


def _measure(runs: CachedRuns, comparison: Comparison, result: Learned, name: str, seed: int) -> None:
    """Predict by a posterior, and evaluate."""
    assert runs.task.test is not None
    prediction, memory = predicted(runs, result, runs.task.test, seed, name)
    others = {
        other: predicted(runs, result, split, seed, name, f"{name}@{other}")[0] for other, split in runs.ood.items()
    }
    cost = replace(result.cost, predict_seconds=prediction.seconds, memory=max_known(result.cost.memory, memory))
    comparison.add(name, seed, prediction, others, cost, runs)


def _measure_scaled(runs: CachedRuns, comparison: Comparison, result: Learned, name: str, seed: int) -> None:
    """Scale a method's predictions by temperatures that are fitted on the validation split; its passes serve again."""
    method = Temperature()
    rows = method.rows(runs.task)
    validation, _ = predicted(runs, result.keyed(1), rows, seed, name, f"{name}-validation-1")
    scaled = Scaled(result.posterior, method.scaling(validation, rows))
    others = {other: _scaled(scaled, p) for other, p in comparison.ood[name][seed].items()}
    prediction = _scaled(scaled, comparison.predictions[name][seed])
    comparison.add(f"{name} + T", seed, prediction, others, comparison.costs[name][seed], runs)


def _scaled(scaled: Scaled, prediction: Prediction) -> Prediction:
    """Return what a scaled posterior would have predicted."""
    mean = prediction.mean_log_probs
    return replace(
        prediction,
        log_probs=scaled.apply(prediction.log_probs, "draws"),
        mean_log_probs=None if mean is None else scaled.apply(mean, "mean"),
    )


def _best_temperature(runs: CachedRuns, result: Learned, name: str, seed: int) -> float:
    """Return the temperature with which the draws have the lowest NLL on the validation split."""
    validation = runs.task.validation
    assert validation is not None
    scores = {}
    for temperature in runs.temperatures:
        words, file = f"{name}, T={temperature:g},", f"{name}-validation-{temperature:g}"
        prediction, _ = predicted(runs, result.tempered(temperature), validation, seed, words, file)
        scores[temperature] = float(nll(prediction.log_p, validation.labels))
    return min(scores, key=lambda t: (scores[t], t))
