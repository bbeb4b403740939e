"""What is the same for all methods of a comparison, and their runs: made once, and kept in a folder.

MAP with seed s is the first member of the ensemble with seed s, and SWAG goes on from MAP at a constant learning rate,
as in its paper; SWAG is MultiSWAG's first run, and what is fitted to a trained adapter is fitted to MAP.

A run's folder and a prediction's file are named by a key of all that they depend on (`training.keys`). A change makes
a new one beside the old; what is the same is taken from there.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from bayeslora._typing import Tokenizer
from bayeslora.comparison.costs import Cost, folder_bytes, max_known, peak_memory
from bayeslora.files import write_json
from bayeslora.methods import Ensemble, Inference, Map, PostHoc, Swag
from bayeslora.methods.checkpoints import checkpoints
from bayeslora.methods.ensemble import member_seed
from bayeslora.metrics.prediction import Prediction
from bayeslora.params import device_of, initialise
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.transforms import tempered
from bayeslora.prediction import PassOptions, predict
from bayeslora.processes import first
from bayeslora.tasks.types import Split, Task
from bayeslora.training import keys
from bayeslora.training.run import fit


@dataclass(frozen=True)
class CachedRuns:
    """What is the same for all methods of a comparison, and the folder of their runs."""

    model: nn.Module  # a PEFT model, whose adapter is drawn anew for each run
    tokenizer: Tokenizer | None  # None for the one that was saved with the model
    task: Task
    args: TrainingArguments  # of one run; seed and folder are set for each
    out: Path
    ood: Mapping[str, Split] = field(default_factory=dict)  # other data, to tell from the task's test split
    swag_share: float = 0.5  # length of SWAG's phase, as a share of MAP's optimiser steps
    # Temperatures of the covariance to choose from, by the validation split's NLL, for every method with noise; and
    # whether temperature scaling is fitted to every method on it, by its labels or without them, by what the base says.
    # All results have rows of their own.
    temperatures: Sequence[float] = ()
    scaling: bool = False
    scaling_without_labels: bool = False
    # The mean divergence κ to which every method's noise is scaled, on rows of its own; None for no such rows.
    divergence: float | None = None
    draws: int | Draws = 10  # with the seed of the run
    token_budget: int | None = None
    resamples: int = 1000
    bins: int = 15
    report: Callable[[str], None] = print  # called with one line when something begins
    callbacks: Sequence[TrainerCallback] = ()  # more for the Trainer, which change nothing that is learned

    @property
    def test(self) -> Split:
        """The test rows, without which `compare` does not begin."""
        assert self.task.test is not None
        return self.task.test

    @cached_property
    def inputs(self) -> keys.Parts:
        """What every run depends on, looked at once: `compare` makes a copy of its own."""
        return keys.inputs(self.model, self.task, self.tokenizer)


@dataclass(frozen=True)
class Learned:
    """What came of a method under one seed, what it cost without its prediction, and the key of what it depends on."""

    posterior: Posterior
    cost: Cost
    key: str

    def tempered(self, temperature: float) -> Learned:
        """Return what was learned with another temperature of the covariance."""
        return replace(self.keyed(temperature), posterior=tempered(self.posterior, temperature))

    def keyed(self, temperature: float) -> Learned:
        """Return the same under the key of another temperature."""
        return replace(self, key=keys.key_of({"posterior": self.key, "temperature": float(temperature)}))


@dataclass(frozen=True)
class Run:
    """One run before it is made: method, arguments and start, and all that it depends on."""

    method: Inference
    args: TrainingArguments
    start: Run | None
    seed: int
    member: int
    depends: keys.Parts

    @property
    def key(self) -> str:
        """The run's key."""
        return keys.key_of(self.depends)

    @property
    def folder(self) -> Path:
        """The run's folder, named by its key."""
        return Path(self.args.output_dir)


def learned(runs: CachedRuns, method: Inference, seed: int) -> Learned:
    """Return a method's posterior under one seed, made of runs that other methods may share."""
    if not isinstance(method, Ensemble):
        return _made(runs, planned(runs, method, seed))
    members = [_made(runs, planned(runs, method.member, seed, k)) for k in range(method.members)]
    cost = Cost(
        sum(member.cost.train_seconds for member in members),
        None,
        max_known(*(member.cost.memory for member in members)),
        sum(member.cost.disk for member in members),
    )
    key = keys.key_of({"members": [member.key for member in members], "dropout_draws": method.dropout_draws})
    return Learned(method.mixture([member.posterior for member in members], runs.model), cost, key)


def planned(runs: CachedRuns, method: Inference, seed: int, member: int = 0) -> Run:
    """Return the run of a method that is the member of a seed."""
    number = member_seed(seed, member)
    start = planned(runs, Map(), seed, member) if isinstance(method, (Swag, PostHoc)) else None
    args = copy.copy(runs.args)
    args.seed, args.data_seed = number, None
    if isinstance(method, Swag):
        args.max_steps = max(2, round(runs.swag_share * planned_steps(runs)))
        method = replace(method, start=0, learning_rate=method.learning_rate or runs.args.learning_rate / 10)
    depends = {
        "method": keys.of_method(method),
        "training": None if isinstance(method, PostHoc) else keys.of_arguments(args),
        "seed": number,
        "start": None if start is None else start.key,
        **runs.inputs,
    }
    args.output_dir = str(runs.out / f"seed-{seed}" / f"{method.name}-{member}-{keys.key_of(depends)}")
    return Run(method, args, start, seed, member, depends)


