"""What ten draws cost: beside a plain transformers + peft loop over draws, and beside the fastest plain loop.

All figures come from one run on the same rows, model, dtype and posterior; what is compared is timed in turn, and a
figure is the median over the rounds of the ratio of times. (a) is `plain.py` for each draw; (b) is a loop over draws
with our batches and head. Quality is measured against many plain draws.

    python benchmarks/prediction_cost.py --data DATA --json prediction_cost.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from adapters import adapter, add_adapters, named
from growth import by_size, memory
from one_pass import step_of
from plain import batches_of, plain_logits
from quality import ADAPTIVE, fewer_draws, one_adapter
from report import finish, row
from timing import in_turn, ratio, seconds
from torch.profiler import ProfilerActivity, profile
from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.params import swapped
from bayeslora.posteriors import Posterior
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Split, Task

DRAWS = 10


def plain_draws(
    model: Any, tokenizer: Any, split: Split, posterior: Posterior, draws: int, size: int = 16
) -> torch.Tensor:
    """Return the log-probabilities of a plain loop over draws."""
    found = []
    model.eval()
    for k in range(draws):
        with swapped(model, posterior.draw(k)), torch.inference_mode():
            found.append(torch.cat([
                plain_logits(model, tokenizer, batch, "likelihood").log_softmax(-1) for batch in batches_of(split, size)
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


def shares(work: Callable[[], Any]) -> str:
    """Return which operations take the time, in words."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return ", ".join(f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in events[:8])


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

    few = test.take(range(min(16, len(test))))
    theirs = plain_draws(model, tokenizer, few, posterior, 2).exp()
    other = plain_draws(model, tokenizer, few, posterior, 2, size=1).exp()
    gap = float((ours(2).log_probs[:, : len(few)].exp() - theirs).abs().max())
    rounding = float((other - theirs).abs().max())
    print(f"  a probability differs from the plain loop's by at most {gap:.3f}, its own batch sizes' by {rounding:.3f}")
    took = in_turn(
        {
            "plain": lambda: plain_draws(model, tokenizer, test, posterior, DRAWS),
            "loop": lambda: ours(DRAWS, options=bl.PassOptions(stack=False, share_prefix=False)),
            "stacked": lambda: ours(DRAWS),
            "one": lambda: ours(1),
            "adaptive": lambda: ours(draws=ADAPTIVE),
        },
        rounds,
        cold=("plain",),
    )
    model_rate, machine_rate = rate(model, tokenizer, test, min(took["one"]))
    print(f"  one draw: {model_rate / 1e9:.0f} GFLOP/s in the model, {machine_rate / 1e9:.0f} in a large product")
    print(f"  one draw's time: {shares(lambda: ours(1))}")
    return [
        row("largest difference from the plain loop / that of its own batch sizes", gap / rounding, 2.0),
        row("machine's rate by the model's, one draw", machine_rate / model_rate, 2.0),
        row("ten draws / plain loop (a)", ratio(took, "stacked", "plain"), 1 / 3),
        row("ten draws / fastest loop (b)", ratio(took, "stacked", "loop"), 1.0),
        row("ten draws / one draw", ratio(took, "stacked", "one"), None),
        row("adaptive draws / plain loop of ten (a)", ratio(took, "adaptive", "plain"), 1 / 8),
    ]


