"""Several methods on one task, several seeds, one table.

What methods share is trained once, and everything is kept in the output folder as soon as it is there, so that a
comparison that was stopped goes on where it was: see `bayeslora.comparison.cached_runs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from bayeslora.comparison.base import BASE, Witness, check_names, witness
from bayeslora.comparison.cached_runs import CachedRuns, Learned, learned, predicted
from bayeslora.comparison.costs import Cost, max_known
from bayeslora.comparison.scaled_runs import BY_DIVERGENCE, scaled_by_divergence
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Inference, PostHoc, Temperature
from bayeslora.metrics.classification import nll
from bayeslora.metrics.evaluation import Evaluation, evaluate
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Scaled
from bayeslora.processes import sharded
from bayeslora.tasks.types import labelled

VARIANTS = (" + T", " + T without labels", " tuned", BY_DIVERGENCE)
"""How the names of rows end that are made of another row's posterior."""


@dataclass(frozen=True)
class Result:
    """What a method came to under one seed; the cost is as if it shared nothing."""

    prediction: Prediction  # of the test rows
    ood: dict[str, Prediction]  # of each other data set
    evaluation: Evaluation
    cost: Cost
    temperature: float | None = None  # the one that was chosen, for ``<name> tuned`` and by divergence


@dataclass(frozen=True)
class Comparison:
    """The results of each method under each seed; why a method could not be fitted, by seed: then it has no result."""

    results: dict[str, dict[int, Result]] = field(default_factory=dict)
    failures: dict[str, dict[int, str]] = field(default_factory=dict)


def compare(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int]) -> Comparison:
    """Train, predict and evaluate methods, by their names in the tables, under several seeds; by all processes."""
    runs = replace(runs)  # what was read off the model in an earlier comparison is read again
    _check(runs, methods, seeds)
    with sharded():
        return _compared(runs, methods, seeds)


def _compared(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int]) -> Comparison:
    """Train, predict and evaluate."""
    comparison = Comparison()
    base = witness(runs)
    for seed in seeds:
        if base is not None:
            comparison.results.setdefault(BASE, {})[seed] = _untuned(runs, base, seed)
        for name, method in methods.items():
            if name in comparison.failures:
                continue
            try:
                fitted = learned(runs, method, seed)
            except InputError as error:
                runs.report(f"seed {seed}: {name} failed: {error}")
                comparison.failures[name] = {seed: str(error)}
                continue
            for row, result in _results(runs, base, fitted, name, seed):
                comparison.results.setdefault(row, {})[seed] = result
            if (row := f"{name}{BY_DIVERGENCE}") not in comparison.failures:
                try:
                    for result in _by_divergence(runs, base, fitted, row, seed):
                        comparison.results.setdefault(row, {})[seed] = result
                except InputError as error:
                    runs.report(f"seed {seed}: {row} failed: {error}")
                    comparison.failures[row] = {seed: str(error)}
    for name in comparison.failures:  # under a later seed
        for row in (name, *(f"{name}{variant}" for variant in VARIANTS)):
            comparison.results.pop(row, None)
    if not comparison.results.keys() - {BASE}:
        name, by_seed = next(iter(comparison.failures.items()))
        seed, reason = next(iter(by_seed.items()))
        raise InputError(f"no method could be fitted; {name} under seed {seed}: {reason}")
    return comparison


def _check(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int]) -> None:
    """Refuse what could not be compared, before anything is trained."""
    if not methods or not seeds:
        raise InputError("a comparison needs at least one method and one seed")
    if runs.task.test is None or not len(runs.task.test):
        raise InputError(f"the task {runs.task.name} has no test examples to compare on")
    if runs.temperatures:
        labelled(runs.task.validation, "temperatures are chosen on validation rows")
    check_names(methods)
    if runs.scaling:
        Temperature().check(runs.model, runs.task)
    if runs.scaling_without_labels:
        Temperature(labels=False).check(runs.model, runs.task)
    for method in methods.values():
        single = method.member if isinstance(method, Ensemble) else method
        if isinstance(single, PostHoc):
            single.check(runs.model, runs.task)


