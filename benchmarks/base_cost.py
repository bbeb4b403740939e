"""What the base's answers cost beside the draws: paired times of one run on the same rows.

python benchmarks/base_cost.py --data DATA --json base_cost.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from adapters import adapter, add_adapters, named
from report import finish, row
from timing import in_turn, ratio

import bayeslora as bl
from bayeslora.cli.data import build_task
from bayeslora.cli.demo.model import demo_model
from bayeslora.cli.options import TaskOptions
from bayeslora.params import generator, read
from bayeslora.posteriors import DiagonalGaussian


def cost(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Return the ratios of times for one adapter."""
    options = TaskOptions(task=args.task, data=args.data, readout="likelihood", test_rows=args.rows)
    split = build_task(options).test
    assert split is not None
    model, tokenizer = bl.load_model(args.model or demo_model(), split.classes, adapter=adapter(name))
    noise = {n: torch.randn(v.shape, generator=generator("base cost", n)) for n, v in read(model).items()}
    mean = {n: 0.01 * noise[n] if "lora_B" in n else v for n, v in read(model).items()}
    posterior = DiagonalGaussian(mean, {n: torch.full_like(v, 1e-4) for n, v in mean.items()})

    def ask(draws: int, base: bool, mean: bool = True) -> Callable[[], object]:
        """Return a prediction as something to time."""
        return lambda: bl.predict(model, posterior, split, draws, mean=mean, base=base, tokenizer=tokenizer)

    def prompts(draws: int) -> Callable[[], object]:
        """Return the ratio of the prompts as something to time."""
        return lambda: bl.prompt_likelihood_ratio(model, posterior, split, draws, tokenizer=tokenizer)

    ways = {
        "draws": ask(10, False), "draws, base": ask(10, True), "mean": ask(0, False), "mean, base": ask(0, True),
        "prompts": prompts(0),
    }  # fmt: skip
    took = in_turn(ways, args.rounds)
    return [
        row("ten draws and the mean, with the base / without", ratio(took, "draws, base", "draws"), 1.2),
        row("the mean, with the base / without", ratio(took, "mean, base", "mean"), 2.2),
        row("prompts under mean and base / one pass of answers", ratio(took, "prompts", "mean"), None),
    ]


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the tasks' data")
    parser.add_argument("--task", default="arc_easy", help="what is answered, by likelihood")
    parser.add_argument("--model", default="", help="base model; empty: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for the figures")
    add_adapters(parser)
    args = parser.parse_args()
    rows = []
    for name in args.adapters:
        print(name)
        rows += named(name, cost(args, name))
    finish(rows, args.json)


if __name__ == "__main__":
    main()
