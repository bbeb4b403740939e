"""A method's metrics for the Trainer's log and its trackers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import final

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

SAMPLE = 2**17
"""Most coordinates of which a median is taken."""


@final
class MetricsCallback(TrainerCallback):
    """Adds ``metrics`` of the Trainer's state to what is logged, as ``<method>_<name>``, before trackers see it."""

    def __init__(self, method: str, metrics: Callable[[TrainerState], dict[str, float]]) -> None:
        self.method, self.metrics = method, metrics

    def on_train_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Go before the trackers, which the Trainer calls before the callbacks that it is given."""
        # Nothing that a callback is given leads to the list of callbacks, so it is taken from the caller, if that is a
        # `CallbackHandler`; else the metrics come after the trackers, and are in the log alone.
        caller = getattr(inspect.currentframe(), "f_back", None)
        handler = None if caller is None else caller.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(one is self for one in handler.callbacks):
            handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Add the metrics to what is logged while training."""
        logs = kwargs.get("logs")
        if isinstance(logs, dict) and "loss" in logs:
            metrics = {f"{self.method}_{name}": value for name, value in self.metrics(state).items()}
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)


def spread(deviations: Iterable[Tensor]) -> dict[str, float]:
    """Return ``sigma`` and ``sigma_mean``, median and mean of standard deviations σ as in `averages`; or nothing."""
    return averages(["sigma_mean"], ((one,) for one in deviations))


@torch.no_grad()
def averages(names: Sequence[str], parameters: Iterable[Sequence[Tensor]]) -> dict[str, float]:
    """Return means over all coordinates of each parameter's named tensors, and the first's median as ``sigma``.

    One parameter is looked at at a time; the median is of every k-th coordinate. Without parameters nothing is known.
    """
    sizes, means, sample, every = list[int](), list[Tensor](), list[Tensor](), 1
    for values in parameters:
        flat = values[0].detach().flatten()
        sizes.append(flat.numel())
        means.append(torch.stack([one.detach().float().mean() for one in values]))
        # tripled, since an odd number meets all rows and columns of matrices whose sides are powers of two
        while sum(map(len, sample)) + -(-len(flat) // every) > max(SAMPLE, len(sizes)):
            every *= 3
            sample = [one[::3].clone() for one in sample]
        sample.append(flat[::every].to(torch.float32, copy=True))
    if not sizes:
        return {}
    place, weights = means[0].device, [size / sum(sizes) for size in sizes]
    median = torch.cat([one.to(place) for one in sample]).median()
    numbers = torch.cat([median[None], *(one.to(place) for one in means)]).tolist()
    columns = [numbers[k + 1 :: len(names)] for k in range(len(names))]
    weighted = [math.fsum(w * value for w, value in zip(weights, column, strict=True)) for column in columns]
    return {"sigma": numbers[0], **dict(zip(names, weighted, strict=True))}
