"""How the cost of draws grows with their number, the rows, their length and the model, and what memory they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from report import row
from timing import in_turn, ratio, seconds
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora as bl
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, Posterior
from bayeslora.tasks.templates import render, resolve_format
from bayeslora.tasks.types import Split, Task

DRAWS = 10


def by_size(model: Any, tokenizer: Any, posterior: Posterior, task: Task) -> list[dict[str, Any]]:
    """Return seconds by number of draws, of rows and of tokens, and ratios by the size of the model."""
    test = task.test
    assert test is not None
    assert task.train is not None
    rows = []

    def took(name: str, split: Split, draws: int, **how: Any) -> None:
        def work() -> None:
            bl.predict(model, posterior, split, draws, tokenizer=tokenizer, mean=False, **how)

        work()
        rows.append(row(name, min(seconds(work) for _ in range(2)), None, "s"))

    for draws in (1, 2, 5, 10, 20):
        took(f"{draws} draws of {len(test)} rows", test, draws)
    for count in (1, 4, 16):
        took(f"{DRAWS} draws of {count} rows", test.take(range(count)), DRAWS)
    for shots in (1, 4):
        form = replace(resolve_format(test.format, "likelihood"), few_shot=task.train.take(range(shots)).examples)
        long = replace(test.take(range(8)), format=form)
        tokens = len(tokenizer(render(long.examples[0], form))["input_ids"])
        took(
            f"{DRAWS} draws of 8 rows of some {tokens} tokens", long, DRAWS, options=bl.PassOptions(share_prefix=False)
        )
    for hidden in (256, 576, 1024):
        rows += random_model(hidden, tokenizer, test.take(range(12)), model.device)
    return rows


def random_model(hidden: int, tokenizer: Any, test: Split, device: torch.device) -> list[dict[str, Any]]:
    """Return what ten draws cost in a model of eight layers with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=8 * hidden // 3 // 64 * 64,
        num_hidden_layers=8, num_attention_heads=hidden // 64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(device, torch.bfloat16)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, adapter)
    mean = read(model)
    posterior = DiagonalGaussian(mean, {name: torch.full_like(value, 1e-4) for name, value in mean.items()})

    def ours(draws: int, **how: Any) -> None:
        bl.predict(model, posterior, test, draws, tokenizer=tokenizer, mean=False, **how)

    took = in_turn(
        {
            "stacked": lambda: ours(DRAWS),
            "loop": lambda: ours(DRAWS, options=bl.PassOptions(stack=False)),
            "one": lambda: ours(1),
        },
        3,
    )
    return [
        row(f"hidden size {hidden}: ten draws / fastest loop (b)", ratio(took, "stacked", "loop"), 1.0),
        row(f"hidden size {hidden}: ten draws / one draw", ratio(took, "stacked", "one"), None),
    ]


def memory(model: Any, tokenizer: Any, posterior: Posterior, test: Split) -> list[dict[str, Any]]:
    """Return the peak of memory with ten draws by that with one, the model included, at one token budget."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())

    def peak(draws: int) -> float:
        def work() -> None:
            bl.predict(model, posterior, test, draws, tokenizer=tokenizer, mean=False, token_budget=2048)

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            work()
            return float(torch.cuda.max_memory_allocated())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
        now = most = 0
        for event in found.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return float(held + most)

    one, ten = peak(1), peak(DRAWS)
    print(f"  peak {one / 2**20:.0f} MiB with one draw, {ten / 2**20:.0f} MiB with ten, the model {held / 2**20:.0f}")
    return [row("peak of memory, ten draws / one draw", ten / one, 1.3)]
