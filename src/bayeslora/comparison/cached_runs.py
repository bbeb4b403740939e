"""What is the same for all methods of a comparison, and their runs: made once, and kept in a folder.

MAP with seed s is the first member of the ensemble with seed s, and SWAG goes on from MAP at a constant learning rate,
as in its paper; SWAG is MultiSWAG's first run, and what is fitted to a trained adapter is fitted to MAP.

A run's folder and a prediction's file are named by a key of all that they depend on (`comparison.keys`). A change makes
a new one beside the old; what is the same is taken from there.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from bayeslora.comparison.costs import Cost, folder_bytes, most, peak_memory
from bayeslora.comparison.keys import difference, key_of, of_arguments, of_model, of_rows
from bayeslora.files import atomic_file
from bayeslora.methods import Ensemble, Inference, Map, PostHoc, Swag
from bayeslora.methods.base import settings
from bayeslora.methods.ensemble import member_seed
from bayeslora.metrics.prediction import Prediction
from bayeslora.params import device_of, initialise
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.loading import load_posterior
from bayeslora.prediction import PassOptions, predict
from bayeslora.tasks.types import Split, Task
from bayeslora.training.run import fit


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
        scaling: Whether temperature scaling is fitted to every method on the validation split too; the result is a
            method of its own in the results, named ``<name> + T``.
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
    scaling: bool = False
    draws: int = 10
    token_budget: int | None = None
    resamples: int = 1000
    bins: int = 15
    report: Callable[[str], None] = print


@dataclass(frozen=True)
class Learned:
    """What came of a method under one seed.

    Attributes:
        posterior: The posterior.
        cost: Its cost as if it shared nothing; its prediction is not in it.
        key: What it depends on, as a key; see `bayeslora.comparison.keys`.
    """

    posterior: Posterior
    cost: Cost
    key: str


def posterior_of(study: Study, method: Inference, seed: int) -> Learned:
    """Return a method's posterior under one seed, made of runs that other methods may share.

    Args:
        study: The study.
        method: The method.
        seed: The seed.

    Returns:
        The posterior, what it cost, and its key.
    """
    if isinstance(method, Ensemble):
        runs = [_single(study, _planned(study, method.member, seed, k)) for k in range(method.members)]
        total = Cost(
            sum(run.cost.train_seconds for run in runs),
            None,
            most(*(run.cost.memory for run in runs)),
            sum(run.cost.disk for run in runs),
        )
        key = key_of({"members": [run.key for run in runs], "dropout_draws": method.dropout_draws})
        return Learned(method.mixture([run.posterior for run in runs], study.model), total, key)
    return _single(study, _planned(study, method, seed, 0))


@dataclass(frozen=True)
class _Run:
    """One run before it is made: method, arguments and start, and all that it depends on."""

    method: Inference
    args: TrainingArguments
    start: _Run | None
    seed: int
    member: int
    depends: dict[str, Any]

    @property
    def key(self) -> str:
        """The run's key."""
        return key_of(self.depends)

    @property
    def folder(self) -> Path:
        """The run's folder, named by its key."""
        return Path(self.args.output_dir)


def _planned(study: Study, method: Inference, seed: int, member: int) -> _Run:
    """Return the run of a method that is the member of a seed."""
    number = member_seed(seed, member)
    start, own, args = None, method, copy.copy(study.args)
    args.seed, args.data_seed = number, None
    if isinstance(method, Swag):
        start = _planned(study, Map(), seed, member)
        args.max_steps = max(2, round(study.swag_share * planned_steps(study)))
        own = replace(method, start=0, learning_rate=method.learning_rate or study.args.learning_rate / 10)
    elif isinstance(method, PostHoc):
        start = _planned(study, Map(), seed, member)
    depends = {
        "method": {"name": own.name, **json.loads(json.dumps(settings(own)))},
        "training": None if isinstance(own, PostHoc) else of_arguments(args),
        "train": of_rows(study.task.train, study.tokenizer),
        "validation": of_rows(study.task.validation),
        "model": of_model(study.model),
        "seed": number,
        "start": None if start is None else start.key,
    }
    args.output_dir = str(study.out / f"seed-{seed}" / f"{method.name}-{member}-{key_of(depends)}")
    return _Run(own, args, start, seed, member, depends)


