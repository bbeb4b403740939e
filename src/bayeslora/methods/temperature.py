"""Temperature scaling: one number on the log-probabilities, fitted on held-out rows.

Guo et al. 2017 (arXiv 1706.04599): log p'_c ∝ log p_c / T. Accuracy stays as it is. It works on any predictor: on a
point, on a posterior's mean and on its draws, each with a T of its own that minimises the negative log-likelihood of
the validation rows; draws are scaled one by one before they are averaged. Vector scaling (§4.2 there) has a weight and
a bias for each class.

Ours is a normal prior on log T, of mean 0, whose density times the likelihood is largest at T. Few rows that are nearly
all answered rightly do not bound T from below, and draws that are made surer and surer become votes: without a prior T
fell to 1/100 on 40 rows, and the test rows that all draws had wrong cost hundreds of nats each.

Without labels (Luo et al. 2025, arXiv 2505.16690, which scales one model): T = argmin Σ_x KL(p_base(·|x) ‖ p_T(·|x))
over the rows where base and tuned model give the same answer, p_T being the scaled point or, ours, the average of the
draws that are scaled one by one. The base is hardly over-confident, and where both answer alike its confidence is about
that of the tuned model's answer; where they differ it is about another, which would push T too far.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from bayeslora._typing import Bool, Float
from bayeslora.errors import InputError
from bayeslora.methods.base import PostHoc, TrainedAdapter, check_ranges
from bayeslora.methods.search import smallest
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import average
from bayeslora.params import Params
from bayeslora.posteriors import Scaled, scale
from bayeslora.prediction.base import check_base_answers
from bayeslora.tasks.types import Split, Task, labelled, present

logger = logging.getLogger(__name__)

_WIDEST = math.log(100.0)
"""Temperatures lie between 1/100 and 100."""
Loss = Callable[[Float[Tensor, "N C"]], Tensor]
"""The loss of some rows' log-probabilities."""
_HELD_OUT = ("held-out rows", "too few of them are answered wrongly (or too many). Hold out more rows.")
_AGREEING = ("rows with the base's answer", "the base is all too sure of them (or of none). Give more rows, or labels.")
"""What rows are called in a warning, and what it advises."""


