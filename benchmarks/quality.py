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
from bayeslora.bootstrap import bootstrap
from bayeslora.metrics import accuracy, ece, nll
from bayeslora.posteriors import Posterior
from bayeslora.tasks.types import Split

MANY = 64
ADAPTIVE = {"draws": 10, "tolerance": 0.07}
"""As many draws as a row needs for a standard error of .07, ten at most."""
SEEDS = 8


def distance(name: str, prediction: Any, reference: Any, labels: torch.Tensor) -> list[dict[str, Any]]:
    """Return how far a prediction's measures are from the reference's, in half-widths of its bootstrap interval."""
    found = []
    for measure, score in (("accuracy", accuracy), ("NLL", nll), ("ECE", ece)):
        low, high = bootstrap(score, reference.log_p, labels, resamples=500)
        value = score(prediction.log_p, labels)
        centre, half = (low + high) / 2, (high - low) / 2
        found.append(
            row(f"{name}: {measure}, distance in half intervals", abs(value - centre) / half, 1.0, "intervals")
        )
        wanted = score(reference.log_p, labels)
        print(f"  {name}: {measure} {value:.4f}, {MANY} draws {wanted:.4f} [{low:.4f}, {high:.4f}]")
    return found


def fewer_draws(model: Any, tokenizer: Any, posterior: Posterior, test: Split) -> list[dict[str, Any]]:
    """Return the rows on adaptive, antithetic and quasi-random draws."""

    def ours(**how: Any) -> Any:
        return bl.predict(model, posterior, test, tokenizer=tokenizer, mean=False, **how)

    reference = ours(draws=MANY, seed=1000, stack=False)
    found = ours(**ADAPTIVE)
    taken = found.draws_taken.float()
    print(f"  adaptive: {float(taken.mean()):.1f} draws on average, {int(taken.max())} at most")
    rows = distance("adaptive", found, reference, test.labels)
    excess: dict[str, list[float]] = {}
    best = nll(reference.log_p, test.labels)
    for seed in range(SEEDS):
        for name, draws, sampling in (
            ("ten independent", 10, "independent"), ("five independent", 5, "independent"),
            ("four antithetic", 4, "antithetic"), ("four Sobol", 4, "sobol"), ("five Sobol", 5, "sobol"),
        ):  # fmt: skip
            value = nll(ours(draws=draws, seed=seed, sampling=sampling).log_p, test.labels) - best
            excess.setdefault(name, []).append(value)
    for name, values in excess.items():
        spread = statistics.stdev(values) / len(values) ** 0.5
        print(f"  {name}: NLL less that of {MANY}: {statistics.mean(values):+.4f} ± {spread:.4f} ({SEEDS} streams)")
    ten = statistics.mean(excess["ten independent"])
    for name in ("five independent", "four antithetic", "four Sobol", "five Sobol"):
        bound = None if name == "five independent" else 0.0
        rows.append(
            row(f"{name}: NLL beyond that of ten independent", statistics.mean(excess[name]) - ten, bound, "nats")
        )
    return rows


def one_adapter(
    model: Any, tokenizer: Any, posterior: Posterior, free: Split, test: Split, rounds: int
) -> list[dict[str, Any]]:
    """Return the rows on the distilled adapter, learned from rows that the posterior has not seen."""
    said = bl.predict(model, posterior, test, 10, tokenizer=tokenizer)
    rows = replace(free, examples=tuple(replace(e, label=None) for e in free))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=4, per_device_train_batch_size=8, learning_rate=2e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        one = bl.distill(model, posterior, rows, args, 20, seed=100, tokenizer=tokenizer)
    answers = bl.predict(model, one, test, 1, tokenizer=tokenizer)
    for name, log_p in (("draws", said.log_p), ("mean", said.mean_log_probs), ("distilled", answers.log_p)):
        measures = [score(log_p, test.labels) for score in (accuracy, nll, ece)]
        print(f"  {name}: accuracy {measures[0]:.3f}, NLL {measures[1]:.3f}, ECE {measures[2]:.3f}")
    point = bl.Point(posterior.mean, posterior.origin)
    took = in_turn(
        {
            "distilled": lambda: bl.predict(model, one, test, 1, tokenizer=tokenizer),
            "MAP": lambda: bl.predict(model, point, test, 1, tokenizer=tokenizer),
        },
        rounds,
    )
    gap = abs(ece(answers.log_p, test.labels) - ece(said.log_p, test.labels))
    return [
        row(f"distilled from {len(free)} rows: ECE's distance from the draws', {len(test)} rows", gap, 0.02, "ECE"),
        row("distilled / a point, time", ratio(took, "distilled", "MAP"), 1.1),
    ]
