"""What IVON's optimiser knows of an adapter: mean and variance by name."""

from __future__ import annotations

import torch
from torch import nn

from bayeslora.methods.callback import HALF
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.params import Params, lora_parameters


def learned(optimizer: IvonOptimizer, model: nn.Module) -> Params:
    """Return σ² as ``variance/<name>``, and as ``mean/<name>`` the exact mean of what is in half precision."""
    params = {name: p for name, p in lora_parameters(model).items() if p in optimizer.state}
    variances = {f"variance/{name}": optimizer.variance(p).cpu() for name, p in params.items()}
    means = {name: optimizer.mean(p).float().cpu().clone() for name, p in params.items() if p.dtype in HALF}
    return variances | {f"mean/{name}": mean for name, mean in means.items()}


def moments(mean: Params, known: Params) -> tuple[Params, Params]:
    """Return mean and variance; exact means in `known` count where they are the adapter up to half precision."""
    exact = {n: known[f"mean/{n}"] for n in mean if f"mean/{n}" in known}
    exact = {n: e for n, e in exact.items() if any(torch.equal(e.to(kind).float(), mean[n]) for kind in HALF)}
    return mean | exact, {n: known[f"variance/{n}"] for n in mean if f"variance/{n}" in known}
