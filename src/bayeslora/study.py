"""What is the same for all methods of a comparison, and their runs: made once, and kept in a folder.

MAP with seed s is the first member of the ensemble with seed s, and SWAG goes on from MAP at a constant learning rate,
as in its paper; SWAG is MultiSWAG's first run, and what is fitted to a trained adapter is fitted to MAP.
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

from bayeslora.costs import Cost, folder_bytes, most, peak_memory
from bayeslora.engine import predict
from bayeslora.files import replacing
from bayeslora.methods import Ensemble, Map, Method, PostHoc, Swag
from bayeslora.methods.base import settings
from bayeslora.methods.ensemble import member_seed
from bayeslora.params import device_of, initialise
from bayeslora.posteriors import Posterior
from bayeslora.prediction import Prediction
from bayeslora.storage import load_posterior
from bayeslora.tasks.types import Split, Task
from bayeslora.training import fit

SEED_STRIDE = 1000
"""Older versions trained member k of seed s with seed ``s · SEED_STRIDE + k``; see `run_seed`."""


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


def posterior_of(study: Study, method: Method, seed: int) -> tuple[Posterior, Cost]:
    """Return a method's posterior under one seed, made of runs that other methods may share, and what they cost.

    Args:
        study: The study.
        method: The method.
        seed: The seed.

    Returns:
        The posterior, and its cost as if it shared nothing; its prediction is not in it.
    """
    if isinstance(method, Ensemble):
        runs = [_single(study, method.member, seed, k) for k in range(method.members)]
        total = Cost(
            sum(c.train_seconds for _, c in runs),
            None,
            most(*(c.memory for _, c in runs)),
            sum(c.disk for _, c in runs),
        )
        return method.mixture([p for p, _ in runs], study.model), total
    return _single(study, method, seed, 0)


def _single(study: Study, method: Method, seed: int, member: int) -> tuple[Posterior, Cost]:
    """Return the posterior of one run and what it cost, from the folder if it is there already."""
    number = run_seed(study, seed, member)
    variant = json.dumps(settings(method), sort_keys=True)
    plain = json.dumps(settings(type(method)()), sort_keys=True)
    tag = "" if variant == plain else f"-{hashlib.sha256(variant.encode()).hexdigest()[:6]}"
    folder = study.out / f"seed-{seed}" / f"{method.name}{tag}-{member}"
    log = folder / "run.json"
    if log.exists():
        noted = json.loads(log.read_text(encoding="utf-8"))
        cost = Cost(noted["seconds"], None, noted.get("memory"), folder_bytes(folder / "posterior"))
        return load_posterior(folder / "posterior"), cost
    args = copy.copy(study.args)
    args.seed, args.data_seed, args.output_dir = number, None, str(folder)
    start, before, own = None, Cost(0.0, None, None, 0), method
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
    with peak_memory(device_of(study.model)) as peak:
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
    seconds = before.train_seconds + time.perf_counter() - began
    memory = most(before.memory, peak.bytes)
    posterior.save_pretrained(folder / "posterior", overwrite=True)
    with replacing(log) as partial:
        noted = {"settings": settings(method), "seed": number, "seconds": seconds, "memory": memory}
        partial.write_text(json.dumps(noted), encoding="utf-8")
    return posterior, Cost(seconds, None, memory, folder_bytes(folder / "posterior"))


def run_seed(study: Study, seed: int, member: int) -> int:
    """Return the seed that a run is trained with.

    Args:
        study: The study; one that an older version began goes on with the seeds of that version, so that no two runs
            of it have the same.
        seed: The seed of the comparison.
        member: Number of the member; 0 for a run that is no ensemble's.

    Returns:
        The seed for the Trainer.
    """
    logs = (json.loads(log.read_text(encoding="utf-8")) for log in study.out.glob("seed-*/*/run.json"))
    return seed * SEED_STRIDE + member if any("seed" not in log for log in logs) else member_seed(seed, member)


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
    study: Study, posterior: Posterior, split: Split, path: Path, name: str, seed: int
) -> tuple[Prediction, int | None]:
    """Return a prediction and the memory that it took, from their files if they are there already.

    Args:
        study: The study.
        posterior: What predicts.
        split: What is predicted.
        path: File of the prediction.
        name: The method's name in the tables.
        seed: The seed.

    Returns:
        The prediction, and bytes or None.
    """
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
            study.draws,
            seed=seed,
            tokenizer=study.tokenizer,
            token_budget=study.token_budget,
            progress=sys.stderr.isatty(),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(log) as partial:
        partial.write_text(json.dumps({"memory": peak.bytes}), encoding="utf-8")
    prediction.save(path)
    return prediction, peak.bytes
