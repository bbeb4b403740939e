"""Whether the library is right on a GPU, and what it costs there: one command, no network, under ten minutes.

First what must be right, on a small model in float32 beside its copy on the CPU (SmolLM2 too, if it is in the cache):
every method trains, draws and predictions are the CPU's, texts, a server, a resumed run, memory. Then costs, on random
weights of Llama-2-7B's shape with an adapter on all linear layers, in bf16 and in 4 bits. A check that fails or is too
slow is a row that is not met, with the error, and the others go on.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --tiny             # on any machine, in a minute: that every check runs
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gpu_cost
import gpu_right
import torch
from accelerate.utils.memory import clear_device_cache
from bases import LLAMA_2_7B, TINY, Stand, random_stand
from report import finish, row

import bayeslora as bl
from bayeslora.cli.demo.model import SMOLLM2, cache_root
from bayeslora.models import default_device

Rows = list[dict[str, Any]]
SECONDS = {"right": 170, "smollm2": 60, "bf16": 180, "4 bits": 170}
"""Most seconds of each part: 580 together."""


def attempt(part: str, name: str, work: Callable[[], Rows], limit: float) -> Rows:
    """Return the rows of a check, or one that says how it failed."""
    print(f"{part}: {name}", flush=True)
    began = time.perf_counter()
    try:
        if limit < 1:
            raise TimeoutError("the part's time is over")
        signal.alarm(int(limit))
        found = work()
    except Exception as error:
        traceback.print_exc(limit=-4, file=sys.stdout)
        found = [{**row(name, 1.0, 0.0, "failures"), "error": f"{type(error).__name__}: {error}"[:500]}]
    finally:
        signal.alarm(0)
    clear_device_cache(garbage_collection=True)
    print(f"  {time.perf_counter() - began:.1f} s", flush=True)
    return [{**each, "name": f"{part}: {each['name']}"} for each in found]


def run(part: str, make: Callable[[], dict[str, Callable[[], Rows]]]) -> Rows:
    """Return the rows of a part, whose checks ``make`` gives once its models are there."""
    until, checks = time.perf_counter() + SECONDS[part], {}

    def prepare() -> Rows:
        """Build the part's models."""
        checks.update(make())
        return []

    rows = attempt(part, "models", prepare, SECONDS[part])
    for name, check in checks.items():
        rows += attempt(part, name, check, until - time.perf_counter())
    return rows


def beside(model: Any, like: Stand, tokenizer: Any) -> tuple[Stand, Stand]:
    """Return a model on the CPU, and its copy on the device."""
    here = replace(like, model=model, tokenizer=tokenizer)
    return here, replace(here, model=copy.deepcopy(model).to(default_device()))


def right(shape: dict[str, int]) -> dict[str, Callable[[], Rows]]:
    """Return the checks of what must be right, on a random model."""
    stand = random_stand(shape, torch.device("cpu"), torch.float32, rank=4)
    return gpu_right.checks(*beside(stand.model, stand, stand.tokenizer))


def smollm2() -> dict[str, Callable[[], Rows]]:
    """Return some of these checks on a published model, if it lies in the cache."""
    folder = cache_root() / SMOLLM2.folder
    if not folder.exists():
        print("  SmolLM2 is not in the cache, and is left out")
        return {}
    model, tokenizer = bl.load_model(folder, dtype=torch.float32, device="cpu")
    like = random_stand(TINY, torch.device("cpu"), torch.float32)
    checks = gpu_right.checks(*beside(model, like, tokenizer))
    return {name: checks[name] for name in ("train ivon", "train blob", "generate")}


def cost(shape: dict[str, int], bits: int, *, tiny: bool) -> dict[str, Callable[[], Rows]]:
    """Return the checks of what it costs, on a large random model; its memory is held to the estimate too."""
    dtype, rows = (torch.float32, 16) if tiny else (torch.bfloat16, 1200)
    stand = random_stand(shape, default_device(), dtype, bits=bits, rows=rows)
    return {**gpu_cost.checks(stand, tiny=tiny), "memory": partial(gpu_right.memory, stand)}


def out_of_time(*_: object) -> None:
    """End a check that takes too long."""
    raise TimeoutError("the part's time is over")


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models alone, on any machine")
    parser.add_argument("--parts", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--json")
    args = parser.parse_args()
    if not args.tiny and default_device().type != "cuda":
        parser.error("there is no GPU; --tiny runs the checks on a CPU")
    if torch.cuda.device_count() > 1:
        parser.error("there are several GPUs, which the Trainer would all take; set CUDA_VISIBLE_DEVICES=0")
    signal.signal(signal.SIGALRM, out_of_time)
    small = TINY if args.tiny else {**TINY, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    large = TINY if args.tiny else LLAMA_2_7B
    parts: dict[str, Callable[[], dict[str, Callable[[], Rows]]]] = {
        "right": partial(right, small),
        "smollm2": dict if args.tiny else smollm2,
        "bf16": partial(cost, large, 16, tiny=args.tiny),
        "4 bits": partial(cost, large, 4, tiny=args.tiny),
    }
    rows: Rows = []
    try:
        for part in args.parts:
            rows += run(part, parts[part])
    finally:
        finish(rows, args.json)
    sys.exit(any("error" in each for each in rows))


if __name__ == "__main__":
    main()
