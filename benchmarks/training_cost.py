"""What a Bayesian method adds to a training step of the stock Trainer, as ratios to AdamW from one run.

The same model, rows and Trainer train with AdamW and with each method, in turn, for several rounds; the figure for time
is the ratio of the shortest steps over all rounds, for what disturbs a machine only ever lengthens a step. (The median
over the rounds of the ratio of median steps is printed as well.) Peak memory is that of a process (CPU) or of the
allocator (GPU) in a run of its own. Rows are random tokens: timings do not depend on their values.

    python benchmarks/training_cost.py --json training_cost.json                     # SmolLM2-135M, CPU
    python benchmarks/training_cost.py --shapes llama-2-7b --batch 8 --tokens 256    # random weights, GPU
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from report import finish, row
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import bayeslora as bl
from bayeslora.demo_model import demo_model
from bayeslora.params import initialise

METHODS = {
    "adamw": bl.Map(),
    "swag": bl.Swag(start=0, interval=2),
    "ivon": bl.Ivon(),
    "blob": bl.Blob(),
    "blob-elbo": bl.Blob("elbo"),
}
BOUNDS = {"ivon": (1.05, 1.02), "blob": (1.15, 1.05), "blob-elbo": (1.15, 1.05), "swag": (1.02, 1.02)}
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


class Clock(TrainerCallback):
    """Times the steps of a run, from one step's end to the next, so that everything is in."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time since the last step's end."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def build(args: argparse.Namespace) -> Any:
    """Return the model with a fresh adapter."""
    if not args.shapes:
        return bl.load_model(args.model or demo_model(), target_modules=["q_proj", "v_proj"])[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[args.shapes]))
    torch.set_default_dtype(torch.float32)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def rows(model: Any, args: argparse.Namespace, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return random tokens, of which the last eight are learned."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (steps * args.batch, args.tokens), generator=rng)
    labels = ids.clone()
    labels[:, :-8] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def train(model: Any, name: str, args: argparse.Namespace) -> list[float]:
    """Train for some steps and return the seconds of each after the first few."""
    steps, clock = args.steps + WARM, Clock()
    data = rows(model, args, steps)
    initialise(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=args.batch, learning_rate=1e-4, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
            gradient_checkpointing=args.checkpointing,
        )  # fmt: skip
        kwargs = METHODS[name].trainer_kwargs(model, len(data))
        kwargs["callbacks"] = [*kwargs["callbacks"], clock]
        Trainer(model, arguments, train_dataset=data, **kwargs).train()
    return clock.seconds[WARM - 1 :]


def memory(name: str, args: argparse.Namespace) -> float:
    """Return the peak memory in MiB of a run of its own."""
    if torch.cuda.is_available():
        model = build(args)
        torch.cuda.reset_peak_memory_stats()
        train(model, name, args)
        return torch.cuda.max_memory_allocated() / 2**20
    command = [
        sys.executable,
        __file__,
        "--peak",
        name,
        "--batch",
        str(args.batch),
        "--tokens",
        str(args.tokens),
        "--steps",
        "3",
    ]
    command += ["--model", args.model] if args.model else []
    command += ["--checkpointing"] if args.checkpointing else []
    command += ["--threads", str(args.threads)] if args.threads else []
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--shapes", choices=list(SHAPES), help="random weights of these shapes in the place of a model")
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "adamw"], choices=list(METHODS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="threads on a CPU; none: torch's choice")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peak", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(args)
    if args.peak:
        train(model, args.peak, args)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    train(model, "adamw", args)
    names = ["adamw", *args.methods]
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            rounds[name].append(train(model, name, args))
        print(", ".join(f"{n} {min(r[-1]) * 1e3:.0f} ms" for n, r in rounds.items()), flush=True)
    shortest = {name: min(map(min, found)) for name, found in rounds.items()}
    del model
    peaks = {name: memory(name, args) for name in ["adamw", *args.methods]}
    found = []
    for name in args.methods:
        time_bound, memory_bound = BOUNDS[name]
        medians = [
            statistics.median(a) / statistics.median(b) for a, b in zip(rounds[name], rounds["adamw"], strict=True)
        ]
        print(f"{name}: median ratio of medians {statistics.median(medians):.3f} {[round(m, 2) for m in medians]}")
        found.append(row(f"{name}: step time / AdamW", shortest[name] / shortest["adamw"], time_bound))
        found.append(row(f"{name}: peak memory / AdamW", peaks[name] / peaks["adamw"], memory_bound))
    found.append(row("AdamW: peak memory", peaks["adamw"], None, "MiB"))
    finish(found, args.json)


if __name__ == "__main__":
    main()
