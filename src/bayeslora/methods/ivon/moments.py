"""What IVON's optimiser knows of an adapter: mean and variance by name."""

from __future__ import annotations

import torch
from torch import nn

from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.precision import HALF
from bayeslora.params import Params, lora_parameters


def learned(optimizer: IvonOptimizer, model: nn.Module) -> Params:
    """Return what IVON's optimiser knows of an adapter besides the adapter itself.

    Args:
        optimizer: The optimiser.
        model: The model that it trains.

    Returns:
        σ² of each parameter as ``variance/<name>``, and the exact mean of those in half precision as ``mean/<name>``.
    """
    own = {name: p for name, p in lora_parameters(model).items() if p in optimizer.state}
    halves = {name: p for name, p in own.items() if p.dtype in HALF}
    found = {f"variance/{name}": optimizer.variance(p).cpu() for name, p in own.items()}
    return found | {f"mean/{name}": optimizer.mean(p).float().cpu().clone() for name, p in halves.items()}


def moments(mean: Params, known: Params) -> tuple[Params, Params]:
    """Return the mean and the variance of an adapter.

    Args:
        mean: The adapter as it is.
        known: What `learned` found; its exact means count where they are the adapter up to half precision.

    Returns:
        Mean and variance by the parameters' names.
    """
    exact = {n: known[f"mean/{n}"] for n in mean if f"mean/{n}" in known}
    own = {n: e for n, e in exact.items() if any(torch.equal(e.to(kind).float(), mean[n]) for kind in HALF)}
    return mean | own, {n: known[f"variance/{n}"] for n in mean if f"variance/{n}" in known}
