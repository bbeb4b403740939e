"""One-draw prediction and one training step beside plain transformers + peft, as ratios from one run.

The plain way is what research scripts do: full logits for every position, rows in the order of the file, padded batches
of 16, and every choice's text as its own sequence where answers are read by likelihood. Ours is `bayeslora.predict` and
the training step that `bayeslora.fit` gives the stock Trainer. Both use the same rows, model, dtype and adapter; the
two are timed in turn, and the figure is the median of the pairs' ratios.

    python benchmarks/baseline.py --data DATA --model MODEL --json baseline.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from plain import BATCH, batches_of, plain_logits
from report import finish, row
from torch.nn import functional

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import read
from bayeslora.posteriors import Point
from bayeslora.prediction.readouts import readout_for

BOUND = 0.9


def paired(ours: Callable[[], None], theirs: Callable[[], None], runs: int) -> list[float]:
    """Return the ratio of times, ours to theirs, of each pair of runs."""
    ratios = []
    for f in (ours, theirs):
        f()
    for i in range(runs):
        took = {}
        for f in (ours, theirs) if i % 2 == 0 else (theirs, ours):
            began = time.perf_counter()
            f()
            took[f] = time.perf_counter() - began
        ratios.append(took[ours] / took[theirs])
        print(f"  pair {i + 1}: {took[ours]:.2f} s against {took[theirs]:.2f} s, ratio {ratios[-1]:.2f}", flush=True)
    return ratios


def measure(model: Any, tokenizer: Any, task: Any, readout: str, runs: int) -> list[dict[str, Any]]:
    """Return the rows of one readout: prediction and training step."""
    posterior = Point(read(model))
    test, train = task.test, task.train

    def plain_predict() -> None:
        model.eval()
        with torch.inference_mode():
            for batch in batches_of(test):
                plain_logits(model, tokenizer, batch, readout).log_softmax(-1)

    def plain_train() -> None:
        model.train()
        for batch in batches_of(train):
            functional.cross_entropy(plain_logits(model, tokenizer, batch, readout), batch.labels).backward()
        model.zero_grad()

    reader = readout_for(model, train, tokenizer)
    rows, _ = reader.encode(train)

    def our_train() -> None:
        model.train()
        with reader.attached(model):
            for i in range(0, len(rows), BATCH):
                batch = reader.collate(rows[i : i + BATCH])
                labels = batch.pop("labels")
                answer_loss(model(**batch), labels).backward()
        model.zero_grad()

    theirs = plain_logits(model.eval(), tokenizer, test.take(range(BATCH)), readout).log_softmax(-1)
    ours = bl.predict(model, posterior, test.take(range(BATCH)), 1, tokenizer=tokenizer).log_probs[0]
    gap = (ours.exp() - theirs.exp()).abs().max().item()
    print(f"{readout}: largest difference in probability {gap:.4f}")
    print(f"{readout}: prediction, {len(test)} rows")
    predict = paired(lambda: void(bl.predict(model, posterior, test, 1, tokenizer=tokenizer)), plain_predict, runs)
    print(f"{readout}: training, {len(train)} rows")
    step = paired(our_train, plain_train, runs)
    return [
        row(f"{readout}: one-draw prediction / plain", statistics.median(predict), BOUND),
        row(f"{readout}: training step / plain", statistics.median(step), BOUND),
        row(f"{readout}: largest difference in probability", gap, 0.05, "probability"),
    ]


def void(_: Any) -> None:
    """Throw a value away."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the tasks' data; none: the Hub")
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--readouts", nargs="+", default=["letters", "likelihood"])
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for readout in args.readouts:
        task = bl.load_task(args.task, args.data, readout=readout, train_rows=args.rows, test_rows=args.rows)
        model, tokenizer = bl.load_model(args.model or demo_model(), target_modules=["q_proj", "v_proj"])
        rows += measure(model, tokenizer, task, readout, args.runs)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
