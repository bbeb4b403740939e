"""Whether IVON learned its variance: figures for the log, and a word at the end."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from bayeslora.optim import IvonOptimizer
from bayeslora.params import live

logger = logging.getLogger(__name__)

LEARNED = 0.5
"""The variance counts as learned if at least this share of h has moved by more than 10 % from h₀."""


@torch.no_grad()
def diagnostics(optimizer: IvonOptimizer) -> dict[str, float]:
    """Return what tells whether the variance was learned.

    Args:
        optimizer: The optimiser.

    Returns:
        ``hess_moved``: share of coordinates whose h is more than 10 % off h₀; ``clipped``: share whose update is at the
        clip radius; ``sigma``: median σ. Empty before the first step.
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
        "sigma": float(torch.cat(sigma).median()),
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
