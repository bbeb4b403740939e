"""Noise scaled by the divergence of the answers: which one is right, and what it does for over-confident adapters.

Adapters are trained until they are over-confident: all-MiniLM-L6-v2 with a head, and SmolLM2 by the likelihood of the
choices. Each posterior's noise is scaled to each divergence κ on anchors without labels, and judged on other rows. Both
are held out of the training data: no test row is looked at, for κ's default is chosen here. Beside them stand MAP, each
method's own scale (TFB's tolerance, isotropic noise and Laplace's prior by the labels of the anchors), and
temperature scaling by the same labels. What a run gives is kept in ``--out`` and not made again.

    OMP_NUM_THREADS=1 python benchmarks/divergence.py --data DATA --out runs --json divergence.json
    OMP_NUM_THREADS=1 python benchmarks/divergence.py --data DATA --out runs --settings smollm2-sst2 --seeds 0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import LoraConfig
from report import finish, row

import bayeslora as bl
from bayeslora.cli.build import build_arguments
from bayeslora.cli.data import build_task
from bayeslora.cli.demo.model import demo_encoder, demo_model
from bayeslora.cli.options import TaskOptions, TrainingOptions
from bayeslora.comparison.cached_runs import CachedRuns, learned, predicted
from bayeslora.comparison.scaled_runs import scaled_by_divergence
from bayeslora.methods import Inference, Isotropic, Laplace, Map, Swag, Temperature, Tfb
from bayeslora.metrics.classification import accuracy, ece, nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.tasks.types import Task

GRID = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3)
METHODS: dict[str, Inference] = {
    "isotropic": Isotropic("validation"),
    "tfb": Tfb(),
    "laplace": Laplace(),
    "swag": Swag(),
}
OWN = {"isotropic": "σ by labels", "tfb": "tolerance", "laplace": "prior by labels", "swag": "½"}
"""What each method's noise is held by without a divergence."""


@dataclass(frozen=True)
class Setting:
    """A model and a task, with how many rows are trained on, scaled on (anchors) and judged on."""

    task: str
    encoder: bool
    rows: int = 200
    anchors: int = 100
    judges: int = 300
    epochs: float = 12
    learning_rate: float = 2e-3
    draws: int = 10


SETTINGS = {
    "minilm-sst2": Setting("sst2", True),
    "minilm-trec": Setting("trec", True),
    "smollm2-sst2": Setting("sst2", False, 100, 24, 100, 4, 1e-3, 5),
    "smollm2-arc_easy": Setting("arc_easy", False, 60, 16, 48, 4, 1e-3, 5),
    "smollm2-openbookqa": Setting("openbookqa", False, 60, 16, 48, 4, 1e-3, 5),
}


def prepared(args: argparse.Namespace, name: str) -> CachedRuns:
    """Return what is the same for all methods of a setting: the anchors as validation rows, the judges as test rows."""
    setting = SETTINGS[name]
    options = TaskOptions(
        task=setting.task, data=args.data, readout="head" if setting.encoder else "likelihood",
        validation=setting.anchors + setting.judges, train_rows=setting.rows,
    )  # fmt: skip
    task = build_task(options)
    held_out = task.validation
    assert task.train is not None
    assert held_out is not None
    judges = replace(held_out.take(list(range(setting.anchors, len(held_out)))), name=f"{setting.task}/judges")
    task = Task(task.name, task.train, held_out.take(list(range(setting.anchors))), judges)
    modules = ["query", "value"] if setting.encoder else ["q_proj", "v_proj"]
    adapter = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.1, target_modules=modules,
        task_type="SEQ_CLS" if setting.encoder else "CAUSAL_LM",
    )  # fmt: skip
    folder = demo_encoder() if setting.encoder else demo_model()
    model, tokenizer = bl.load_model(folder, task.train.classes, adapter=adapter, dtype=torch.float32)
    training = TrainingOptions(epochs=setting.epochs, batch_size=8, learning_rate=setting.learning_rate)
    out = Path(args.out) / name
    return CachedRuns(model, tokenizer, task, build_arguments(training, out, 0), out, draws=setting.draws)


def measured(prediction: Prediction, labels: torch.Tensor) -> dict[str, float]:
    """Return the measures of a prediction of the judges."""
    log_p = prediction.log_p
    return {"NLL": float(nll(log_p, labels)), "ECE": float(ece(log_p, labels)), "acc": float(accuracy(log_p, labels))}


Found = dict[str, dict[str, float]]


def judged(args: argparse.Namespace, name: str, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the measures of each way to hold the noise, by its name; those that fail are left out, and said."""
    runs = prepared(args, name)
    labels, point = runs.test.labels, learned(runs, Map(), seed)
    yield "map", measured(predicted(runs, point, runs.test, seed, "map")[0], labels)
    yield "map + T", measured(predicted(runs, learned(runs, Temperature(), seed), runs.test, seed, "map-T")[0], labels)
    for method in args.methods:
        try:
            fitted = learned(runs, METHODS[method], seed)
        except bl.InputError as error:
            print(f"{name}, seed {seed}, {method}: {error}", flush=True)
            continue
        yield f"{method}, {OWN[method]}", measured(predicted(runs, fitted, runs.test, seed, method)[0], labels)
        for divergence in args.grid:
            way = f"{method}, {divergence:g}"
            try:
                scaled = scaled_by_divergence(runs, fitted, method, seed, divergence)
            except bl.InputError as error:
                print(f"{name}, seed {seed}, {way}: {error}", flush=True)
                continue
            assert scaled is not None
            prediction = predicted(runs, scaled[0], runs.test, seed, way, f"{method}-{divergence:g}")[0]
            yield way, measured(prediction, labels) | {"scale": scaled[1]}


def reported(results: dict[tuple[str, int], Found], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return means over seeds of each setting, means over settings, and where the NLL over all methods is lowest."""
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
            rows.append(
                row(f"κ = {divergence:g}: NLL less MAP's over methods and settings", fmean(change), None, "nats")
            )
            better = sum(c < 0 for c in change) / len(change)
            rows.append(row(f"κ = {divergence:g}: share that is better than MAP", better, None, "share"))
            rows.append(row(f"κ = {divergence:g}: of so many", len(change), None, "runs"))
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
