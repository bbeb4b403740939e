"""Figures of a method for the Trainer's log and its trackers; and whether IVON learned its variance."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from bayeslora.optim import IvonOptimizer
from bayeslora.params import live

logger = logging.getLogger(__name__)

LEARNED = 0.5
"""The variance counts as learned if at least this share of h has moved by more than 10 % from h₀."""


@final
class Figures(TrainerCallback):
    """Adds a method's figures to the losses that the Trainer logs, before its trackers see them.

    The Trainer calls its trackers (``report_to``) before the callbacks that it is given, and tells no callback where
    the others are. So this one looks up who calls it, and goes to the front. It has no other part in training.

    Args:
        method: Name of the method, which the figures' names begin with.
        figures: Returns the figures at the Trainer's state; what it returns is logged as ``<method>_<name>``.
    """

    def __init__(self, method: str, figures: Callable[[TrainerState], dict[str, float]]) -> None:
        self.method, self.figures = method, figures

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go to the front."""
        self._go_first(sys._getframe(1).f_locals.get("self"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go to the front, also of trackers that were added to a Trainer that was there."""
        self._go_first(sys._getframe(1).f_locals.get("self"))

    def _go_first(self, handler: object) -> None:
        """Give the one who calls the callbacks a list that begins with this one; it is going through the old list."""
        if isinstance(handler, CallbackHandler) and any(one is self for one in handler.callbacks):
            handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures to what is logged while training."""
        logs = kwargs.get("logs")
        if isinstance(logs, dict) and "loss" in logs:
            found = {f"{self.method}_{name}": value for name, value in self.figures(state).items()}
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)


@torch.no_grad()
def spread(deviations: Iterable[Tensor]) -> dict[str, float]:
    """Return how far parameters may be from their mean.

    Args:
        deviations: Standard deviations σ.

    Returns:
        ``sigma``: median σ; ``sigma_mean``: mean σ. Empty if there is none.
    """
    parts = [one.detach().flatten().float() for one in deviations]
    if not parts:
        return {}
    sigma = torch.cat(parts)
    return {"sigma": float(sigma.median()), "sigma_mean": float(sigma.mean())}


@torch.no_grad()
def diagnostics(optimizer: IvonOptimizer) -> dict[str, float]:
    """Return what tells whether the variance was learned.

    Args:
        optimizer: The optimiser.

    Returns:
        ``hess_moved``: share of coordinates whose h is more than 10 % off h₀; ``clipped``: share whose update is at the
        clip radius; ``ess``: λ, how many examples the data count for; ``sigma`` and ``sigma_mean``: median and mean σ.
        Empty before the first step.
    """
    moved, clipped, sigma = [], [], []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or not state["step"]:
                continue
            precision = state["hess"] + state["delta"]
            update = state["avg_grad"] / (1 - group["betas"][0] ** state["step"]) + state["delta"] * optimizer.mean(p)
            moved.append((state["hess"] / group["hess_init"] - 1).abs().flatten() > 0.1)
            clipped.append((update / precision).abs().flatten() >= group["clip_radius"])
            sigma.append((group["ess"] * precision).rsqrt().flatten())
    if not moved:
        return {}
    return {
        "hess_moved": float(torch.cat(moved).float().mean()),
        "clipped": float(torch.cat(clipped).float().mean()),
        "ess": float(optimizer.param_groups[0]["ess"]),
        **spread(sigma),
    }


def report(optimizer: IvonOptimizer, model: nn.Module) -> None:
    """Log what came of the variance, and warn if it was hardly learned.

    Args:
        optimizer: The optimiser.
        model: The model that it trained.
    """
    found = diagnostics(optimizer)
    if not found:
        return
    sizes = {}
    for part in ("lora_A", "lora_B"):
        values = [p.detach().abs().median() for name, p in live(model).items() if part in name]
        sizes[part] = float(torch.stack(values).median()) if values else math.nan
    logger.info(
        "IVON: median sigma %.2g (median |A| %.2g, |B| %.2g); %.0f %% of h is more than 10 %% off its start; %.0f %% "
        "of the last update was at the clip radius.",
        found["sigma"],
        sizes["lora_A"],
        sizes["lora_B"],
        100 * found["hess_moved"],
        100 * found["clipped"],
    )
    if found["hess_moved"] < LEARNED:
        logger.warning(
            "IVON's variance was hardly learned (%.0f %% of h has moved), so sigma is about what it was set to: "
            "compare with isotropic noise, train longer, lower the second of betas, or raise the temperature.",
            100 * found["hess_moved"],
        )