def _single(study: Study, run: _Run) -> Learned:
    """Return what came of one run, from its folder if it is there already."""
    folder, log = run.folder, run.folder / "run.json"
    if log.exists():
        noted = json.loads(log.read_text(encoding="utf-8"))
        cost = Cost(noted["seconds"], None, noted.get("memory"), folder_bytes(folder / "posterior"))
        return Learned(load_posterior(folder / "posterior"), cost, run.key)
    start, before = None, Cost(0.0, None, None, 0)
    if run.start is None:
        initialise(study.model, run.args.seed)
    else:
        first = _single(study, run.start)
        start, before = first.posterior, first.cost
    study.report(f"seed {run.seed}: training {run.method.name}, run {run.member + 1}{_differing(run)}")
    began = time.perf_counter()
    with peak_memory(device_of(study.model)) as peak:
        if isinstance(run.method, PostHoc):
            posterior = run.method.fit(
                study.model,
                study.task,
                start=start,
                tokenizer=study.tokenizer,
                seed=run.args.seed,
                token_budget=study.token_budget,
            )
        else:
            posterior = fit(
                study.model, study.task, run.method, run.args, tokenizer=study.tokenizer, start=start, resume=True
            )
    seconds = before.train_seconds + time.perf_counter() - began
    memory = most(before.memory, peak.bytes)
    posterior.save_pretrained(folder / "posterior", overwrite=True)
    with atomic_file(log) as partial:
        noted = {"seconds": seconds, "memory": memory, "depends": run.depends}
        partial.write_text(json.dumps(noted, indent=2), encoding="utf-8")
    return Learned(posterior, Cost(seconds, None, memory, folder_bytes(folder / "posterior")), run.key)


def _differing(run: _Run) -> str:
    """Return what an earlier run in the same place was made with otherwise, as the end of a sentence."""
    found: list[list[str]] = []
    for log in sorted(run.folder.parent.glob(f"{run.method.name}-{run.member}-*/run.json")):
        noted = json.loads(log.read_text(encoding="utf-8"))
        found.append(difference(run.depends, noted.get("depends", {})))
    if not found:
        return ""
    nearest = min(found, key=len)
    return f" (one that is there has other {', '.join(nearest)})"


def planned_steps(study: Study) -> int:
    """Return the optimiser steps of one MAP run.

    Args:
        study: The study.

    Returns:
        The number that the Trainer will take.
    """
    if study.args.max_steps > 0:
        return study.args.max_steps
    rows = len(study.task.train) if study.task.train is not None else 0
    batch = study.args.per_device_train_batch_size * study.args.gradient_accumulation_steps
    return max(1, round(-(-rows // batch) * study.args.num_train_epochs))


def predicted(
    study: Study, posterior: Posterior, key: str, split: Split, stem: Path, name: str, seed: int
) -> tuple[Prediction, int | None]:
    """Return a prediction and the memory that it took, from their files if they are there already.

    Args:
        study: The study.
        posterior: What predicts.
        key: The posterior's key.
        split: What is predicted.
        stem: File of the prediction without its suffix; its own key is added.
        name: The method's name in the tables.
        seed: The seed.

    Returns:
        The prediction, and bytes or None.
    """
    depends = {
        "posterior": key,
        "draws": study.draws,
        "sampling": "independent",
        "seed": seed,
        "rows": of_rows(split, study.tokenizer),
    }
    path = stem.with_name(f"{stem.name}-{key_of(depends)}.safetensors")
    log = path.with_suffix(".json")
    if path.exists():
        noted = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
        return Prediction.load(path), noted.get("memory")
    study.report(f"seed {seed}: {name} answers {split.name} ({len(split)} rows)")
    with peak_memory(device_of(study.model)) as peak:
        prediction = predict(
            study.model,
            posterior,
            split,
            Draws(study.draws, seed),
            tokenizer=study.tokenizer,
            token_budget=study.token_budget,
            options=PassOptions(progress=sys.stderr.isatty()),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(log) as partial:
        partial.write_text(json.dumps({"memory": peak.bytes, "depends": depends}, indent=2), encoding="utf-8")
    prediction.save(path)
    return prediction, peak.bytes
