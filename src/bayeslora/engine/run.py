"""Prediction from a posterior: one pass over the data per draw, in batches of similar length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora._typing import Float
from bayeslora.engine.encode import Encoded
from bayeslora.engine.readouts import Batch, Readout, readout_for
from bayeslora.errors import InputError
from bayeslora.operations import draw_count
from bayeslora.origin import check_base
from bayeslora.params import evaluating, live, require_lora
from bayeslora.posteriors import Mixture, Point, Posterior
from bayeslora.prediction import Prediction
from bayeslora.tasks.types import Split

TOKEN_BUDGET = 2048
"""Tokens of a batch, padding included, unless the caller says otherwise."""


def predict(
    model: nn.Module,
    posterior: Posterior,
    split: Split,
    draws: int = 10,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    token_budget: int = TOKEN_BUDGET,
    progress: bool = False,
) -> Prediction:
    """Return the predictive distribution of every example: by S draws, and by the posterior's mean in one pass.

    Args:
        model: PEFT model with the base and the adapter configuration that the posterior was trained on. Its own adapter
            weights do not matter and are unchanged afterwards.
        posterior: What was learned.
        split: The N examples and how they are put to the model.
        draws: Number S of draws. A mixture's members get equally many, and there are never more than there are
            different draws: 1 for a point, M for an ensemble of M points.
        seed: Which stream of draws.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch, padding included; a single longer example is its own batch.
        progress: Whether to show a bar with the time left.

    Returns:
        The prediction, with ``log_probs`` [S N C] and ``mean_log_probs`` [N C] in float32 on the CPU. For a point the
        two are the same; for a mixture the mean is its first member's.

    Raises:
        InputError: If the split is empty, or the posterior, the model and the split do not fit together.
    """
    if not len(split):
        raise InputError(f"{split.name} has no examples")
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    readout = readout_for(model, split, tokenizer)
    batches, cut = _batches(model, readout, split, token_budget)
    count = draw_count(posterior, draws)
    first_is_mean = isinstance(posterior, Point) or (
        isinstance(posterior, Mixture) and isinstance(posterior.members[0], Point)
    )
    numbers: list[int | None] = list(range(count)) if first_is_mean else [None, *range(count)]
    began = time.perf_counter()
    found = []
    with (
        evaluating(model),
        torch.inference_mode(),
        readout.attached(model),
        tqdm(total=len(numbers) * len(batches), desc="predict", unit="batch", disable=not progress) as bar,
    ):
        for number in numbers:
            with posterior.applied(model, number, seed):
                found.append(_one_pass(model, batches, len(split), bar))
    mean = found[0] if first_is_mean else found.pop(0)
    return Prediction(
        log_probs=torch.stack(found),
        mean_log_probs=mean,
        components=_members(posterior, count),
        truncated=cut,
        readout=readout.name,
        seconds=time.perf_counter() - began,
    )


def _batches(
    model: nn.Module, readout: Readout, split: Split, token_budget: int
) -> tuple[list[tuple[list[int], Batch]], int]:
    """Return batches with the examples' indices, on the model's device, and how many examples were truncated."""
    rows, cut = readout.encode(split)
    device = next(iter(live(model).values())).device
    found = []
    for group in grouped(rows, readout, token_budget):
        batch = readout.collate([row for _, row in group])
        held = {k: v.to(device) for k, v in batch.items() if k not in ("labels", "shift_labels")}
        found.append(([index for index, _ in group], held))
    return found, cut


def grouped(rows: Sequence[Encoded], readout: Readout, token_budget: int) -> list[list[tuple[int, Encoded]]]:
    """Return the examples in batches of similar length under a token budget, the longest first.

    Args:
        rows: Encoded examples.
        readout: Gives each example's length.
        token_budget: Most tokens of a batch, padding included.

    Returns:
        Batches of (index of the example, example).
    """
    lengths = [readout.length(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
    groups: list[list[tuple[int, Encoded]]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0][0]] > token_budget:
            groups.append([])
        groups[-1].append((i, rows[i]))
    return groups


def _one_pass(
    model: nn.Module, batches: Sequence[tuple[list[int], Batch]], examples: int, bar: Any
) -> Float[Tensor, "N C"]:
    """Return the log-probabilities of all examples under the weights that the model has now."""
    found: Tensor | None = None
    for order, batch in batches:
        logits = require_lora(model)(**batch).logits.float()
        log_p = logits.log_softmax(-1).cpu()
        if found is None:
            found = torch.full((examples, 0), -torch.inf)
        if log_p.shape[1] > found.shape[1]:
            found = torch.cat([found, torch.full((examples, log_p.shape[1] - found.shape[1]), -torch.inf)], 1)
        found[order, : log_p.shape[1]] = log_p
        bar.update()
    if found is None:
        raise InputError("there is nothing to predict")
    return found


def _members(posterior: Posterior, count: int) -> tuple[int, ...] | None:
    """Return the mixture's member of each draw."""
    if not isinstance(posterior, Mixture):
        return None
    return tuple(k % len(posterior.members) for k in range(count))
