"""Several methods on one task, several seeds, one table: what they share is trained once.

MAP with seed s is the first member of the ensemble with seed s, and SWAG goes on from MAP at a constant learning rate,
as in its paper; SWAG is MultiSWAG's first run, and what is fitted to a trained adapter is fitted to MAP. Everything is
kept in the output folder as soon as it is there, so that a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from bayeslora.engine import predict
from bayeslora.errors import InputError
from bayeslora.evaluation import Evaluation, evaluate
from bayeslora.files import replacing
from bayeslora.methods import Ensemble, Map, Method, PostHoc, Swag
from bayeslora.methods.base import labelled, settings
from bayeslora.metrics import nll
from bayeslora.operations import tempered
from bayeslora.params import initialise
from bayeslora.posteriors import Posterior
from bayeslora.prediction import Prediction
from bayeslora.storage import load_posterior
from bayeslora.tasks.types import Split, Task
from bayeslora.training import fit

SEED_STRIDE = 1000
"""Member k of seed s is trained with seed ``s · SEED_STRIDE + k``."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        evaluations: The evaluation of each method under each seed.
        predictions: The test predictions of each method under each seed.
        ood: The predictions of each method under each seed on each other data set.
        train_seconds: Training time of each method under each seed, as if it shared nothing.
        temperatures: The temperature that was chosen for each ``<name> tuned`` under each seed.
    """

    evaluations: dict[str, dict[int, Evaluation]] = field(default_factory=dict)
    predictions: dict[str, dict[int, Prediction]] = field(default_factory=dict)
    ood: dict[str, dict[int, dict[str, Prediction]]] = field(default_factory=dict)
    train_seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    temperatures: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What is the same for all methods of a comparison.

    Attributes:
        model: PEFT model; its adapter is drawn anew for each run.
        tokenizer: The model's tokenizer.
        task: The task.
        args: Arguments of the Trainer for one run; seed and folder are set for each.
        out: Folder of the results.
        ood: Other data, to tell from the task's test split.
        swag_share: Length of SWAG's phase, as a share of MAP's optimiser steps.
        temperatures: Temperatures T of the covariance to choose from, by the validation split's NLL, for every method
            with noise; the winner is a method of its own in the results, named ``<name> tuned``.
        draws: Number S of draws.
        token_budget: Most tokens of a prediction batch.
        resamples: Bootstrap resamples.
        bins: Bins of the calibration errors.
        report: Called with one line when something begins.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    args: TrainingArguments
    out: Path
    ood: Mapping[str, Split] = field(default_factory=dict)
    swag_share: float = 0.5
    temperatures: Sequence[float] = ()
    draws: int = 10
    token_budget: int = 2048
    resamples: int = 1000
    bins: int = 15
    report: Callable[[str], None] = print


def compare(study: Study, methods: Mapping[str, Method], seeds: Sequence[int]) -> Comparison:
    """Train, predict and evaluate several methods under several seeds.

    Args:
        study: What is the same for all.
        methods: The methods by the names they have in the tables.
        seeds: The seeds.

    Returns:
        All evaluations and predictions; the posteriors are in the study's folder.

    Raises:
        InputError: If there is no method, seed or test split.
    """
    if not methods or not seeds:
        raise InputError("a comparison needs at least one method and one seed")
    if study.task.test is None or not len(study.task.test):
        raise InputError(f"the task {study.task.name} has no test examples to compare on")
    if study.temperatures and (study.task.validation is None or not len(study.task.validation)):
        raise InputError("temperatures are chosen on a validation split, and the task has none; set validation=0.1")
    for name, method in methods.items():
        single = method.member if isinstance(method, Ensemble) else method
        if isinstance(single, PostHoc) and single.held_out:
            labelled(study.task.validation, f"{name} is fitted on validation rows")
    found = Comparison()
    for seed in seeds:
        for name, method in methods.items():
            posterior, seconds = _posterior(study, method, seed)
            _measured(study, found, posterior, name, seed, seconds)
            if study.temperatures and posterior.distinct is None:
                best = _best_temperature(study, posterior, name, seed)
                tuned = f"{name} tuned"
                found.temperatures.setdefault(tuned, {})[seed] = best
                _measured(study, found, tempered(posterior, best), tuned, seed, seconds)
    return found


def _measured(study: Study, found: Comparison, posterior: Posterior, name: str, seed: int, seconds: float) -> None:
    """Predict by a posterior, evaluate, and put the results where they belong."""
    assert study.task.test is not None
    stem = study.out / f"seed-{seed}" / name.replace(":", "-").replace(" ", "-")
    prediction = _predicted(study, posterior, study.task.test, stem.with_name(f"{stem.name}.safetensors"), name, seed)
    others = {
        other: _predicted(study, posterior, split, stem.with_name(f"{stem.name}@{other}.safetensors"), name, seed)
        for other, split in study.ood.items()
    }
    evaluation = evaluate(
        prediction, study.task.test, others or None, bins=study.bins, resamples=study.resamples, seed=seed
    )
    found.predictions.setdefault(name, {})[seed] = prediction
    found.ood.setdefault(name, {})[seed] = others
    found.train_seconds.setdefault(name, {})[seed] = seconds
    found.evaluations.setdefault(name, {})[seed] = evaluation


def _best_temperature(study: Study, posterior: Posterior, name: str, seed: int) -> float:
    """Return the temperature with which the draws have the lowest NLL on the validation split."""
    validation = study.task.validation
    assert validation is not None
    stem = f"{name.replace(':', '-')}-validation"
    scores = {}
    for temperature in study.temperatures:
        path = study.out / f"seed-{seed}" / f"{stem}-{temperature:g}.safetensors"
        prediction = _predicted(
            study, tempered(posterior, temperature), validation, path, f"{name}, T={temperature:g},", seed
        )
        scores[temperature] = nll(prediction.log_p, validation.labels)
    return min(scores, key=lambda t: (scores[t], t))


def _posterior(study: Study, method: Method, seed: int) -> tuple[Posterior, float]:
    """Return a method's posterior under one seed, made of runs that other methods may share, and its training time."""
    if isinstance(method, Ensemble):
        runs = [_single(study, method.member, seed, k) for k in range(method.members)]
        return method.mixture([p for p, _ in runs], study.model), sum(s for _, s in runs)
    return _single(study, method, seed, 0)


