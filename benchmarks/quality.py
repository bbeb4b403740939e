"""What fewer draws, and one adapter in their place, are worth: measured against many independent draws."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from typing import Any

import torch
from report import row
from timing import in_turn, ratio
from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.metrics.bootstrap import bootstrap
from bayeslora.metrics.classification import accuracy, ece, nll
from bayeslora.metrics.uncertainty import average
from bayeslora.posteriors import Posterior
from bayeslora.tasks.types import Split
from bayeslora.training.distillation import divergences

MANY = 64
ADAPTIVE = bl.Draws(10, tolerance=0.07)
"""As many draws as a row needs for a standard error of .07, ten at most."""
SEEDS = 8
FEW: dict[str, tuple[int, ...]] = {"independent": (10, 5, 4), "antithetic": (4,), "simplex": (5,), "sobol": (4, 5)}
"""How many draws of each kind are looked at."""


def distance(name: str, prediction: Any, reference: Any, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Return how far a prediction's measures are from the reference's, in half-widths of its bootstrap interval."""
    found = []
    for measure, score in (("accuracy", accuracy), ("NLL", nll), ("ECE", ece)):
        low, high = map(float, bootstrap(score, (reference.log_p, labels), resamples=500))
        value = float(score(prediction.log_p, labels))
        centre, half = (low + high) / 2, (high - low) / 2
        found.append(
            row(f"{name}: {measure}, distance in half intervals", abs(value - centre) / half, 1.0, "intervals")
        )
        wanted = float(score(reference.log_p, labels))
        print(f"  {name}: {measure} {value:.4f}, {MANY} draws {wanted:.4f} [{low:.4f}, {high:.4f}]")
    return found


def fewer_draws(model: Any, tokenizer: Any, posterior: Posterior, test: Split) -> list[dict[str, Any]]:
    """Return the rows on as many draws as needed, and on a few that belong together."""

    def ours(**how: Any) -> Any:
        return bl.predict(model, posterior, test, tokenizer=tokenizer, mean=False, **how)

    reference = ours(draws=bl.Draws(MANY, seed=1000), options=bl.PassOptions(stack=False))
    found = ours(draws=ADAPTIVE)
    taken = found.draws_taken.float()
    print(f"  adaptive: {float(taken.mean()):.1f} draws on average, {int(taken.max())} at most")
    rows = distance("adaptive", found, reference, test.labels)
    return rows + few_against_ten(ours, reference.log_p, test.labels)


def few_against_ten(ours: Any, reference: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Return what four or five draws of each kind lose against ten independent ones.

    Two measures: NLL on the labels, and the divergence of the many draws' probabilities, which is the NLL's expectation
    for labels that follow them and has far less noise.
    """
    lost: dict[str, list[tuple[float, float]]] = {}
    best = float(nll(reference, labels))
    for seed in range(SEEDS):
        for sampling, counts in FEW.items():
            found = ours(draws=bl.Draws(max(counts), seed, sampling)).log_probs
            for count in counts:
                log_p = average(found[:count])
                beyond = (float(nll(log_p, labels)) - best, float(divergences(reference, log_p).mean()))
                lost.setdefault(f"{count} {sampling}", []).append(beyond)
    rows = []
    for number, measure in enumerate(("NLL", "divergence")):
        ten = [each[number] for each in lost["10 independent"]]
        for name, values in lost.items():
            own = [each[number] for each in values]
            print(f"  {name}: {measure} beyond {MANY}: {mean_and_error(own)} ({SEEDS} streams)")
            if name != "10 independent":
                excess = [a - b for a, b in zip(own, ten, strict=True)]
                print(f"    beyond ten independent: {mean_and_error(excess)}")
                bound = None if "independent" in name else 0.0
                rows.append(row(f"{name}: {measure} beyond ten independent", statistics.mean(excess), bound, "nats"))
    return rows


def mean_and_error(values: list[float]) -> str:
    """Return a mean and its standard error in words."""
    return f"{statistics.mean(values):+.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def one_adapter(
    model: Any, tokenizer: Any, posterior: Posterior, free: Split, test: Split, rounds: int
) -> list[dict[str, Any]]:
    """Return the rows on the distilled adapter, learned from rows that the posterior has not seen."""
    said = bl.predict(model, posterior, test, 10, tokenizer=tokenizer)
    rows = replace(free, examples=tuple(replace(e, label=None) for e in free))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=8, learning_rate=5e-4, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        one = bl.distill(model, posterior, rows, args, bl.Draws(20, 100, "simplex"), tokenizer=tokenizer)
    answers = bl.predict(model, one, test, 1, tokenizer=tokenizer)
    for name, log_p in (("draws", said.log_p), ("mean", said.mean_log_probs), ("distilled", answers.log_p)):
        measures = [float(score(log_p, test.labels)) for score in (accuracy, nll, ece)]
        print(f"  {name}: accuracy {measures[0]:.3f}, NLL {measures[1]:.3f}, ECE {measures[2]:.3f}")
    if one.origin is not None:
        print(f"  {one.origin.settings}")
    point = bl.Point(posterior.mean, posterior.origin)
    took = in_turn(
        {
            "distilled": lambda: bl.predict(model, one, test, 1, tokenizer=tokenizer),
            "MAP": lambda: bl.predict(model, point, test, 1, tokenizer=tokenizer),
        },
        rounds,
    )
    gap = abs(float(ece(answers.log_p, test.labels) - ece(said.log_p, test.labels)))
    return [
        row(f"distilled from {len(free)} rows: ECE's distance from the draws', {len(test)} rows", gap, 0.02, "ECE"),
        row("distilled / a point, time", ratio(took, "distilled", "MAP"), 1.1),
    ]
