"""What Laplace's fit costs beside the training of its adapter where there are many classes, and what sampling changes.

In one run on the same rows: MAP's training, Laplace's fit with sampled labels, and the fit with a backward pass for
every class, which is timed on a part of the rows and scaled by their number; and how far the curvature of sampled
labels is from that of all, on those rows.

Times are the processor's, for a CPU: give it one thread.

    OMP_NUM_THREADS=1 python benchmarks/many_classes.py --data CLINC150 --json many_classes.json

``--data`` has train, validation and test files of texts with labels, such as CLINC150 (Larson et al. 2019, CC BY 3.0).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from report import finish, row
from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.cli.demo.model import demo_encoder
from bayeslora.methods.base import TrainedAdapter
from bayeslora.methods.laplace.ggn import DiagonalCurvature
from bayeslora.methods.laplace.method import CANDIDATES, SAMPLES, linearised_nlls, summed
from bayeslora.prediction.jacobians import linear_sites
from bayeslora.tasks.types import Task


def seconds(work: Callable[[], Any]) -> float:
    """Return the processor's time, so that what else the machine does is no fault of what is measured."""
    began = time.process_time()
    work()
    return time.process_time() - began


def trained(model: Any, tokenizer: Any, task: Task, options: argparse.Namespace) -> tuple[float, bl.Posterior]:
    """Return how long MAP takes, and what it learned."""
    found: list[bl.Posterior] = []
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=options.epochs, per_device_train_batch_size=16,
            learning_rate=options.learning_rate, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        took = seconds(lambda: found.append(bl.fit(model, task, bl.Map(), args, tokenizer=tokenizer)))
    return took, found[0]


def curvature_errors(adapter: TrainedAdapter, exact: DiagonalCurvature) -> list[dict[str, Any]]:
    """Return the rows on the relative error of the sampled curvature's diagonal, over eight seeds."""
    found, sites = [], exact.sites
    wanted = torch.cat([h.flatten() for h in exact.sums.values()])
    for samples in (1, SAMPLES):
        squares = []
        for seed in range(8):
            sampled = DiagonalCurvature(sites)
            summed(replace(adapter, seed=seed), sampled, samples)
            squares.append((torch.cat([h.flatten() for h in sampled.sums.values()]) - wanted).square().sum())
        error = float(torch.stack(squares).mean().sqrt() / wanted.norm())
        found.append(row(f"relative error of the curvature, {samples} labels a row", error, None))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the data")
    parser.add_argument("--train-rows", type=int, default=1300)
    parser.add_argument("--few", type=int, default=8, help="rows that all classes are passed for")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--json")
    args = parser.parse_args()
    columns = {"text": "text", "label": "label"}
    task = bl.load_task(None, args.data, readout="head", columns=columns, train_rows=args.train_rows)
    assert task.train is not None
    assert task.validation is not None
    model, tokenizer = bl.load_model(demo_encoder(), task.train.classes, readout="head")
    map_took, point = trained(model, tokenizer, task, args)
    print(f"MAP: {map_took:.1f} s for {len(task.train)} rows", flush=True)
    fits: list[Any] = []
    sampled_took = seconds(
        lambda: fits.append(bl.Laplace().fit(model, task, start=point, tokenizer=tokenizer, progress=False))
    )
    print(f"Laplace, sampled labels: {sampled_took:.1f} s, {len(task.validation)} validation rows", flush=True)
    few = replace(task, train=task.train.take(range(args.few)), validation=task.validation.take(range(args.few)))
    adapter = TrainedAdapter(model, few, point, point.require_origin(), tokenizer, 0, None)
    exact = DiagonalCurvature(linear_sites(model))
    curvature_took = seconds(lambda: summed(adapter, exact, 0))
    print(f"curvature of {args.few} rows, all labels: {curvature_took:.1f} s", flush=True)
    gaussian = fits[0].posterior
    candidates = [replace(gaussian, precision=precision) for precision in CANDIDATES]
    prior_took = seconds(lambda: linearised_nlls(adapter, few.validation, candidates))
    print(f"prior precision on {args.few} rows, all classes: {prior_took:.1f} s", flush=True)
    scaled = curvature_took * len(task.train) / args.few + prior_took * len(task.validation) / args.few
    finish(
        [
            row("Laplace's fit, sampled labels / MAP's training", sampled_took / map_took, 1.0),
            row(f"the same, all labels (scaled from {args.few} rows)", scaled / map_took, None),
            *curvature_errors(adapter, exact),
        ],
        args.json,
    )


if __name__ == "__main__":
    main()
