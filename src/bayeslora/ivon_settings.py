"""IVON's settings: which have a meaning, and the prior that is estimated in training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bayeslora.errors import InputError

_PRIOR_MEMORY = 0.99
"""Exponential smoothing of the empirical prior's variance, per step."""


def check_ivon(group: dict[str, Any]) -> None:
    """Refuse settings that have no meaning.

    Args:
        group: Settings by the names that `IvonOptimizer` has for them.

    Raises:
        InputError: Which one, and why.
    """
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise InputError(f"both of IVON's betas must be in [0, 1), and they are {beta1} and {beta2}")
    for key in ("lr", "weight_decay", "hess_init"):
        if not 0 <= group[key] < math.inf:
            raise InputError(f"IVON's {key} must be finite and not negative, and it is {group[key]}")
    if not 0 < group["ess"] < math.inf:
        raise InputError(f"IVON's ess (λ) must be finite and positive, and it is {group['ess']}")
    if group["hess_init"] + group["weight_decay"] <= 0:
        raise InputError(
            "IVON's hess_init + weight_decay must be positive: with both at 0 the first standard deviation is infinite"
        )
    for key in ("clip_radius", "price_clip"):
        if not group[key] > 0:
            raise InputError(f"IVON's {key} must be positive, and it is {group[key]}")
    if group["prior"] not in ("fixed", "empirical"):
        raise InputError(f"IVON's prior must be fixed or empirical, and it is {group['prior']!r}")


def estimate_prior(group: dict[str, Any], states: list[dict[str, Any]], means: list[Tensor]) -> list[float]:
    """Move each δ towards 1/(λ·mean(m² + σ²)), which maximises the evidence bound over the prior's variance.

    Args:
        group: Settings of the parameters.
        states: The optimiser's state of each parameter; ``delta`` is changed.
        means: The mean m of each.

    Returns:
        The new δ of each.
    """
    ess = group["ess"]
    second = [
        m.square().mean() + (1 / (ess * (s["hess"] + s["delta"]))).mean() for s, m in zip(states, means, strict=True)
    ]
    for state, wanted in zip(states, torch.stack(second).tolist(), strict=True):
        now = 1 / (ess * state["delta"]) if state["delta"] > 0 else wanted
        state["delta"] = 1 / (ess * (_PRIOR_MEMORY * now + (1 - _PRIOR_MEMORY) * wanted))
    return [s["delta"] for s in states]
