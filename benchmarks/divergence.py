"""Noise scaled by the divergence of the answers: which one is right, and what it does for over-confident adapters.

Adapters are trained until they are over-confident: all-MiniLM-L6-v2 with a head, and SmolLM2 by the likelihood of the
choices. Each posterior's noise is scaled to each divergence κ on anchors without labels, and judged on other rows. Both
are held out of the training data: no test row is looked at, for κ's default is chosen here. Posteriors are asked at
scales a factor of 1.7 or 1.3 apart, and what they come to is interpolated by the logarithm of κ. Beside them stand MAP,
each method's own scale (TFB's tolerance, isotropic noise and Laplace's prior by the labels of the anchors), and
temperature scaling by the same labels. What a run gives is kept in ``--out`` and not made again.

    OMP_NUM_THREADS=1 python benchmarks/divergence.py --data DATA --out runs --json divergence.json
    OMP_NUM_THREADS=1 python benchmarks/divergence.py --data DATA --out runs --settings smollm2-sst2 --seeds 0
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import LoraConfig
from report import finish, row
from torch import Tensor

import bayeslora as bl
from bayeslora.cli.build import build_arguments
from bayeslora.cli.data import build_task
from bayeslora.cli.demo.model import demo_encoder, demo_model
from bayeslora.cli.options import TaskOptions, TrainingOptions
from bayeslora.comparison.cached_runs import CachedRuns, Learned, learned, predicted
from bayeslora.methods import Inference, Isotropic, Laplace, Map, Swag, Temperature, Tfb
from bayeslora.metrics.classification import accuracy, ece, nll
from bayeslora.metrics.uncertainty import average, divergences
from bayeslora.tasks.types import Split, Task

GRID = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
STEP = 0.75
"""Between two scales: the logarithm of their ratio, to base 2."""
COARSE = 3.5
"""Where the divergence grows by more from one scale to the next, one between them is looked at too."""
METHODS: dict[str, Inference] = {
    "isotropic": Isotropic("validation", draws=5),
    "tfb": Tfb(most_anchors=100, draws=5),
    "laplace": Laplace(),
    "swag": Swag(),
}
OWN = {"isotropic": "σ by labels", "tfb": "tolerance", "laplace": "prior by labels", "swag": "½"}
"""What each method's noise is held by without a divergence."""


@dataclass(frozen=True)
class Setting:
    """A model and a task, with how many rows are trained on, scaled on (anchors) and judged on, and held out in all."""

    task: str
    encoder: bool
    rows: int = 200
    anchors: int = 100
    judges: int = 200
    epochs: float = 12
    learning_rate: float = 2e-3
    held_out: int = 400


SETTINGS = {
    "minilm-sst2": Setting("sst2", True),
    "minilm-trec": Setting("trec", True),
    "smollm2-sst2": Setting("sst2", False, 100, 24, 72, 4, 1e-3, 96),
    "smollm2-arc_easy": Setting("arc_easy", False, 60, 16, 48, 4, 1e-3, 64),
    "smollm2-openbookqa": Setting("openbookqa", False, 60, 16, 48, 4, 1e-3, 64),
}


def prepared(args: argparse.Namespace, name: str) -> CachedRuns:
    """Return what is the same for all methods of a setting: the anchors are its validation rows.

    What is predicted, in the place of test rows, are the anchors and then the judges.
    """
    setting = SETTINGS[name]
    options = TaskOptions(
        task=setting.task, data=args.data, readout="head" if setting.encoder else "likelihood",
        validation=setting.held_out, train_rows=setting.rows,
    )  # fmt: skip
    task = build_task(options)
    held_out = task.validation
    assert task.train is not None
    assert held_out is not None
    asked = held_out.take(list(range(setting.anchors + setting.judges)))
    task = Task(task.name, task.train, held_out.take(list(range(setting.anchors))), asked)
    modules = ["query", "value"] if setting.encoder else ["q_proj", "v_proj"]
    adapter = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=modules,
        task_type="SEQ_CLS" if setting.encoder else "CAUSAL_LM",
    )  # fmt: skip
    folder = demo_encoder() if setting.encoder else demo_model()
    model, tokenizer = bl.load_model(folder, task.train.classes, adapter=adapter, dtype=torch.float32)
    training = TrainingOptions(epochs=setting.epochs, batch_size=8, learning_rate=setting.learning_rate)
    out = Path(args.out) / name
    return CachedRuns(model, tokenizer, task, build_arguments(training, out, 0), out, draws=args.draws)


def measured(log_probs: Tensor, runs: CachedRuns) -> dict[str, float]:
    """Return the measures of draws' answers [S N C], over the judges."""
    log_p, labels = average(log_probs)[len(anchors_of(runs)) :], runs.test.labels[len(anchors_of(runs)) :]
    return {"NLL": float(nll(log_p, labels)), "ECE": float(ece(log_p, labels)), "acc": float(accuracy(log_p, labels))}


def anchors_of(runs: CachedRuns) -> Split:
    """Return the anchors, with which the rows that are predicted begin."""
    assert runs.task.validation is not None
    return runs.task.validation


Points = list[dict[str, float]]