def _results(
    runs: CachedRuns, base: Witness | None, fitted: Learned, name: str, seed: int
) -> Iterator[tuple[str, Result]]:
    """Yield the results of a method, of temperature scaling on top of it, and of its best temperature."""
    plain = _measured(runs, base, fitted, name, seed)
    yield name, plain
    if fitted.posterior.unscaled is fitted.posterior:
        yield from _with_scaling(runs, base, fitted, plain, name, seed)
    if runs.temperatures and fitted.posterior.distinct is None:
        best = _best_temperature(runs, fitted, name, seed)
        tuned = f"{name} tuned"
        yield tuned, replace(_measured(runs, base, fitted.tempered(best), tuned, seed), temperature=best)


def _with_scaling(
    runs: CachedRuns, base: Witness | None, fitted: Learned, plain: Result, name: str, seed: int
) -> Iterator[tuple[str, Result]]:
    """Yield the results of temperature scaling on top of a method: by labels, and without them."""
    asked = {" + T": runs.scaling, " + T without labels": runs.scaling_without_labels}
    for variant in (variant for variant, wanted in asked.items() if wanted):
        method = Temperature(labels=variant == " + T")
        rows = method.rows(runs.task)
        validation, _ = predicted(runs, fitted.keyed(1), rows, seed, name, f"{name}-validation-1")
        validation = validation if base is None or method.labels else base.beside(validation, rows)
        try:
            scaled = Scaled(fitted.posterior, method.scaling(validation, rows))
        except InputError as error:
            runs.report(f"seed {seed}: no row {name}{variant}: {error}")
            continue
        prediction, *others = (scaled_prediction(scaled, p) for p in (plain.prediction, *plain.ood.values()))
        ood = dict(zip(plain.ood, others, strict=True))
        yield f"{name}{variant}", evaluated(runs, prediction, ood, plain.cost, seed)


def _by_divergence(runs: CachedRuns, base: Witness | None, fitted: Learned, row: str, seed: int) -> Iterator[Result]:
    """Yield the result of a method with noise, scaled by divergence, if that is asked for."""
    if runs.divergence is None:
        return
    scaled = scaled_by_divergence(runs, fitted, row, seed, runs.divergence)
    if scaled is not None:
        yield replace(_measured(runs, base, scaled[0], row, seed), temperature=scaled[1] ** 2)


def _measured(runs: CachedRuns, base: Witness | None, fitted: Learned, name: str, seed: int) -> Result:
    """Predict by a posterior, and evaluate."""
    prediction, memory = predicted(runs, fitted, runs.test, seed, name)
    ood = {other: predicted(runs, fitted, split, seed, name, f"{name}@{other}")[0] for other, split in runs.ood.items()}
    cost = replace(fitted.cost, predict_seconds=prediction.seconds, memory=max_known(fitted.cost.memory, memory))
    if base is not None:
        prediction = base.beside(prediction, runs.test)
        ood = {other: base.beside(of, runs.ood[other]) for other, of in ood.items()}
    return evaluated(runs, prediction, ood, cost, seed)


def _untuned(runs: CachedRuns, base: Witness, seed: int) -> Result:
    """Return the result of the base, which is the same under all seeds but for the resampling."""
    prediction, memory = base.of(runs.test)
    ood = {other: base.of(split)[0] for other, split in runs.ood.items()}
    return evaluated(runs, prediction, ood, Cost(0.0, prediction.seconds, memory, 0), seed)


def evaluated(runs: CachedRuns, prediction: Prediction, ood: dict[str, Prediction], cost: Cost, seed: int) -> Result:
    """Return the result of predictions."""
    evaluation = evaluate(prediction, runs.test, ood, bins=runs.bins, resamples=runs.resamples, seed=seed)
    return Result(prediction, ood, evaluation, cost)


def scaled_prediction(scaled: Scaled, prediction: Prediction) -> Prediction:
    """Return what a scaled posterior would have predicted."""
    mean = prediction.mean_log_probs
    return replace(
        prediction,
        log_probs=scaled.apply(prediction.log_probs, "draws"),
        mean_log_probs=None if mean is None else scaled.apply(mean, "mean"),
    )


def _best_temperature(runs: CachedRuns, fitted: Learned, name: str, seed: int) -> float:
    """Return the temperature with which the draws have the lowest NLL on the validation split."""
    validation = labelled(runs.task.validation, "temperatures are chosen on validation rows")
    scores = {}
    for temperature in runs.temperatures:
        words, file = f"{name}, T={temperature:g},", f"{name}-validation-{temperature:g}"
        prediction, _ = predicted(runs, fitted.tempered(temperature), validation, seed, words, file)
        scores[temperature] = float(nll(prediction.log_p, validation.labels))
    return min(scores, key=lambda t: (scores[t], t))