def _single(study: Study, method: Method, seed: int, member: int) -> tuple[Posterior, float]:
    """Return the posterior of one run and its training time, from the folder if it is there already."""
    number = seed * SEED_STRIDE + member
    variant = json.dumps(settings(method), sort_keys=True)
    plain = json.dumps(settings(type(method)()), sort_keys=True)
    tag = "" if variant == plain else f"-{hashlib.sha256(variant.encode()).hexdigest()[:6]}"
    folder = study.out / f"seed-{seed}" / f"{method.name}{tag}-{member}"
    log = folder / "run.json"
    if log.exists():
        return load_posterior(folder / "posterior"), json.loads(log.read_text(encoding="utf-8"))["seconds"]
    args = copy.copy(study.args)
    args.seed, args.data_seed, args.output_dir = number, None, str(folder)
    start, before, own = None, 0.0, method
    if isinstance(method, Swag):
        start, before = _single(study, Map(), seed, member)
        args.max_steps = max(2, round(study.swag_share * planned_steps(study)))
        own = replace(method, start=0, learning_rate=method.learning_rate or study.args.learning_rate / 10)
    elif isinstance(method, PostHoc):
        start, before = _single(study, Map(), seed, member)
    else:
        initialise(study.model, number)
    study.report(f"seed {seed}: training {method.name}, run {member + 1}")
    began = time.perf_counter()
    if isinstance(own, PostHoc):
        posterior = own.fit(
            study.model,
            study.task,
            start=start,
            tokenizer=study.tokenizer,
            seed=number,
            token_budget=study.token_budget,
        )
    else:
        posterior = fit(study.model, study.task, own, args, tokenizer=study.tokenizer, start=start, resume=True)
    seconds = before + time.perf_counter() - began
    posterior.save_pretrained(folder / "posterior", overwrite=True)
    with replacing(log) as partial:
        partial.write_text(json.dumps({"settings": settings(method), "seconds": seconds}), encoding="utf-8")
    return posterior, seconds


def planned_steps(study: Study) -> int:
    """Return the optimiser steps of one MAP run."""
    if study.args.max_steps > 0:
        return study.args.max_steps
    rows = len(study.task.train) if study.task.train is not None else 0
    batch = study.args.per_device_train_batch_size * study.args.gradient_accumulation_steps
    return max(1, round(-(-rows // batch) * study.args.num_train_epochs))


def _predicted(study: Study, posterior: Posterior, split: Split, path: Path, name: str, seed: int) -> Prediction:
    """Return a prediction, from its file if it is there already."""
    if path.exists():
        return Prediction.load(path)
    study.report(f"seed {seed}: {name} answers {split.name} ({len(split)} rows)")
    prediction = predict(
        study.model,
        posterior,
        split,
        study.draws,
        seed=seed,
        tokenizer=study.tokenizer,
        token_budget=study.token_budget,
        progress=sys.stderr.isatty(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    prediction.save(path)
    return prediction