def compiled_layers(model: Any, tokenizer: Any, posterior: Posterior, test: Split, rounds: int) -> list[dict[str, Any]]:
    """Return the rows on predictions with compiled layers, after their compilation."""

    def ours(draws: int, **how: Any) -> Any:
        return bl.predict(model, posterior, test, draws, tokenizer=tokenizer, mean=False, **how)

    took = in_turn(
        {
            "one": lambda: ours(1),
            "one compiled": lambda: ours(1, options=bl.PassOptions(compile=True)),
            "ten": lambda: ours(DRAWS),
            "ten compiled": lambda: ours(DRAWS, options=bl.PassOptions(compile=True)),
        },
        rounds,
    )
    model_rate, machine_rate = rate(model, tokenizer, test, min(took["one compiled"]))
    return [
        row("machine's rate by the model's, one draw compiled", machine_rate / model_rate, 2.0),
        row("one draw compiled / not", ratio(took, "one compiled", "one"), None),
        row("ten draws compiled / not", ratio(took, "ten compiled", "ten"), None),
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


def training(model: Any, tokenizer: Any, task: Any, rounds: int) -> list[dict[str, Any]]:
    """Return the row on a training step, forward and backward, by the forward pass alone."""
    readout, forward, step = step_of(model, tokenizer, task)
    found, fastest = [], []
    for name, layers in (("", nullcontext()), (" with compiled layers", compiled(model))):
        with readout.attached(model), layers:
            took = in_turn({"forward": forward, "step": step}, 3 * rounds)
        found.append(row(f"training step / forward pass{name}", ratio(took, "step", "forward"), 2.5))
        fastest.append(min(took["step"]))
    return [*found, row("training step with compiled layers / without", fastest[1] / fastest[0], None)]


def members(model: Any, tokenizer: Any, task: Task, rounds: int) -> list[dict[str, Any]]:
    """Return the row on four members of an ensemble, trained in one pass and one after another."""
    small = replace(task, train=task.train.take(range(16)), validation=None)

    def train(together: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=4, per_device_train_batch_size=2, report_to="none", save_strategy="no",
                disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
            )  # fmt: skip
            bl.fit(model, small, bl.Ensemble(4, together=together), args, tokenizer=tokenizer)

    took = in_turn({"together": lambda: train(True), "apart": lambda: train(False)}, rounds)
    return [row("four members of two rows a step, together / apart", ratio(took, "together", "apart"), 1.0)]


SECTIONS = (
    "draws", "single", "prefix", "training", "members", "memory", "growth", "quality", "distil", "compiled",
)  # fmt: skip


def measured(args: argparse.Namespace, name: str, task: Task, more: Task, free: Split) -> list[dict[str, Any]]:
    """Return the rows of the sections on one adapter."""
    assert task.test is not None
    assert more.test is not None
    classes = task.test.classes if args.readout == "head" else None
    config = replace(adapter(name), task_type="SEQ_CLS") if classes else adapter(name)
    model, tokenizer = bl.load_model(args.model or demo_model(), classes, adapter=config)
    posterior = posterior_of(args, model, tokenizer, task)
    rows: list[dict[str, Any]] = []
    for section in args.sections:
        print(name, section, flush=True)
        match section:
            case "draws":
                rows += ten_draws(model, tokenizer, posterior, task.test, args.rounds)
            case "single":
                rows += single_prompts(model, tokenizer, posterior, task.test, args.rounds)
            case "prefix":
                rows += prefixes(model, tokenizer, posterior, task, args.rounds)
            case "training":
                rows += training(model, tokenizer, task, args.rounds)
            case "members":
                rows += members(model, tokenizer, task, args.rounds)
            case "memory":
                rows += memory(model, tokenizer, posterior, task.test)
            case "growth":
                rows += by_size(model, tokenizer, posterior, task)
            case "quality":
                rows += fewer_draws(model, tokenizer, posterior, task.test)
            case "distil":
                rows += one_adapter(model, tokenizer, posterior, free, more.test, args.rounds)
            case "compiled":
                rows += compiled_layers(model, tokenizer, posterior, task.test, args.rounds)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the tasks' data; none: the Hub")
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--posterior", help="folder of a posterior; none: IVON learns one first")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--readout", default="likelihood", choices=("likelihood", "letters", "head"))
    add_adapters(parser)
    parser.add_argument("--rows", type=int, default=48, help="test rows")
    parser.add_argument("--train-rows", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--json")
    args = parser.parse_args()
    task = bl.load_task(
        args.task, args.data, readout=args.readout, train_rows=args.train_rows, test_rows=args.rows, validation=20
    )
    more = bl.load_task(
        args.task, args.data, readout=args.readout, train_rows=args.train_rows + 700, test_rows=200, validation=0
    )
    seen = {example.text for split in (task.train, task.validation) for example in split}
    free = more.train.take([i for i, example in enumerate(more.train) if example.text not in seen][:480])
    rows = [row for name in args.adapters for row in named(name, measured(args, name, task, more, free))]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
