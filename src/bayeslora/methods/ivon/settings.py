"""IVON's settings: what is published, what the defaults are and why, which have a meaning, and the estimated prior.

The defaults are for one adapter of any size and for 100 to 10,000 steps; docs/methods/ivon.md has the figures and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayeslora.errors import InputError
from bayeslora.params import stack_across, whole

Group = dict[str, Any]
"""Settings of a parameter group of `IvonOptimizer`, or what it keeps of a parameter, by name."""

PRESETS: dict[str, Group] = {
    name: {"ess": ess, "hess_init": hess, "learning_rate": 0.03, "clip_radius": 1e-3, "betas": (0.9, 0.99999)}
    for ess, hess, names in (
        (1e7, 3e-4, ("winogrande_s", "boolq")),
        (1e8, 3e-4, ("winogrande_m",)),
        (1e6, 1e-3, ("arc_easy", "arc_challenge", "openbookqa")),
    )
    for name in names
}
"""The published settings for Llama-2-7B and 10,000 steps of batch 4 with linear decay, δ = 0, by task."""

BETAS = (0.9, 0.999)
"""(β₁, β₂) if not given."""

STEP = 0.5
"""The largest step if not given, as a share of the Trainer's learning rate."""

WARMUP = 300
"""Steps over which the prior's pull on m grows in if not given."""

NOISE_A, NOISE_B = 0.8, 0.45
"""σ₀ of A and of other matrices is NOISE_A/√in; σ₀ of B is NOISE_B·√3/(s·√(rM))."""

_PRIOR_MEMORY = 0.99
"""Exponential smoothing of the empirical prior's variance, per step."""


def default_ess(num_data: int, num_parameters: int) -> float:
    """Return λ if neither it nor the temperature is given: P·√N/50 for P parameters, and N at least."""
    return max(float(num_data), num_parameters * math.sqrt(num_data) / 50)


def default_sigma(shape: torch.Size, of_b: tuple[float, int, int] | None = None) -> float:
    """Return σ₀, also the prior's, of a shape [O, I]; of a B with its scaling s, rank r and number M of modules."""
    if of_b is not None:
        scaling, rank, modules = of_b
        return NOISE_B * math.sqrt(3 / (rank * modules)) / abs(scaling)
    return NOISE_A / math.sqrt(shape[1:].numel()) if len(shape) > 1 else NOISE_A / 20


def check_ivon(group: Group) -> None:
    """Refuse settings, by the names that `IvonOptimizer` has for them, that have no meaning."""
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise InputError(f"both of IVON's betas must be in [0, 1), and they are {beta1} and {beta2}")
    for key in ("lr", "weight_decay", "hess_init", "prior_warmup"):
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
    for key, words in (("prior", ("fixed", "empirical")), ("prior_mean", ("zero", "start"))):
        if group[key] not in words:
            raise InputError(f"IVON's {key} must be {words[0]} or {words[1]}, and it is {group[key]!r}")


def update_hessian(group: Group, hess: list[Tensor], deltas: list[float], products: list[Tensor]) -> None:
    """Move each h, in place, by Price's estimate f = λ(h+δ) · noise ⊙ gradient; the products are those of the step."""
    _, beta2 = group["betas"]
    precision = torch._foreach_add(hess, deltas)
    ratio = torch._foreach_mul(products, group["ess"])  # f / (h+δ)
    clamp(ratio, group["price_clip"])
    gap = torch._foreach_mul(ratio, precision)
    torch._foreach_sub_(gap, hess)
    torch._foreach_mul_(gap, 1 - beta2)  # (1−β₂)(f−h)
    torch._foreach_mul_(precision, 2)
    half = torch._foreach_div(gap, precision)
    torch._foreach_add_(half, 1)
    torch._foreach_mul_(gap, half)
    torch._foreach_add_(hess, gap)
    if group["bounded"]:
        torch._foreach_clamp_min_(hess, 0.0)


def estimate_prior(group: Group, states: list[Group], means: list[Tensor]) -> list[float]:
    """Move each δ towards 1/(λ·mean(m² + σ²)), which maximises the evidence bound over the prior's variance."""
    ess = group["ess"]
    second = [
        whole(m.square().mean() + (1 / (ess * (s["hess"] + s["delta"]))).mean())
        for s, m in zip(states, means, strict=True)
    ]
    for state, variance in zip(states, stack_across(second).tolist(), strict=True):
        now = 1 / (ess * state["delta"]) if state["delta"] > 0 else variance
        state["delta"] = 1 / (ess * (_PRIOR_MEMORY * now + (1 - _PRIOR_MEMORY) * variance))
    return [s["delta"] for s in states]


def clamp(tensors: list[Tensor] | tuple[Tensor, ...], bound: float) -> None:
    """Keep all numbers within ±bound, in place."""
    if math.isfinite(bound):
        torch._foreach_clamp_max_(tensors, bound)
        torch._foreach_clamp_min_(tensors, -bound)


def pull_weight(group: Group, state: Group) -> float:
    """Return the weight of m's distance from its prior: δ, growing in as 1 − e^{−t/warmup}; 0 if δ is estimated."""
    if group["prior"] == "empirical":
        return 0.0
    warmup = group["prior_warmup"]
    return float(state["delta"] * (-math.expm1(-state["step"] / warmup) if warmup else 1.0))


def from_prior(means: list[Tensor], states: list[Group]) -> list[Tensor]:
    """Return how far each m is from the mean of its prior: ``start``, or zero."""
    return [m - s["start"] if "start" in s else m for m, s in zip(means, states, strict=True)]


def parts(state: Group, of: Callable[[Tensor], Tensor]) -> Group:
    """Return a parameter's state with a part of each tensor, `local` or `whole` where it is spread over processes."""
    return {key: of(value) if isinstance(value, Tensor) else value for key, value in state.items()}