@final
@dataclass(frozen=True)
class Temperature(PostHoc[Scaled]):
    """Scaled log-probabilities.

    Attributes:
        kind: ``temperature`` for one number, ``vector`` for a weight and a bias for each class.
        draws: Draws of the posterior that the scaling is fitted on.
        labels: Whether it is fitted to the rows' labels, or to what the untuned base says where the two agree.
        prior_sigma: Standard deviation of the prior on log T; ``inf`` for none, as Guo et al. have it. With the kind
            ``vector`` it is that of each weight's logarithm and of each bias, nats. None: 1 with labels, none without.
    """

    name: ClassVar[str] = "temperature"
    kind: Literal["temperature", "vector"] = "temperature"
    draws: int = 10
    labels: bool = True
    prior_sigma: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.kind not in ("temperature", "vector"):
            raise InputError(f"scaling has the kinds 'temperature' and 'vector', and not {self.kind!r}")
        if self.kind == "vector" and not self.labels:
            raise InputError("vector scaling is fitted to labels; use the kind 'temperature' with labels=False")
        check_ranges(self, positive=("prior_sigma",), infinite=("prior_sigma",), at_least={"draws": 1})

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse a task without rows to fit on, or a base without answers; see `PostHoc.check`."""
        self.rows(task)
        if not self.labels:
            check_base_answers(model)

    def _fit(self, adapter: TrainedAdapter) -> Scaled:
        """Return the posterior with scaled log-probabilities."""
        rows = self.rows(adapter.task)
        prediction = adapter.predict(adapter.start, rows, self.draws, base=not self.labels)
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
        purpose = "temperature scaling is fitted on validation rows"
        if not self.labels:
            return present(task.validation, purpose)
        rows = labelled(task.validation, purpose)
        if self.kind == "vector" and rows.classes is None:
            raise InputError("vector scaling needs the same classes in every row; use the kind 'temperature'")
        return rows

    def scaling(self, prediction: Prediction, rows: Split) -> Params:
        """Return the numbers that minimise the loss of a prediction, with the prior's.

        Args:
            prediction: What a posterior says about the validation rows; without labels, what the base says too.
            rows: The rows.

        Returns:
            Weights and biases for the draws and for the mean, as `Scaled` has them.

        Raises:
            InputError: If it is fitted without labels and the base was not asked, or it agrees on no row.
        """
        mean = prediction.mean_log_probs if prediction.mean_log_probs is not None else prediction.log_p
        scaling: Params = {}
        for of, log_probs in (("draws", prediction.log_probs), ("mean", mean[None])):
            loss: Loss = partial(nll, labels=rows.labels)
            which = _HELD_OUT if self.labels else _AGREEING
            if not self.labels:
                agree, loss = _agreement(log_probs, prediction.base_log_probs, of)
                log_probs = log_probs[:, agree]
            pull = self._precision() / log_probs.shape[1]
            weight, bias = torch.tensor([_inverse_temperature(log_probs, loss, pull)]), torch.zeros(1)
            if abs(math.log(weight)) > 0.99 * _WIDEST:
                logger.warning(
                    "Temperature scaling: the %d %s do not bound the temperature of the %s, and it is at its limit, "
                    "%.3g; %s", log_probs.shape[1], which[0], of, 1 / float(weight), which[1],
                )  # fmt: skip
            if self.kind == "vector":
                weight, bias = _vector(log_probs, rows.labels, float(weight), pull)
            scaling |= {f"{of}.weight": weight, f"{of}.bias": bias}
        return scaling

    def _precision(self) -> float:
        """Return one by the variance of the prior."""
        if self.prior_sigma is None:
            return 1.0 if self.labels else 0.0
        return 1 / self.prior_sigma**2


def _agreement(
    log_probs: Float[Tensor, "S N C"], base: Float[Tensor, "N C"] | None, of: str
) -> tuple[Bool[Tensor, " N"], Loss]:
    """Return the rows where base and tuned model give the same answer, and KL(p_base ‖ p) on them up to a constant."""
    if base is None:
        raise InputError("a temperature without labels is fitted to what the base says; predict with base=True")
    agree = average(log_probs).argmax(-1) == base.argmax(-1)
    if not bool(agree.any()):
        raise InputError(
            f"the base agrees with the {of} on none of {len(base)} validation rows, so nothing says how sure to be; "
            "give more rows, or rows with labels and labels=True"
        )
    said = base[agree].double()

    def loss(log_p: Float[Tensor, "N C"]) -> Tensor:
        """Return the cross-entropy, in nats a row."""
        return -(said.exp() * log_p.double().masked_fill(said == -torch.inf, 0.0)).sum(-1).mean()

    return agree, loss


def _inverse_temperature(log_probs: Float[Tensor, "S N C"], loss: Loss, pull: float) -> float:
    """Return the 1/T with the lowest loss of the average of the scaled draws, plus pull/2 (log T)²."""
    nothing = torch.zeros(1)

    def at(exponent: float) -> float:
        """Return the loss with the logarithm of 1/T."""
        of_rows = float(loss(average(scale(log_probs, torch.tensor([math.exp(exponent)]), nothing))))
        return of_rows + pull / 2 * exponent**2

    return math.exp(smallest(at, -_WIDEST, _WIDEST))


def _vector(log_probs: Float[Tensor, "S N C"], labels: Tensor, start: float, pull: float) -> tuple[Tensor, Tensor]:
    """Return the weights and biases with the lowest loss as above, found from a temperature by L-BFGS."""
    classes = log_probs.shape[-1]
    exponents = torch.full((classes,), math.log(start), requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    rows = torch.arange(len(labels))
    optimizer = torch.optim.LBFGS([exponents, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        """Return the negative log-likelihood with the prior's, and leave its gradient."""
        optimizer.zero_grad()
        limited, centred = exponents.clamp(-_WIDEST, _WIDEST), bias - bias.mean()
        value = -average(scale(log_probs, limited.exp(), centred))[rows, labels].mean()
        value = value + pull / 2 * (exponents.square().sum() + centred.square().sum())
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return exponents.detach().clamp(-_WIDEST, _WIDEST).exp(), (bias - bias.mean()).detach()
