"""What ten draws cost: beside a plain transformers + peft loop over draws, and beside the fastest plain loop.

All figures come from one run on the same rows, model, dtype and posterior; what is compared is timed in turn, and a
figure is the median over the rounds of the ratio of times. (a) is `plain.py` for each draw; (b) is a loop over draws
with our batches and head. Quality is measured against many plain draws.

    python benchmarks/prediction_cost.py --data DATA --json prediction_cost.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from plain import batches_of, plain_logits
from report import finish, row
from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.bootstrap import bootstrap
from bayeslora.demo_model import demo_model
from bayeslora.engine.readouts import readout_for
from bayeslora.methods.regularisers import answer_loss
from bayeslora.metrics import accuracy, ece, nll
from bayeslora.params import swapped
from bayeslora.posteriors import Posterior
from bayeslora.tasks.types import Split

DRAWS, MANY = 10, 64
TOLERANCE = 0.02


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, after one unmeasured round of all but the slowest."""
    for name, work in ways.items():
        if name != "plain":
            work()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            took[name].append(seconds(ways[name]))
        print("  " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in took.items()), flush=True)
    return took


def ratio(took: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median ratio of times over the rounds."""
    return statistics.median(a / b for a, b in zip(took[one], took[other], strict=True))


def plain_draws(model: Any, tokenizer: Any, split: Split, posterior: Posterior, draws: int) -> torch.Tensor:
    """Return the log-probabilities of a plain loop over draws."""
    found = []
    model.eval()
    for k in range(draws):
        with swapped(model, posterior.draw(k)), torch.inference_mode():
            found.append(torch.cat([
                plain_logits(model, tokenizer, batch, "likelihood").log_softmax(-1) for batch in batches_of(split)
            ]))  # fmt: skip
    return torch.stack(found)


def rate(model: Any, tokenizer: Any, split: Split, took: float) -> tuple[float, float]:
    """Return the model's rate in one draw's pass and that of a large matrix product, in FLOP a second."""
    readout = readout_for(model, split, tokenizer)
    rows, _ = readout.encode(split)
    base = model.get_base_model()
    head = base.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in base.parameters() if p.ndim == 2) - head
    tokens = sum(readout.length(r) for r in rows)
    kept = sum(1 + sum(len(a) - 1 for a in r.answers) for r in rows)
    size = 2048
    a, b = (torch.randn(size, size, dtype=base.dtype, device=base.device) for _ in range(2))
    best = min(seconds(lambda: a @ b) for _ in range(20))
    return 2 * (body * tokens + head * kept) / took, 2 * size**3 / best


def quality(name: str, prediction: Any, reference: Any, labels: torch.Tensor) -> list[dict[str, Any]]:
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


def posterior_of(args: argparse.Namespace, model: Any, tokenizer: Any, task: Any) -> Posterior:
    """Return the posterior that was given, or one that IVON learns from the training rows."""
    if args.posterior:
        return bl.load_posterior(args.posterior)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=args.epochs, per_device_train_batch_size=4, learning_rate=2e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        return bl.fit(model, task, bl.Ivon(), arguments, tokenizer=tokenizer)


def ten_draws(model: Any, tokenizer: Any, posterior: Posterior, test: Split, rounds: int) -> list[dict[str, Any]]:
    """Return the rows on ten exact draws and on as many as needed."""

    def ours(draws: int, **how: Any) -> Any:
        return bl.predict(model, posterior, test, draws, tokenizer=tokenizer, mean=False, **how)

    theirs = plain_draws(model, tokenizer, test.take(range(min(16, len(test)))), posterior, 2)
    mine = ours(2).log_probs[:, :16]
    gap = float((mine.exp() - theirs.exp()).abs().max())
    took = in_turn(
        {
            "plain": lambda: plain_draws(model, tokenizer, test, posterior, DRAWS),
            "loop": lambda: ours(DRAWS, stack=False, share_prefix=False),
            "stacked": lambda: ours(DRAWS),
            "one": lambda: ours(1),
            "adaptive": lambda: ours(MANY, tolerance=TOLERANCE, sampling="antithetic"),
        },
        rounds,
    )
    model_rate, machine_rate = rate(model, tokenizer, test, statistics.median(took["one"]))
    print(f"  one draw: {model_rate / 1e9:.0f} GFLOP/s in the model, {machine_rate / 1e9:.0f} in a large product")
    return [
        row("largest difference in a probability from the plain loop", gap, 0.05, "probability"),
        row("machine's rate by the model's, one draw", machine_rate / model_rate, 2.0),
        row("ten draws / plain loop (a)", ratio(took, "stacked", "plain"), 1 / 3),
        row("ten draws / fastest loop (b)", ratio(took, "stacked", "loop"), 1.0),
        row("ten draws / one draw", ratio(took, "stacked", "one"), None),
        row("adaptive antithetic draws / plain loop of ten (a)", ratio(took, "adaptive", "plain"), 1 / 8),
    ]


def single_prompts(model: Any, tokenizer: Any, posterior: Posterior, test: Split, rounds: int) -> list[dict[str, Any]]:
    """Return the row on single short prompts."""
    shortest = sorted(range(len(test)), key=lambda i: len(test.examples[i].text))[:4]

    def each(draws: int) -> None:
        for i in shortest:
            bl.predict(model, posterior, test.take([i]), draws, tokenizer=tokenizer, mean=False)

    took = in_turn({"ten": lambda: each(DRAWS), "one": lambda: each(1)}, rounds)
    return [row("single prompts: ten draws / one draw", ratio(took, "ten", "one"), 2.5)]


def prefixes(model: Any, tokenizer: Any, posterior: Posterior, task: Any, rounds: int) -> list[dict[str, Any]]:
    """Return the row on a shared beginning of solved examples."""
    shots = task.train.take(range(8))
    few = replace(
        task.test.take(range(min(16, len(task.test)))), format=replace(task.test.format, few_shot=shots.examples)
    )
    rows, _ = readout_for(model, few, tokenizer).encode(few)
    print(f"  prompts of {min(len(r.prompt) for r in rows)} to {max(len(r.prompt) for r in rows)} tokens")
    took = in_turn(
        {
            "plain": lambda: plain_draws(model, tokenizer, few, posterior, 2),
            "shared": lambda: bl.predict(model, posterior, few, 2, tokenizer=tokenizer, mean=False),
        },
        max(1, rounds // 2),
    )
    return [row("shared beginning, two draws / plain loop (a)", ratio(took, "shared", "plain"), 0.2)]


def qualities(model: Any, tokenizer: Any, posterior: Posterior, test: Split) -> list[dict[str, Any]]:
    """Return the rows on what fewer draws give."""

    def ours(draws: int, **how: Any) -> Any:
        return bl.predict(model, posterior, test, draws, tokenizer=tokenizer, mean=False, **how)

    reference = ours(MANY, seed=1000)
    found = ours(MANY, tolerance=TOLERANCE, sampling="antithetic")
    taken = found.draws_taken.float()
    print(f"  adaptive: {float(taken.mean()):.1f} draws on average, {int(taken.max())} at most")
    rows = quality("adaptive", found, reference, test.labels)
    labels = test.labels
    excess: dict[str, list[float]] = {}
    best = nll(reference.log_p, labels)
    for seed in range(4):
        for name, draws, sampling in (
            ("ten independent", 10, "independent"), ("five independent", 5, "independent"),
            ("four antithetic", 4, "antithetic"), ("four Sobol", 4, "sobol"),
        ):  # fmt: skip
            value = nll(ours(draws, seed=seed, sampling=sampling).log_p, labels) - best
            excess.setdefault(name, []).append(value)
    for name, values in excess.items():
        print(
            f"  {name}: NLL less that of {MANY}: {statistics.mean(values):+.4f} (seeds {[round(v, 4) for v in values]})"
        )
    ten = statistics.mean(excess["ten independent"])
    for name in ("four antithetic", "four Sobol"):
        rows.append(
            row(f"{name}: NLL beyond that of ten independent", statistics.mean(excess[name]) - ten, 0.0, "nats")
        )
    return rows


def growth(model: Any, tokenizer: Any, posterior: Posterior, test: Split) -> list[dict[str, Any]]:
    """Return how time grows with draws and with rows."""
    rows = []
    for draws in (1, 2, 5, 10, 20):
        took = seconds(lambda: bl.predict(model, posterior, test, draws, tokenizer=tokenizer, mean=False))  # noqa: B023
        rows.append(row(f"{draws} draws of {len(test)} rows", took, None, "s"))
    for count in (1, 4, 16):
        part = test.take(range(min(count, len(test))))
        took = seconds(lambda: bl.predict(model, posterior, part, DRAWS, tokenizer=tokenizer, mean=False))  # noqa: B023
        rows.append(row(f"{DRAWS} draws of {count} rows", took, None, "s"))
    return rows


def training(model: Any, tokenizer: Any, task: Any, rounds: int) -> list[dict[str, Any]]:
    """Return the row on a training step, forward and backward, by the forward pass alone."""
    readout = readout_for(model, task.train, tokenizer)
    rows, _ = readout.encode(task.train)
    batch = {k: v.to(model.device) for k, v in readout.collate(rows[:16]).items()}
    labels = batch.pop("labels")

    def forward() -> None:
        with torch.inference_mode():
            model(**batch)

    def step() -> None:
        answer_loss(model(**batch), labels).backward()
        model.zero_grad()

    with readout.attached(model):
        took = in_turn({"forward": forward, "step": step}, 3 * rounds)
    return [row("training step / forward pass", ratio(took, "step", "forward"), 2.5)]


SECTIONS = ("draws", "single", "prefix", "quality", "growth", "training")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the tasks' data; none: the Hub")
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--posterior", help="folder of a posterior; none: IVON learns one first")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--rows", type=int, default=48, help="test rows")
    parser.add_argument("--train-rows", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--json")
    args = parser.parse_args()
    task = bl.load_task(
        args.task, args.data, readout="likelihood", train_rows=args.train_rows, test_rows=args.rows, validation=20
    )
    model, tokenizer = bl.load_model(args.model or demo_model(), target_modules=["q_proj", "v_proj"])
    posterior = posterior_of(args, model, tokenizer, task)
    rows: list[dict[str, Any]] = []
    for section in args.sections:
        print(section, flush=True)
        match section:
            case "draws":
                rows += ten_draws(model, tokenizer, posterior, task.test, args.rounds)
            case "single":
                rows += single_prompts(model, tokenizer, posterior, task.test, args.rounds)
            case "prefix":
                rows += prefixes(model, tokenizer, posterior, task, args.rounds)
            case "quality":
                rows += qualities(model, tokenizer, posterior, task.test)
            case "growth":
                rows += growth(model, tokenizer, posterior, task.test)
            case "training":
                rows += training(model, tokenizer, task, args.rounds)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
