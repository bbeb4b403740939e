"""The terms of BLoB: the weight π of the divergence, the divergence and its gradient, and the prior of each matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bayeslora._typing import Float
from bayeslora.methods.blob.layer import BlobLinear

PAPER_PRIOR = 0.2
"""The paper's σ_p, in whose units ``kl_rate`` is read where the prior follows the matrix."""

_LLAMA2: dict[str, float] = {"init_spread": 0.05, "prior_sigma": 0.2, "kl_rate": 0.01, "temperature": 1.0}
PRESETS: dict[str, dict[str, float]] = {
    "paper": _LLAMA2,
    "llama2": _LLAMA2,
    "llama3.1": _LLAMA2 | {"prior_sigma": 0.15, "kl_rate": 0.0075},
}
"""The published settings, by base model (Llama-2-7B, Llama-3.1-8B): 5,000 steps of batch 4, AdamW 1e-4."""

DEFAULTS: dict[str, dict[str, float]] = {
    "paper": {"relative_spread": 4.0, "kl_rate": 0.01, "temperature": 1.0},
    "elbo": {"relative_spread": 1.0, "kl_rate": 0.01, "temperature": 0.03},
}
"""What settings are, by update, if neither they nor a preset are given; docs/methods/blob.md says why."""


def kl_weight(step: int, cycle: int) -> float:
    """Return π_i = 2^i/(2^{L+1}−1) of an optimiser step from 0, i = step mod L + 1; a cycle L adds up to nearly 1."""
    i = step % cycle + 1
    return math.ldexp(1.0, i - cycle - 1) / (1 - math.ldexp(1.0, -cycle - 1))


def paper_cycle(num_data: int, batch: int) -> int:
    """Return L = ⌊100·N^{π/8} / batch⌋, at least 1; the batch is all examples of an optimiser step."""
    return max(1, int(100 * num_data ** (math.pi / 8) / batch))


def kl_divergence(mean: Float[Tensor, "R I"], spread: Float[Tensor, "R I"], prior_sigma: float) -> Float[Tensor, ""]:
    """Return KL[N(M, G⁴) ‖ N(0, σ_p²)] in nats, summed over the elements; the deviation is G²."""
    variance = spread.pow(4)
    log_ratio = math.log(prior_sigma) - spread.square().log()
    return (log_ratio + (variance + mean.square()) / (2 * prior_sigma**2) - 0.5).sum()


def spread_gradient(spread: Tensor, prior_sigma: float) -> Tensor:
    """Return dKL/dG = −2/G + 2G³/σ_p²."""
    return spread.pow(3).mul_(2 / prior_sigma**2).sub_(2 / spread)


@dataclass(frozen=True)
class Scale:
    """The prior of one matrix: σ_p, and the length that ``kl_rate`` is read in: 1, or σ_p/0.2 if it follows M."""

    sigma: float
    unit: float


def scales(sizes: Mapping[str, float], prior_sigma: float | None, relative: float) -> dict[str, Scale]:
    """Return each matrix's prior: σ_p of all, or ``relative`` times its root mean square where training begins."""
    if prior_sigma is not None:
        return dict.fromkeys(sizes, Scale(prior_sigma, 1.0))
    return {name: Scale(relative * size, relative * size / PAPER_PRIOR) for name, size in sizes.items()}


def paper_step(layer: BlobLinear, gradient: Tensor, scale: Scale, weight: float, rate: float) -> None:
    """Take the released algorithm's second step: G by ∇NLL + w∇KL and M by w∇KL, plain gradient descent.

    In lengths of ``scale.unit`` it is the step of the paper at σ_p/unit: A → A/u turns a rate κ into κu for G, whose
    square is a length, and κu² for M. ``gradient`` is ∇NLL of G, and is used up.
    """
    gradient.add_(spread_gradient(layer.spread, scale.sigma), alpha=weight)
    layer.spread.sub_(gradient, alpha=rate * scale.unit)
    layer.weight.mul_(1 - rate * weight * (scale.unit / scale.sigma) ** 2)
