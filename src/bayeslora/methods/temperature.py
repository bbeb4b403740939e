"""Temperature scaling: one number on the log-probabilities, fitted on held-out rows.

Guo et al. 2017 (arXiv 1706.04599): log p'_c ∝ log p_c / T. Accuracy stays as it is. It works on any predictor: on a
point, on a posterior's mean and on its draws, each with a T of its own that minimises the negative log-likelihood of
the validation rows; draws are scaled one by one before they are averaged. Vector scaling (§4.2 there) has a weight and
a bias for each class.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.methods.base import PostHoc, TrainedAdapter, check_ranges
from bayeslora.methods.search import smallest
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import average
from bayeslora.params import Params
from bayeslora.posteriors import Scaled, scale
from bayeslora.tasks.types import Split, Task, labelled

logger = logging.getLogger(__name__)

_WIDEST = math.log(100.0)
"""Temperatures lie between 1/100 and 100."""


@final
@dataclass(frozen=True)
class Temperature(PostHoc[Scaled]):
    """Scaled log-probabilities.

    Attributes:
        kind: ``temperature`` for one number, ``vector`` for a weight and a bias for each class.
        draws: Draws of the posterior that the scaling is fitted on.
    """

    name: ClassVar[str] = "temperature"
    kind: Literal["temperature", "vector"] = "temperature"
    draws: int = 10

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.kind not in ("temperature", "vector"):
            raise InputError(f"scaling has the kinds 'temperature' and 'vector', and not {self.kind!r}")
        check_ranges(self, at_least={"draws": 1})

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse a task without rows to fit on; see `PostHoc.check`."""
        self.rows(task)

    def _fit(self, adapter: TrainedAdapter) -> Scaled:
        """Return the posterior with scaled log-probabilities."""
        rows = self.rows(adapter.task)
        prediction = adapter.predict(adapter.start, rows, self.draws)
        return Scaled(adapter.start, self.scaling(prediction, rows), adapter.origin)

    def rows(self, task: Task) -> Split:
        """Return the rows that the scaling is fitted on.

        Args:
            task: The task.

        Returns:
            Its validation rows.

        Raises:
            InputError: As `fit`.
        """
        rows = labelled(task.validation, "temperature scaling is fitted on validation rows")
        if self.kind == "vector" and rows.classes is None:
            raise InputError("vector scaling needs the same classes in every row; use the kind 'temperature'")
        return rows

    def scaling(self, prediction: Prediction, rows: Split) -> Params:
        """Return the numbers that minimise the negative log-likelihood of a prediction.

        Args:
            prediction: What a posterior says about the validation rows.
            rows: The rows.

        Returns:
            Weights and biases for the draws and for the mean, as `Scaled` has them.
        """
        mean = prediction.mean_log_probs if prediction.mean_log_probs is not None else prediction.log_p
        scaling: Params = {}
        for of, log_probs in (("draws", prediction.log_probs), ("mean", mean[None])):
            weight, bias = torch.tensor([_inverse_temperature(log_probs, rows.labels)]), torch.zeros(1)
            if abs(math.log(weight)) > 0.99 * _WIDEST:
                logger.warning(
                    "Temperature scaling: the %d held-out rows do not bound the temperature of the %s, and it is at "
                    "its limit, %.3g; too few of them are answered wrongly (or too many). Hold out more rows.",
                    len(rows), of, 1 / float(weight),
                )  # fmt: skip
            if self.kind == "vector":
                weight, bias = _vector(log_probs, rows.labels, float(weight))
            scaling |= {f"{of}.weight": weight, f"{of}.bias": bias}
        return scaling


def _inverse_temperature(log_probs: Float[Tensor, "S N C"], labels: Tensor) -> float:
    """Return the 1/T with the lowest negative log-likelihood."""
    nothing = torch.zeros(1)

    def loss(exponent: float) -> float:
        """Return the negative log-likelihood with the logarithm of 1/T."""
        return float(nll(average(scale(log_probs, torch.tensor([math.exp(exponent)]), nothing)), labels))

    return math.exp(smallest(loss, -_WIDEST, _WIDEST))


def _vector(log_probs: Float[Tensor, "S N C"], labels: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """Return the weights and biases with the lowest negative log-likelihood, found from a temperature by L-BFGS."""
    classes = log_probs.shape[-1]
    exponents = torch.full((classes,), math.log(start), requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    rows = torch.arange(len(labels))
    optimizer = torch.optim.LBFGS([exponents, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        """Return the negative log-likelihood, and leave its gradient."""
        optimizer.zero_grad()
        limited = exponents.clamp(-_WIDEST, _WIDEST)
        value = -average(scale(log_probs, limited.exp(), bias - bias.mean()))[rows, labels].mean()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return exponents.detach().clamp(-_WIDEST, _WIDEST).exp(), (bias - bias.mean()).detach()
