"""Figures of a method for the Trainer's log and its trackers; and whether IVON learned its variance."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

logger = logging.getLogger(__name__)


SAMPLE = 2**17
"""Most coordinates of which a median is taken."""


@final
class MetricsCallback(TrainerCallback):
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
        deviations: Standard deviations σ; they are looked at one at a time, on their own devices.

    Returns:
        ``sigma``: median σ, where there are more than `SAMPLE` coordinates of every 3rd, 9th, 27th … of each tensor, so
        that at most that many are sorted; ``sigma_mean``: mean σ of all. Empty if there is none.
    """
    summary = _Summary()
    for one in deviations:
        summary.add(one)
    return summary.averages("sigma_mean")


@final
class _Summary:
    """Averages over tensors that are looked at one at a time, and a bounded sample of the first of each for a median.

    The sample is every k-th coordinate of each tensor. k is tripled when there are too many: an odd k meets all rows
    and columns of matrices whose sides are powers of two.
    """

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
        found = {
            name: math.fsum(w * row[k] for w, row in zip(weights, rows, strict=True)) for k, name in enumerate(names)
        }
        return {"sigma": numbers[0], **found}
