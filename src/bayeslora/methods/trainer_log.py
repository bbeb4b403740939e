"""A method's metrics for the Trainer's log and its trackers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
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


@torch.no_grad()
def spread(deviations: Iterable[Tensor]) -> dict[str, float]:
    """Return ``sigma`` and ``sigma_mean``, median and mean of standard deviations σ as in `Summary`; or nothing."""
    summary = Summary()
    for one in deviations:
        summary.add(one)
    return summary.averages("sigma_mean")


@final
class Summary:
    """Averages over tensors that are looked at one at a time, and a median of every k-th coordinate of the first."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.means: list[Tensor] = []
        self.sample: list[Tensor] = []
        self.every = 1

    def add(self, *values: Tensor) -> None:
        """Take tensors of one parameter: deviations, and what is true of its coordinates."""
        flat = values[0].detach().flatten()
        self.sizes.append(flat.numel())
        self.means.append(torch.stack([one.detach().float().mean() for one in values]))
        # tripled, since an odd number meets all rows and columns of matrices whose sides are powers of two
        while sum(map(len, self.sample)) + -(-len(flat) // self.every) > max(SAMPLE, len(self.sizes)):
            self.every *= 3
            self.sample = [one[::3].clone() for one in self.sample]
        self.sample.append(flat[:: self.every].to(torch.float32, copy=True))

    def averages(self, *names: str) -> dict[str, float]:
        """Return the averages over all coordinates by their names, and the first's median as ``sigma``; or nothing."""
        if not self.sizes:
            return {}
        place, weights = self.means[0].device, [size / sum(self.sizes) for size in self.sizes]
        median = torch.cat([one.to(place) for one in self.sample]).median()
        numbers = torch.cat([median[None], *(one.to(place) for one in self.means)]).tolist()
        rows = [numbers[at : at + len(names)] for at in range(1, len(numbers), len(names))]
        averages = {
            name: math.fsum(w * row[k] for w, row in zip(weights, rows, strict=True)) for k, name in enumerate(names)
        }
        return {"sigma": numbers[0], **averages}
