"""Continuous against static batches: time to the first token and throughput where requests come by a Poisson process.

The worker is asked directly, without HTTP. Its capacity under continuous batches is measured first, with all seats
taken; then the same requests, with the same arrival times, come to either at a part of that rate, in one run.
Static batches are those that models get whose caches cannot be joined: whoever comes waits for the batch that runs.

    python benchmarks/serving_batches.py --json serving_batches.json
    python benchmarks/serving_batches.py --model demo --requests 60 --draws 2
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from report import finish, row
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bayeslora.cli.demo.model import demo_model
from bayeslora.integrations.server import Limits, Served
from bayeslora.integrations.server.decoding import Generation, Row, TokenNote
from bayeslora.integrations.server.worker import Worker
from bayeslora.models import default_device
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian
from bayeslora.posteriors.provenance import origin_of
from bayeslora.tasks.types import Format, Split

ROWS = 16


@dataclass
class Request:
    """What is asked, and when it came, had its first token, and ended."""

    ids: list[int]
    tokens: int
    times: dict[str, float] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def ask(self, worker: Worker, draws: int) -> Generation:
        """Put it into the queue."""
        self.times = {"came": time.perf_counter()}
        self.done.clear()
        job = Generation("model", draws, [Row(self.ids, self.tokens, 1.0, 1.0, len(self.ids), (), self._on_token)])
        worker.submit(job)
        return job

    def _on_token(self, note: TokenNote | None) -> None:
        self.times.setdefault("first", time.perf_counter())
        if note is None:
            self.times["end"] = time.perf_counter()
            self.done.set()


def served(name: str, draws: int) -> Served:
    """Return a model with a posterior: the demo's, or one of four layers that has learned nothing."""
    torch.manual_seed(0)
    if name == "demo":
        folder = demo_model()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"t{n}": n for n in range(2048)})))
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=1024,
            )
        )  # fmt: skip
    base.generation_config.eos_token_id = None  # answers have the length that is asked for
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).to(default_device()).eval()
    mean = read(model)
    posterior = DiagonalGaussian(mean, {n: torch.full_like(m, 0.01) for n, m in mean.items()}, origin_of(model, name))
    like = Split("input", (), Format("", "likelihood"), None)
    return Served("model", model, tokenizer, posterior, draws, draws, like)


def requests(count: int, seed: int) -> list[Request]:
    """Return requests of many lengths."""
    rng = random.Random(seed)
    return [
        Request([rng.randrange(10, 2000) for _ in range(rng.randrange(4, 100))], rng.choice([4, 8, 16, 32, 64]))
        for _ in range(count)
    ]


def capacity(what: Served, asked: list[Request]) -> float:
    """Return how many requests are answered in a second when all wait at once."""
    worker = Worker(what, Limits(rows=ROWS, waiting=10**6))
    asked[0].ask(worker, what.draws)
    asked[0].done.wait()  # the model is tried on a few tokens
    began = time.perf_counter()
    for request in asked:
        request.ask(worker, what.draws)
    for request in asked:
        request.done.wait()
    took = time.perf_counter() - began
    worker.close()
    return len(asked) / took


def load(what: Served, asked: list[Request], rate: float, seed: int, static: bool) -> dict[str, float]:
    """Return the figures of one way of batching under requests that come at a rate."""
    rng = random.Random(seed)
    way = patch("bayeslora.integrations.server.batching.joins", lambda model: False) if static else nullcontext()
    with way:
        worker = Worker(what, Limits(rows=ROWS, waiting=10**6))
        began = time.perf_counter()
        at = began
        for request in asked:
            at += rng.expovariate(rate)
            time.sleep(max(0.0, at - time.perf_counter()))
            request.ask(worker, what.draws)
        for request in asked:
            request.done.wait()
        worker.close()
    took = max(request.times["end"] for request in asked) - began
    waits = sorted(request.times["first"] - request.times["came"] for request in asked)
    whole = sorted(request.times["end"] - request.times["came"] for request in asked)
    return {
        "answers a second": len(asked) / took,
        "tokens a second": sum(request.tokens for request in asked) / took,
        "first token p50": statistics.median(waits),
        "first token p99": waits[int(0.99 * (len(waits) - 1))],
        "whole answer p50": statistics.median(whole),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["tiny", "demo"], default="tiny", help="demo: SmolLM2-135M-Instruct")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--load", type=float, nargs="*", default=[0.4, 0.8], help="parts of the capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    what, asked = served(options.model, options.draws), requests(options.requests, options.seed)
    full = capacity(what, asked)
    print(f"capacity: {full:.2f} requests a second", flush=True)
    rows = [row("capacity", full, None, "requests/s")]
    for part in options.load:
        found = {}
        for name in ("static", "continuous"):
            found[name] = load(what, asked, part * full, options.seed, name == "static")
            print(f"{part:.0%} of it, {name}: {found[name]}", flush=True)
        for key, value in found["continuous"].items():
            before = found["static"][key]
            unit = "1/s" if "second" in key else "s"
            rows += [row(f"{part:.0%}: {key}, {name}", found[name][key], None, unit) for name in found]
            faster = before / value if "second" in key else value / before
            rows.append(row(f"{part:.0%}: {key}, continuous to static (smaller is better)", faster, 1.0))
    finish(rows, options.json)


if __name__ == "__main__":
    main()
