"""What a Bayesian method adds to a training step of the stock Trainer, as ratios to AdamW from one run.

Every method and AdamW have a Trainer of their own, on copies of one model that share the frozen base, and take turns
step by step, so that what disturbs the machine disturbs all of them alike. The figure for time is the median over the
steps of a step's time by the mean of the AdamW steps before and after it. Peak memory is that of a process (CPU) or of
the allocator (GPU) in a run of its own. Rows are random tokens: timings do not depend on their values.

    python benchmarks/training_cost.py --json training_cost.json                     # SmolLM2-135M, CPU
    python benchmarks/training_cost.py --shapes llama-2-7b --batch 8 --tokens 256    # random weights, GPU
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import torch
from adapters import adapter, add_adapters, named
from peft import get_peft_model
from report import finish, row
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.params import initialise

PLAIN = "adamw"
"""The stock Trainer with nothing of ours. Beside it `map` is what looking for numbers that are not finite costs."""
METHODS = {
    "map": bl.Map(),
    "swag": bl.Swag(start=0, interval=2),
    "ivon": bl.Ivon(),
    "blob": bl.Blob(),
    "blob-elbo": bl.Blob("elbo"),
}
BOUNDS = {
    "map": (1.02, 1.02),
    "ivon": (1.05, 1.02),
    "blob": (1.15, 1.05),
    "blob-elbo": (1.15, 1.05),
    "swag": (1.02, 1.02),
}
SHAPES = {
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
}
WARM = 2


class Turns:
    """Whose turn it is among several Trainers, each in a thread of its own.

    Args:
        names: The Trainers, in the order of their turns.
    """

    def __init__(self, names: list[str]) -> None:
        self.names, self.at, self.changed = names, 0, threading.Condition()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.failed: BaseException | None = None

    def callbacks(self, name: str) -> tuple[TrainerCallback, TrainerCallback]:
        """Return the callback that waits for a turn, to go first, and the one that times the step, to go last."""
        turns, began = self, [0.0]

        class First(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                with turns.changed:
                    turns.changed.wait_for(lambda: turns.names[turns.at] == name or turns.failed is not None)
                if turns.failed is not None:
                    raise RuntimeError("another run failed")
                began[0] = now()

        class Last(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.seconds[name].append(now() - began[0])
                with turns.changed:
                    turns.at = (turns.at + 1) % len(turns.names)
                    turns.changed.notify_all()

        return First(), Last()

    def fail(self, error: BaseException) -> None:
        """Wake the others up: one run has failed."""
        with self.changed:
            self.failed = self.failed or error
            self.changed.notify_all()


def now() -> float:
    """Return the time, when everything before is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(args: argparse.Namespace, name: str) -> Any:
    """Return the model with a fresh adapter."""
    if not args.shapes:
        return bl.load_model(args.model or demo_model(), adapter=adapter(name))[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shapes]))
    torch.set_default_dtype(torch.float32)
    return get_peft_model(base, adapter(name))


def rows(model: Any, args: argparse.Namespace, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return random tokens, of which the last eight are learned."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (steps * args.batch, args.tokens), generator=rng)
    labels = ids.clone()
    labels[:, :-8] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def train(model: Any, name: str, args: argparse.Namespace, around: tuple[TrainerCallback, ...] = ()) -> None:
    """Train for some steps; the first of the callbacks goes before the method's own, the others after."""
    steps = args.steps + WARM
    data = rows(model, args, steps)
    initialise(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=args.batch, learning_rate=1e-4, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
            gradient_checkpointing=args.checkpointing,
        )  # fmt: skip
        kwargs = {"callbacks": []} if name == PLAIN else METHODS[name].trainer_kwargs(model, len(data))
        kwargs["callbacks"] = [*around[:1], *kwargs["callbacks"], *around[1:]]
        Trainer(model, arguments, train_dataset=data, **kwargs).train()


def in_turn(model: Any, names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each step of each method, taken in turn."""
    turns = Turns(names)
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}

    def work(name: str) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        try:
            train(copy.deepcopy(model, dict(frozen)), name, args, turns.callbacks(name))
        except BaseException as error:  # the others wait for it
            turns.fail(error)
            raise

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
        time.sleep(1)  # let it come to its first step
    for thread in threads:
        thread.join()
    if turns.failed is not None:
        raise turns.failed
    return {name: found[WARM:-1] for name, found in turns.seconds.items()}


def memory(name: str, args: argparse.Namespace, adapted: str) -> float:
    """Return the peak memory in MiB of a run of its own."""
    if torch.cuda.is_available():
        model = build(args, adapted)
        torch.cuda.reset_peak_memory_stats()
        train(model, name, args)
        return torch.cuda.max_memory_allocated() / 2**20
    command = [sys.executable, __file__, "--peak", name, "--adapters", adapted, "--batch", str(args.batch)]
    command += ["--tokens", str(args.tokens), "--steps", "3"]
    command += ["--model", args.model] if args.model else []
    command += ["--checkpointing"] if args.checkpointing else []
    command += ["--threads", str(args.threads)] if args.threads else []
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.splitlines()[-1])


def measured(args: argparse.Namespace, adapted: str) -> list[dict[str, Any]]:
    """Return the rows of the methods on one adapter."""
    model = build(args, adapted)
    took = in_turn(model, [PLAIN, *args.methods], args)
    plain = took[PLAIN]
    around = [(before + after) / 2 for before, after in zip(plain, [*plain[1:], plain[-1]], strict=True)]
    print(f"AdamW: {statistics.median(plain) * 1e3:.0f} ms a step, {min(plain) * 1e3:.0f} to {max(plain) * 1e3:.0f}")
    ratios = {n: [a / b for a, b in zip(took[n], around, strict=True)] for n in args.methods}
    del model
    peaks = {name: memory(name, args, adapted) for name in [PLAIN, *args.methods]}
    found = []
    for name in args.methods:
        time_bound, memory_bound = BOUNDS[name]
        quarters = statistics.quantiles(ratios[name], n=4)
        print(f"{name}: quartiles of the ratio {quarters[0]:.3f} {quarters[1]:.3f} {quarters[2]:.3f}")
        found.append(row(f"{name}: step time / AdamW", statistics.median(ratios[name]), time_bound))
        found.append(row(f"{name}: peak memory / AdamW", peaks[name] / peaks[PLAIN], memory_bound))
    found.append(row("AdamW: peak memory", peaks[PLAIN], None, "MiB"))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--shapes", choices=list(SHAPES), help="random weights of these shapes in the place of a model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add_adapters(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, help="threads on a CPU; none: torch's choice")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peak", choices=[PLAIN, *METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        train(build(args, args.adapters[0]), args.peak, args)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    found = [row for name in args.adapters for row in named(name, measured(args, name))]
    finish(found, args.json)


if __name__ == "__main__":
    main()