def path(runs: CachedRuns, fitted: Learned, name: str, seed: int, grid: list[float]) -> Points:
    """Return divergence and measures at scales that are a step apart, from the least divergence to the most."""
    plain = predicted(runs, fitted, runs.test, seed, name)[0]
    assert plain.mean_log_probs is not None
    mean, count = plain.mean_log_probs, len(anchors_of(runs))
    noise = (plain.log_probs - mean).masked_fill(torch.isneginf(mean), 0.0)

    def point(k: float) -> dict[str, float]:
        """Return divergence and measures at the scale 2^(STEP·k)."""
        log_probs = plain.log_probs
        if k and fitted.posterior.noise_in_logits:
            log_probs = (mean + 2 ** (STEP * k) * noise).log_softmax(-1)
        elif k:
            words = f"{name}-{k:g}"
            log_probs = predicted(runs, fitted.tempered(2 ** (2 * STEP * k)), runs.test, seed, words)[0].log_probs
        kl = float(divergences(mean[:count].double(), average(log_probs)[:count].double()).mean())
        return {"scale": 2 ** (STEP * k), "divergence": kl} | measured(log_probs, runs)

    points, low, high = [point(0)], 0, 0
    while points[0]["divergence"] > min(grid):
        points.insert(0, point(low := low - 1))
    while points[-1]["divergence"] < max(grid) and high < 12:
        points.append(point(high := high + 1))
    steps = [float(k) for k in range(low, high + 1)]
    for k in range(len(steps) - 1, 0, -1):
        if points[k]["divergence"] > COARSE * points[k - 1]["divergence"] and points[k]["divergence"] > min(grid):
            points.insert(k, point((steps[k] + steps[k - 1]) / 2))
    return points


def at(points: Points, divergence: float) -> dict[str, float] | None:
    """Return the measures where the divergence is first reached, between two scales by its logarithm; None if never."""
    for before, after in pairwise(points):
        if before["divergence"] <= divergence < after["divergence"]:
            low, high = (math.log(max(1e-9, each["divergence"])) for each in (before, after))
            share = (math.log(divergence) - low) / (high - low)
            return {key: before[key] + share * (after[key] - before[key]) for key in before}
    return None


Found = dict[str, dict[str, float]]


def judged(args: argparse.Namespace, name: str, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the measures of each way to hold the noise, by its name; those that fail are left out, and said."""
    runs = prepared(args, name)
    for way, method in (("map", Map()), ("map + T by labels", Temperature(prior_sigma=math.inf))):
        yield way, measured(predicted(runs, learned(runs, method, seed), runs.test, seed, way)[0].log_probs, runs)
    for method_name in args.methods:
        try:
            fitted = learned(runs, METHODS[method_name], seed)
        except bl.InputError as error:
            print(f"{name}, seed {seed}, {method_name}: {error}", flush=True)
            continue
        points = path(runs, fitted, method_name, seed, args.grid)
        yield f"{method_name}, {OWN[method_name]}", next(point for point in points if point["scale"] == 1)
        for point in points:
            print("   " + "  ".join(f"{key} {value:.4g}" for key, value in point.items()), flush=True)
        for divergence in args.grid:
            found = at(points, divergence)
            if found is not None:
                yield f"{method_name}, {divergence:g}", found


def reported(results: dict[tuple[str, int], Found], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return means over seeds of each setting, means over settings, and the NLL over all methods by divergence."""
    rows = []
    names = list(dict.fromkeys(name for name, _ in results))
    ways = list(dict.fromkeys(way for found in results.values() for way in found))
    for measure in ("NLL", "ECE", "acc"):
        for way in ways:
            by_setting = []
            for name in names:
                values = [f[way][measure] for (n, _), f in results.items() if n == name and way in f]
                if values:
                    by_setting.append(fmean(values))
                    rows.append(row(f"{name}: {way}: {measure}", by_setting[-1], None, measure))
                if len(values) > 1:
                    rows.append(row(f"{name}: {way}: {measure}, sd", stdev(values), None, measure))
            if len(by_setting) == len(names) > 1:
                rows.append(row(f"all: {way}: {measure}", fmean(by_setting), None, measure))
    for divergence in args.grid:
        change = [
            found[f"{method}, {divergence:g}"]["NLL"] - found["map"]["NLL"]
            for found in results.values()
            for method in args.methods
            if f"{method}, {divergence:g}" in found
        ]
        if change:
            rows.append(row(f"κ = {divergence:g}: NLL less MAP's, mean over all", fmean(change), None, "nats"))
            rows.append(row(f"κ = {divergence:g}: better than MAP", sum(c < 0 for c in change), None, "runs"))
            rows.append(row(f"κ = {divergence:g}: of", len(change), None, "runs"))
    return rows


def main() -> None:
    """Make what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the tasks' data")
    parser.add_argument("--out", default="divergence-runs", help="folder of the runs")
    parser.add_argument("--settings", nargs="+", default=["minilm-sst2", "minilm-trec"], choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--grid", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--json", help="file for the report")
    args = parser.parse_args()
    results: dict[tuple[str, int], Found] = {}
    for seed in args.seeds:
        for name in args.settings:
            results[name, seed] = {}
            for way, measures in judged(args, name, seed):
                results[name, seed][way] = measures
                print(
                    f"{name}, seed {seed}, {way}: " + "  ".join(f"{k} {v:.4g}" for k, v in measures.items()), flush=True
                )
    finish(reported(results, args), args.json)


if __name__ == "__main__":
    main()
