"""What a choice's log-likelihood should be set in relation to: accuracy and calibration before and after training.

Each normalisation is trained and evaluated with itself, from the same start on the same rows in the same order.

    python benchmarks/normalisation.py --data DATA --model MODEL --json normalisation.json
    python benchmarks/normalisation.py --data DATA --tasks boolq --normalisations sum tokens --json boolq.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any, get_args

from report import finish, row
from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.metrics.classification import accuracy, ece, nll
from bayeslora.params import initialise, read
from bayeslora.posteriors import Point
from bayeslora.tasks.types import Normalisation, Task

SCORES = {"accuracy": accuracy, "NLL": nll, "ECE": ece}


def measured(model: Any, tokenizer: Any, task: Task, name: str) -> list[dict[str, Any]]:
    """Return the scores of the test split under the adapter that the model has."""
    test = task.test
    assert test is not None
    log_p = bl.predict(model, Point(read(model)), test, 1, tokenizer=tokenizer).log_p
    rows = [row(f"{name}: {measure}", float(score(log_p, test.labels)), None, "") for measure, score in SCORES.items()]
    print("  " + ", ".join(f"{found['name']} {found['value']:.4f}" for found in rows), flush=True)
    return rows


def trained(model: Any, tokenizer: Any, task: Task, learning_rate: float, seed: int) -> None:
    """Train the adapter for one epoch in steps of eight rows."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=learning_rate, seed=seed,
            logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        bl.fit(model, task, bl.Map(), args, tokenizer=tokenizer)


def main() -> None:
    """Measure each task and normalisation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with the tasks")
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M-Instruct; empty: fetched or converted")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "openbookqa", "boolq"])
    parser.add_argument("--normalisations", nargs="+", default=list(get_args(Normalisation)))
    parser.add_argument("--train-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    model, tokenizer = bl.load_model(
        options.model or str(demo_model()), rank=8, alpha=16.0, target_modules=["q_proj", "v_proj"]
    )
    rows = []
    for name in options.tasks:
        for normalisation in options.normalisations:
            began = time.perf_counter()
            task = bl.load_task(
                name, options.data, readout="likelihood", train_rows=options.train_rows, validation=0,
                test_rows=options.test_rows, normalisation=normalisation, seed=options.seed,
            )  # fmt: skip
            print(f"{name}, {normalisation}, seed {options.seed}", flush=True)
            initialise(model, options.seed)
            title = f"{name}, {normalisation}, seed {options.seed}"
            rows += measured(model, tokenizer, task, f"{title}, before")
            trained(model, tokenizer, task, options.learning_rate, options.seed)
            rows += measured(model, tokenizer, task, f"{title}, after")
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    finish(rows, options.json)


if __name__ == "__main__":
    main()