def planned_steps(runs: CachedRuns) -> int:
    """Return the optimiser steps that the Trainer will take in one MAP run."""
    if runs.args.max_steps > 0:
        return runs.args.max_steps
    rows = len(runs.task.train) if runs.task.train is not None else 0
    batch = runs.args.per_device_train_batch_size * runs.args.gradient_accumulation_steps * runs.args.world_size
    return max(1, round(-(-rows // batch) * runs.args.num_train_epochs))


def predicted(
    runs: CachedRuns,
    result: Learned,
    split: Split,
    seed: int,
    name: str,
    file: str = "",  # in place of the name
) -> tuple[Prediction, int | None]:
    """Return a prediction and the memory that it took, from their files if they are there already."""
    depends = {"posterior": result.key, **prediction_inputs(runs, split, seed)}
    stem = f"seed-{seed}/{(file or name).replace(':', '-').replace(' ', '-')}"
    draws = replace(Draws.of(runs.draws), seed=seed)
    words = f"seed {seed}: {name} answers {split.name} ({len(split)} rows)"
    return stored(runs, stem, depends, words, lambda: predicted_by(runs, result.posterior, split, draws))


def predicted_by(runs: CachedRuns, posterior: Posterior, split: Split, draws: Draws) -> Prediction:
    """Return what a posterior says about a split."""
    return predict(
        runs.model,
        posterior,
        split,
        draws,
        tokenizer=runs.tokenizer,
        token_budget=runs.token_budget,
        options=PassOptions(progress=sys.stderr.isatty()),
    )


def stored(
    runs: CachedRuns, stem: str, depends: keys.Parts, words: str, make: Callable[[], Prediction]
) -> tuple[Prediction, int | None]:
    """Return a prediction and the memory that it took, made unless its files are there; ``words`` say what is made."""
    path = runs.out / f"{stem}-{keys.key_of(depends)}.safetensors"
    log = path.with_suffix(".json")
    if first(path.exists):
        record = json.loads(log.read_text(encoding="utf-8")) if log.exists() else {}
        return Prediction.load(path), record.get("memory")
    runs.report(words)
    with peak_memory(device_of(runs.model)) as peak:
        prediction = make()

    def keep() -> None:
        """Write the prediction, after its record."""
        write_json(log, {"memory": peak.bytes, "depends": depends})
        prediction.save(path)

    first(keep)
    return prediction, peak.bytes


def prediction_inputs(runs: CachedRuns, split: Split, seed: int) -> keys.Parts:
    """Return what a prediction depends on beside the posterior, which knows the model and the tokenizer."""
    return {"draws": asdict(replace(Draws.of(runs.draws), seed=seed)), "rows": keys.of_rows(split)}


def _made(runs: CachedRuns, run: Run) -> Learned:
    """Return what came of one run, from its folder if it is there already."""
    folder, log = run.folder / "posterior", run.folder / "run.json"
    if not first(log.exists):
        start = None if run.start is None else _made(runs, run.start)
        seconds, memory = (0.0, None) if start is None else (start.cost.train_seconds, start.cost.memory)
        runs.report(f"seed {run.seed}: training {run.method.name}, run {run.member + 1}{_differing(run)}")
        began = time.perf_counter()
        with peak_memory(device_of(runs.model)) as peak:
            posterior = _trained(runs, run.method, run.args, None if start is None else start.posterior)
        seconds += time.perf_counter() - began
        record = {"seconds": seconds, "memory": max_known(memory, peak.bytes), "depends": run.depends}
        first(lambda: _keep(runs, run, posterior, record))
    record = json.loads(log.read_text(encoding="utf-8"))
    cost = Cost(record["seconds"], None, record["memory"], folder_bytes(folder))
    return Learned(load_posterior(folder), cost, run.key)


def _keep(runs: CachedRuns, run: Run, posterior: Posterior, record: Mapping[str, object]) -> None:
    """Write what came of a run, the record last."""
    posterior.save_pretrained(run.folder / "posterior", overwrite=True)
    write_json(run.folder / "run.json", record)
    if runs.args.save_strategy == SaveStrategy.NO:  # those of the clock and of signals serve no more
        for checkpoint in checkpoints(run.folder):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _trained(runs: CachedRuns, method: Inference, args: TrainingArguments, start: Posterior | None) -> Posterior:
    """Return the posterior of one run, made."""
    model, task, tokenizer, budget = runs.model, runs.task, runs.tokenizer, runs.token_budget
    if start is None:
        initialise(model, args.seed)
    if isinstance(method, PostHoc):
        return method.fit(
            model, task, start=start, tokenizer=tokenizer, seed=args.seed, token_budget=budget,
            progress=not args.disable_tqdm,
        )  # fmt: skip
    return fit(model, task, method, args, tokenizer=tokenizer, start=start, resume=True, callbacks=runs.callbacks)


def _differing(run: Run) -> str:
    """Return what an earlier run in the same place was made with otherwise, as the end of a sentence."""
    logs = run.folder.parent.glob(f"{run.method.name}-{run.member}-*/run.json")
    parts = [json.loads(log.read_text(encoding="utf-8")).get("depends", {}) for log in sorted(logs)]
    differences = [keys.difference(run.depends, others) for others in parts]
    nearest = min(differences, key=len, default=[])
    return f" (one that is there has other {', '.join(nearest)})" if nearest else ""
