"""Whether IVON learned its variance: metrics for the Trainer's log and a report at the end."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.settings import from_prior, pull_weight
from bayeslora.methods.trainer_log import Summary
from bayeslora.params import lora_parameters

logger = logging.getLogger(__name__)

LEARNED = 0.5
"""The variance counts as learned if at least this share of h+δ is more than 10 % off what it would be without data."""


@torch.no_grad()
def diagnostics(optimizer: IvonOptimizer) -> dict[str, float]:
    """Return what tells whether the variance was learned; empty before the first step.

    ``hess_moved``: share of coordinates whose h+δ is more than 10 % off what it would be without data, h₀β₂ᵗ + δ;
    ``clipped``: share whose update is at the clip radius; ``ess``: λ, how many examples the data count for; ``sigma``
    and ``sigma_mean``: median and mean σ, the median as in `spread`. The device is waited for once.
    """
    summary = Summary()
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or not state["step"]:
                continue
            precision = state["hess"] + state["delta"]
            update = state["avg_grad"] / (1 - group["betas"][0] ** state["step"])
            update = update + pull_weight(group, state) * from_prior([optimizer.mean(p)], [state])[0]
            untaught = state.get("hess_init", group["hess_init"]) * group["betas"][1] ** state["step"] + state["delta"]
            moved = (precision / untaught - 1).abs() > 0.1
            clipped = (update / precision).abs() >= group["clip_radius"]
            summary.add((group["ess"] * precision).rsqrt(), moved, clipped)
    averages = summary.averages("sigma_mean", "hess_moved", "clipped")
    return averages and {**averages, "ess": float(optimizer.param_groups[0]["ess"])}


def report(optimizer: IvonOptimizer, model: nn.Module) -> None:
    """Log what came of the variance, and warn if it was hardly learned."""
    metrics = diagnostics(optimizer)
    if not metrics:
        return
    sizes = {}
    for part in ("lora_A", "lora_B"):
        values = [p.detach().abs().median() for name, p in lora_parameters(model).items() if part in name]
        sizes[part] = float(torch.stack(values).median()) if values else math.nan
    logger.info(
        "IVON: median sigma %.2g (median |A| %.2g, |B| %.2g); %.0f %% of h is more than 10 %% off what it "
        "would be without data; %.0f %% of the last update was at the clip radius.",
        metrics["sigma"],
        sizes["lora_A"],
        sizes["lora_B"],
        100 * metrics["hess_moved"],
        100 * metrics["clipped"],
    )
    if metrics["hess_moved"] < LEARNED:
        logger.warning(
            "IVON's variance was hardly learned (%.0f %% of h is other than without data), so sigma is about what it "
            "was set to: compare with isotropic noise of that size. More draws a step or a longer run teach it more.",
            100 * metrics["hess_moved"],
        )
