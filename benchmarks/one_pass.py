"""One pass beside plain PEFT: a draw, ten draws and a training step, for q and v at r = 8 and all layers at r = 16.

All figures come from one run on the same rows and draws; what is compared is timed in turn, and a figure is the median
over the rounds of the ratio of times. "PEFT" is the same base with PEFT's own layers and the adapter in float32, as its
users have it, in batches as large as the token budget allows; its ten draws are stacked too. A training step is
forward and backward on 16 rows. The ratio of floating-point operations in matrix products is what no implementation
of the same step comes below.

    python benchmarks/one_pass.py --data DATA --json one_pass.json
    python benchmarks/one_pass.py --data DATA --sections rounding --rows 8    # what bfloat16 draws do to the answers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from adapters import adapter, add_adapters
from report import finish, row
from timing import in_turn, ratio
from torch.utils.flop_counter import FlopCounterMode

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import generator, read, swapped, write
from bayeslora.posteriors import DiagonalGaussian
from bayeslora.prediction import fused as fusing
from bayeslora.prediction.batching import on, schedule
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.fused import fused
from bayeslora.prediction.memory import CPU_BUDGET, GPU_BUDGET
from bayeslora.prediction.readouts import Readout, readout_for
from bayeslora.prediction.stacking import stacked

DRAWS = 10
SECTIONS = ("predict", "train", "compiled", "rounding")


def adapted(args: argparse.Namespace, name: str, dtype: torch.dtype | None = None) -> tuple[Any, Any, DiagonalGaussian]:
    """Return the model with an adapter that says something, its tokenizer, and a posterior around the adapter."""
    model, tokenizer = bl.load_model(args.model or demo_model(), adapter=adapter(name), dtype=dtype)
    noise = {n: torch.randn(v.shape, generator=generator("one pass", n)) for n, v in read(model).items()}
    start = {n: 0.01 * noise[n] if "lora_B" in n else v for n, v in read(model).items()}
    write(model, start)
    return model, tokenizer, DiagonalGaussian(start, {n: torch.full_like(v, 0.01**2) for n, v in start.items()})


def as_peft(model: Any, readout: Readout, rows: Sequence[Any], draws: Sequence[Any]) -> torch.Tensor:
    """Return the draws' log-probabilities by PEFT's own layers, in full batches."""
    budget = CPU_BUDGET if model.device.type == "cpu" else GPU_BUDGET
    found = torch.full((len(draws), len(rows), max(len(r.answers) for r in rows)), -torch.inf)
    plan = schedule([readout.length(r) for r in rows], budget, len(draws), budget)
    with torch.inference_mode(), readout.attached(model):
        for width, batches in plan.items():
            for at in range(0, len(draws), width):
                with stacked(model, draws[at : at + width], peft=True):
                    for places in batches:
                        batch = on(readout.collate([rows[i] for i in places]), model.device)
                        answers = model(**batch).logits.float().log_softmax(-1).cpu()
                        found[at : at + width, places, : answers.shape[-1]] = answers.view(width, len(places), -1)
    return found


def predicting(args: argparse.Namespace, name: str, task: Any) -> list[dict[str, Any]]:
    """Return the rows on one draw and ten."""
    model, tokenizer, posterior = adapted(args, name)
    readout = readout_for(model, task.test, tokenizer)
    rows, _ = readout.encode(task.test)
    draws = [posterior.draw(k) for k in range(DRAWS)]
    model.eval()

    def ours(count: int, **how: Any) -> Any:
        return bl.predict(model, posterior, task.test, count, tokenizer=tokenizer, mean=False, **how)

    theirs = as_peft(model, readout, rows, draws[:2])
    found = ours(2).log_probs
    gap = (found.exp() - theirs.exp()).abs().max()
    print(f"  a probability differs from PEFT's by at most {gap:.1e}")
    took = in_turn(
        {
            "one": lambda: ours(1),
            "one PEFT": lambda: as_peft(model, readout, rows, draws[:1]),
            "ten": lambda: ours(DRAWS),
            "ten PEFT": lambda: as_peft(model, readout, rows, draws),
        },
        args.rounds,
        cold=("ten", "ten PEFT"),  # two draws have warmed them up
    )
    return [
        row(f"{name}: one draw / PEFT's", ratio(took, "one", "one PEFT"), 0.8),
        row(f"{name}: ten draws / PEFT's", ratio(took, "ten", "ten PEFT"), 0.8),
        row(f"{name}: ten draws / one", ratio(took, "ten", "one"), None),
    ]


def step_of(model: Any, tokenizer: Any, task: Any) -> tuple[Readout, Callable[[], Any], Callable[[], Any]]:
    """Return the readout, and a forward pass and a training step on sixteen rows."""
    readout = readout_for(model, task.train, tokenizer)
    rows, _ = readout.encode(task.train)
    batch = on(readout.collate(rows[:16]), model.device)
    labels = torch.tensor([r.label for r in rows[:16]], device=model.device)

    def forward() -> None:
        with torch.inference_mode():
            model(**batch)

    def step() -> None:
        answer_loss(model(**batch), labels).backward()
        model.zero_grad()

    return readout, forward, step


def products(work: Callable[[], Any]) -> int:
    """Return the floating-point operations in a piece of work's matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training(args: argparse.Namespace, name: str, task: Any, compile_: bool) -> list[dict[str, Any]]:
    """Return the rows on a training step by a forward pass, with compiled layers or without."""
    model, tokenizer, _ = adapted(args, name)
    model.train()
    readout, forward, step = step_of(model, tokenizer, task)

    def under(work: Callable[[], Any], layers: Callable[[], AbstractContextManager[object]]) -> Callable[[], Any]:
        def run() -> None:
            with layers():
                work()

        return run

    ours: Callable[[], AbstractContextManager[object]] = lambda: fused(model)  # noqa: E731
    with readout.attached(model):
        floor = products(step) / products(forward)
        with compiled(model) if compile_ else nullcontext():
            took = in_turn(
                {
                    "forward": under(forward, ours),
                    "step": under(step, ours),
                    "forward PEFT": under(forward, nullcontext),
                    "step PEFT": under(step, nullcontext),
                },
                3 * args.rounds,
            )
    kind, bound = (", compiled", 2.05) if compile_ else ("", 2.2)
    return [
        row(f"{name}{kind}: training step / forward pass", ratio(took, "step", "forward"), bound),
        row(f"{name}{kind}: the same, operations in products", floor, None),
        row(f"{name}{kind}: training step / PEFT's forward pass", ratio(took, "step", "forward PEFT"), None),
        row(f"{name}{kind}: PEFT's training step / its forward pass", ratio(took, "step PEFT", "forward PEFT"), None),
        row(f"{name}{kind}: training step / PEFT's", ratio(took, "step", "step PEFT"), None),
    ]


