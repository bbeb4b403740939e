"""What must be right on a GPU: the same model answers there as on the CPU, learns, generates, serves and goes on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bases import Stand
from report import row
from serving_batches import Request
from transformers import TrainingArguments

import bayeslora as bl
from bayeslora.comparison.costs import peak_memory
from bayeslora.integrations.server import Limits, Served
from bayeslora.integrations.server.worker import Worker
from bayeslora.methods import METHODS
from bayeslora.params import Params, read, write
from bayeslora.prediction.memory import default_token_budget, token_bytes
from bayeslora.tasks.types import Format, Split

STEPS = 20
ROUNDING = 1e-3
"""Largest difference of a probability, in float32, that two devices' orders of addition may make."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ensemble": {"members": 2},
    "multiswag": {"members": 2},
    "mc-dropout": {"rate": 0.1},
}
"""Of methods whose usual ones take long, or need LoRA's dropout."""
Rows = list[dict[str, Any]]


def arguments(folder: str, **changes: Any) -> TrainingArguments:
    """Return the arguments of a short run."""
    options = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": 1,
    }  # fmt: skip
    return TrainingArguments(folder, **(options | changes))


def largest_gap(one: Params, other: Params) -> float:
    """Return the largest difference of two sets of parameters."""
    return max(float((one[name] - other[name].cpu()).abs().max()) for name in one)


def method(name: str, here: Stand, there: Stand) -> Rows:
    """Train on the device; its draws and predictions are the CPU's."""
    made = METHODS[name](**SETTINGS.get(name, {}))
    with tempfile.TemporaryDirectory() as folder:
        posterior = bl.fit(there.model, there.task, made, arguments(folder), tokenizer=there.tokenizer)
    test, gap = there.task.test.take(range(32)), 0.0
    for k in range(2):
        with posterior.applied(there.model, k):
            gap = max(gap, largest_gap(read(there.model), posterior.draw(k)))
    one, other = (
        bl.predict(stand.model, posterior, test, 4, tokenizer=stand.tokenizer).log_probs.exp()
        for stand in (there, here)
    )
    return [
        row(f"{name}: a draw on the device, from the CPU's", gap, 1e-5, "largest difference"),
        row(f"{name}: a probability, from the CPU's", float((one - other).abs().max()), ROUNDING, "largest difference"),
    ]


def answers(here: Stand, there: Stand) -> Rows:
    """Answer with noise on the answer's tokens only, which go on from keys and values that were kept."""
    one, other = (
        bl.predict(
            stand.model, bl.restricted(stand.posterior(), tokens="answer"), stand.task.test.take(range(32)), 4,
            tokenizer=stand.tokenizer,
        ).log_probs.exp()
        for stand in (there, here)
    )  # fmt: skip
    gap = float((one - other).abs().max())
    return [row("noise on the answer: a probability, from the CPU's", gap, ROUNDING, "largest difference")]


def texts(here: Stand, there: Stand) -> Rows:
    """Generate the CPU's texts."""
    prompts, posterior = [example.text for example in there.task.test.examples[:4]], there.posterior()
    found = [
        bl.generate(stand.model, posterior, prompts, 3, tokenizer=stand.tokenizer, max_new_tokens=12)
        for stand in (here, there)
    ]
    pairs = [
        (a, b) for one, other in zip(*found, strict=True) for a, b in zip(one.token_ids, other.token_ids, strict=True)
    ]
    return [row("generate: tokens that are not the CPU's", sum(a != b for a, b in pairs) / len(pairs), 0.0, "share")]


def served(there: Stand) -> Rows:
    """Answer several requests at once."""
    like = Split("input", (), Format("", "likelihood"), None)
    worker = Worker(Served("model", there.model, there.tokenizer, there.posterior(), 3, 3, like), Limits(waiting=64))
    asked = [Request([5 + k, 6, 7 + k], 4 + k) for k in range(8)]
    for request in asked:
        request.ask(worker, 3)
    late = sum(not request.done.wait(timeout=60) for request in asked)
    worker.close()
    return [row("serve: requests without an answer", late, 0.0, "requests")]


def resumed(there: Stand) -> Rows:
    """Go on from a checkpoint to the unbroken result."""
    with tempfile.TemporaryDirectory() as folder:
        start, options = read(there.model), {"save_strategy": "steps", "save_steps": STEPS // 2}
        found = []
        for again in (False, True):  # where the second one begins does not matter, if it goes on from the checkpoint
            write(there.model, {name: value + again for name, value in start.items()})
            args = arguments(folder, **options)
            found.append(bl.fit(there.model, there.task, bl.Ivon(), args, tokenizer=there.tokenizer, resume=again))
            shutil.rmtree(Path(folder) / f"checkpoint-{STEPS}", ignore_errors=True)
    return [row("resume: from the unbroken run", largest_gap(found[0].mean, found[1].mean), 1e-3, "largest difference")]


def memory(there: Stand) -> Rows:
    """Stay within what the library's estimate of a batch allows: half of the free memory."""
    budget = default_token_budget(there.model)
    posterior, device = there.posterior(), torch.device(there.model.device)
    there.predict(posterior, 1, 4)
    with peak_memory(device) as peak:
        there.predict(posterior, 1, len(there.task.test))
    bound = 2.0 if device.type == "cuda" else None
    return [
        row("memory: a full batch, by the estimate", (peak.bytes or 0) / (budget * token_bytes(there.model)), bound)
    ]


def checks(here: Stand, there: Stand) -> dict[str, Callable[[], Rows]]:
    """Return every check by its name."""
    return {
        **{f"train {name}": partial(method, name, here, there) for name in METHODS},
        "noise on the answer": partial(answers, here, there),
        "generate": partial(texts, here, there),
        "serve": partial(served, there),
        "resume": partial(resumed, there),
        "memory": partial(memory, there),
    }
