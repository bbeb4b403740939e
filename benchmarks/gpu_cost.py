"""What it costs on a GPU: training steps, predictions, texts, draws and Laplace's fit, each beside what is plain."""

from __future__ import annotations

import copy
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bases import Stand
from quality import ADAPTIVE
from report import row
from timing import in_turn, ratio, seconds
from training_cost import BOUNDS, WARM, Turns, train

import bayeslora as bl
from bayeslora.posteriors import Posterior

Rows = list[dict[str, Any]]
DRAWS = {"one": 1, "ten": 10, "ten on the answer": 10, "adaptive": ADAPTIVE}
"""Ways to draw whose cost is compared."""


def training(stand: Stand, args: Namespace) -> Rows:
    """Return a method's step by AdamW's, median by median."""
    frozen = {id(p): p for p in stand.model.parameters() if not p.requires_grad}
    took = {}
    for name in ("adamw", *BOUNDS):
        turns = Turns([name])
        train(copy.deepcopy(stand.model, dict(frozen)), name, args, turns.callbacks(name))
        took[name] = statistics.median(turns.seconds[name][WARM:])
        print(f"  {name}: {took[name] * 1e3:.0f} ms a step", flush=True)
    bound = {name: BOUNDS[name][0] if stand.model.device.type == "cuda" else None for name in BOUNDS}
    found = [row(f"{name}: step / AdamW", took[name] / took["adamw"], bound[name]) for name in BOUNDS]
    return [row("AdamW: a step", took["adamw"], None, "s"), *found]


def predicting(stand: Stand, rows: int, rounds: int) -> Rows:
    """Return what ways to draw cost by one draw."""
    ways, posterior = {}, stand.posterior()
    for name, draws in DRAWS.items():
        asked = bl.restricted(posterior, tokens="answer") if name.endswith("answer") else posterior
        ways[name] = partial(stand.predict, asked, draws, rows)
    took = in_turn(ways, rounds)
    found = [row(f"predict: {name} / one draw", ratio(took, name, "one"), None) for name in DRAWS if name != "one"]
    return [row("predict: one draw", min(took["one"]) / rows, None, "s a row"), *found]


def generating(stand: Stand, tokens: int, rounds: int) -> Rows:
    """Return what ten draws cost by one, from one prompt and from eight."""
    prompts, posterior = [example.text for example in stand.task.test.examples[:8]], stand.posterior()
    answer = bl.restricted(posterior, tokens="answer")

    def work(draws: int, count: int, asked: Posterior = posterior) -> None:
        bl.generate(stand.model, asked, prompts[:count], draws, tokenizer=stand.tokenizer, max_new_tokens=tokens)

    found = []
    for count in (1, 8):
        ways = {"one": partial(work, 1, count), "ten": partial(work, 10, count)}
        took = in_turn(ways | {"answer": partial(work, 10, count, answer)}, rounds)
        found += [
            row(f"generate: {count} texts, one draw", count * tokens / min(took["one"]), None, "tokens/s"),
            row(f"generate: {count} texts, ten / one draw", ratio(took, "ten", "one"), None),
            row(f"generate: {count} texts, ten on the answer / one draw", ratio(took, "answer", "one"), None),
        ]
    return found


def drawing(stand: Stand, rounds: int) -> Rows:
    """Return what it takes to put ten draws in place, by as many normal numbers made on the device and by one pass."""
    posterior, model = stand.posterior(), stand.model
    size = sum(value.numel() for value in posterior.mean.values())

    def draws() -> None:
        for k in range(10):
            with posterior.applied(model, k):
                pass

    def plain() -> None:
        for _ in range(10):
            torch.randn(size, device=model.device)

    took = in_turn({"draws": draws, "plain": plain, "pass": partial(stand.predict, posterior, 1, 8)}, rounds)
    return [
        row("draws: ten in place / ten torch.randn", ratio(took, "draws", "plain"), None),
        row("draws: ten in place / one draw's predictions of 8 rows", ratio(took, "draws", "pass"), None),
    ]


def laplace(stand: Stand, rows: int) -> Rows:
    """Return the seconds of Laplace's fit by those of one draw's predictions of as many rows."""
    task, method = replace(stand.task, train=stand.task.train.take(range(rows))), bl.Laplace(prior=1.0)
    took = seconds(lambda: method.fit(stand.model, task, tokenizer=stand.tokenizer))
    plain = seconds(partial(stand.predict, stand.posterior(), 1, rows))
    return [row(f"laplace: fit to {rows} rows / one draw's predictions", took / plain, None)]


def checks(stand: Stand, *, tiny: bool) -> dict[str, Callable[[], Rows]]:
    """Return every check by its name."""
    few, rounds = (8, 1) if tiny else (128, 3)
    args = Namespace(batch=2 if tiny else 4, tokens=16 if tiny else 256, steps=2 if tiny else 6, checkpointing=True)
    return {
        "training": partial(training, stand, args),
        "predict": partial(predicting, stand, few, rounds),
        "generate": partial(generating, stand, 4 if tiny else 32, rounds),
        "draws": partial(drawing, stand, rounds),
        "laplace": partial(laplace, stand, 4 if tiny else 32),
    }