def rounding(args: argparse.Namespace, name: str, task: Any) -> list[dict[str, Any]]:
    """Return the rows on what draws in bfloat16 do to the answers of a base in bfloat16."""
    half, tokenizer, posterior = adapted(args, name, torch.bfloat16)
    exact, _, _ = adapted(args, name, torch.float32)  # the base's weights are bfloat16 on disk
    readout = readout_for(half, task.test, tokenizer)
    rows, _ = readout.encode(task.test)
    single, noisy, rounded = [], [], []
    plain = readout_for(exact, task.test, tokenizer)
    for model in (half, exact):
        model.eval()
    for k in range(args.rounds):
        draw = [posterior.draw(k)]
        single.append(as_peft(exact, plain, rows, draw)[0])
        noisy.append(as_peft(half, readout, rows, draw)[0])
        with (
            patch.object(fusing, "fast_dtype", lambda _: torch.bfloat16),
            torch.inference_mode(),
            readout.attached(half),
            swapped(half, draw[0]),
            stacked(half, draw),
        ):
            rounded.append(half(**on(readout.collate(rows), half.device)).logits.float().log_softmax(-1).cpu())
        print(f"  draw {k} is done", flush=True)
    wanted, float32, bfloat16 = (torch.stack(each) for each in (single, noisy, rounded))

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        gap = torch.where(p.isfinite(), p - q, torch.zeros(()))
        return float((p.exp() * gap).sum(-1).mean())

    base = divergence(wanted, float32)
    return [
        row(f"{name}: divergence of draws in float32 on a bfloat16 base", base, None, "nats"),
        row(f"{name}: divergence of draws in bfloat16", divergence(wanted, bfloat16), None, "nats"),
        row(f"{name}: between the two, by the base's rounding", divergence(float32, bfloat16) / base, 1.0),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the tasks' data; none: the Hub")
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--readout", default="likelihood", choices=("likelihood", "letters"))
    add_adapters(parser)
    parser.add_argument("--rows", type=int, default=24, help="test rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS[:2]), choices=SECTIONS)
    parser.add_argument("--json")
    args = parser.parse_args()
    task = bl.load_task(
        args.task, args.data, readout=args.readout, train_rows=20, test_rows=args.rows, validation=0
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in args.adapters:
        for section in args.sections:
            print(name, section, flush=True)
            match section:
                case "predict":
                    rows += predicting(args, name, task)
                case "train" | "compiled":
                    rows += training(args, name, task, section == "compiled")
                case "rounding":
                    rows += rounding(args, name, task)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
