"""Prediction from a posterior: one pass over the data per draw, in batches of similar length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora._typing import Float
from bayeslora.engine.encode import Encoded
from bayeslora.engine.linearised import LOGIT_DRAWS, gradient_budget, logit_draws, logit_moments
from bayeslora.engine.readouts import Batch, Readout, readout_for
from bayeslora.errors import InputError
from bayeslora.operations import draw_count
from bayeslora.origin import check_base
from bayeslora.params import device_of, evaluating, require_lora
from bayeslora.posteriors import Linearised, Mixture, Point, Posterior, Scaled, TokenDropout, member_seed
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
            different draws: 1 for a point, M for an ensemble of M points. A linearised posterior has at least 256, of
            its logits.
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
    if _is_linearised(posterior):
        token_budget = gradient_budget(token_budget, split)
        draws = max(draws, LOGIT_DRAWS) if draws > 0 else draws
    batches, cut = batched(model, readout, split, token_budget)
    count = draw_count(posterior, draws)
    began = time.perf_counter()
    with (
        evaluating(model),
        readout.attached(model),
        tqdm(total=_passes(posterior, count) * len(batches), desc="predict", unit="batch", disable=not progress) as bar,
    ):
        log_probs, mean = _Engine(model, batches, len(split), bar.update).run(posterior, count, seed)
    return Prediction(
        log_probs=log_probs,
        mean_log_probs=mean,
        components=_members(posterior, count),
        truncated=cut,
        readout=readout.name,
        seconds=time.perf_counter() - began,
    )


@final
@dataclass(frozen=True)
class _Engine:
    """Passes over the data under any posterior.

    Attributes:
        model: PEFT model with the readout attached.
        batches: Indices of the examples, and the batch.
        examples: Number N of examples.
        done: Called after each batch.
    """

    model: nn.Module
    batches: Sequence[tuple[list[int], Batch]]
    examples: int
    done: Callable[[], object]

    def run(self, posterior: Posterior, count: int, seed: int) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"]]:
        """Return the log-probabilities of the draws, and those of the posterior's mean."""
        if isinstance(posterior, Mixture):
            size = min(count, len(posterior.members))
            shares = [len(range(k, count, size)) for k in range(size)]
            found = [
                self.run(m, share, member_seed(seed, k))
                for k, (m, share) in enumerate(zip(posterior.members, shares, strict=False))
            ]
            return torch.stack([found[k % size][0][k // size] for k in range(count)]), found[0][1]
        if isinstance(posterior, Scaled):
            draws, mean = self.run(posterior.posterior, count, seed)
            return posterior.apply(draws, "draws"), posterior.apply(mean, "mean")
        if isinstance(posterior, Linearised):
            with posterior.applied(self.model, None):
                logits, covariances = logit_moments(
                    self.model, [posterior.posterior], self.batches, self.examples, self.done
                )
            drawn = logit_draws(logits, covariances[0], count, seed)
            return drawn.log_softmax(-1), logits.log_softmax(-1)
        mean = self._pass(posterior.applied(self.model, None))
        if isinstance(posterior, Point):
            return mean.expand(count, *mean.shape).clone(), mean
        if isinstance(posterior, TokenDropout):
            with posterior.applied(self.model, None):
                return torch.stack([self._pass(posterior.dropping(self.model, k, seed)) for k in range(count)]), mean
        return torch.stack([self._pass(posterior.applied(self.model, k, seed)) for k in range(count)]), mean

    @torch.inference_mode()
    def _pass(self, weights: AbstractContextManager[None]) -> Float[Tensor, "N C"]:
        """Return the log-probabilities of all examples while the model is what the context makes of it."""
        found = torch.full((self.examples, 0), -torch.inf)
        with weights:
            for order, batch in self.batches:
                log_p = require_lora(self.model)(**batch).logits.float().log_softmax(-1).cpu()
                if (more := log_p.shape[1] - found.shape[1]) > 0:
                    found = nn.functional.pad(found, (0, more), value=-torch.inf)
                found[order, : log_p.shape[1]] = log_p
                self.done()
        return found


def _is_linearised(posterior: Posterior) -> bool:
    """Say whether a posterior, or one that it is made of, is linearised."""
    match posterior:
        case Mixture(members=members):
            return any(map(_is_linearised, members))
        case Scaled(posterior=inner):
            return _is_linearised(inner)
    return isinstance(posterior, Linearised)


def _passes(posterior: Posterior, count: int) -> int:
    """Return how often the data are passed."""
    match posterior:
        case Mixture(members=members):
            return sum(_passes(m, len(range(k, count, len(members)))) for k, m in enumerate(members[:count]))
        case Scaled():
            return _passes(posterior.posterior, count)
        case Point() | Linearised():
            return 1
    return count + 1


def batched(
    model: nn.Module, readout: Readout, split: Split, token_budget: int
) -> tuple[list[tuple[list[int], Batch]], int]:
    """Return a split in batches on the model's device, ready for the model with the readout attached.

    Args:
        model: PEFT model.
        readout: How answers are read.
        split: The examples.
        token_budget: Most tokens of a batch, padding included.

    Returns:
        Batches with the indices of their examples, and how many examples were truncated.
    """
    rows, cut = readout.encode(split)
    device = device_of(model)
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


def _members(posterior: Posterior, count: int) -> tuple[int, ...] | None:
    """Return the mixture's member of each draw."""
    if isinstance(posterior, Scaled):
        return _members(posterior.posterior, count)
    if not isinstance(posterior, Mixture):
        return None
    return tuple(k % len(posterior.members) for k in range(count))
