"""Posteriors that are made of one other: what they inherit, and one whose log-probabilities are scaled."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.base import Posterior, Rescaling
from bayeslora.posteriors.engine import Engine, LogProbs
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Draws, Sampling


class Derived(Posterior, ABC):
    """A posterior that is made of one other, whose mean and draws of weights it has."""

    if TYPE_CHECKING:

        @property
        def posterior(self) -> Posterior:
            """The posterior that it is made of."""

    @property
    def mean(self) -> Params:
        """The mean of the posterior that it is made of."""
        return self.posterior.mean

    @property
    def distinct(self) -> int | None:
        """As of the posterior that it is made of."""
        return self.posterior.distinct

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return a draw of the posterior that it is made of; see `Posterior.draw`."""
        return self.posterior.draw(index, seed, sampling)

    def unit(self, sampling: Sampling = "independent") -> int:
        """As of the posterior that it is made of."""
        return self.posterior.unit(sampling)

    def count(self, draws: int | Draws) -> int:
        """As of the posterior that it is made of."""
        return self.posterior.count(draws)

    def components(self, count: int) -> tuple[int, ...] | None:
        """As of the posterior that it is made of."""
        return self.posterior.components(count)

    def standard_deviation(self) -> Params | None:
        """As of the posterior that it is made of."""
        return self.posterior.standard_deviation()

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> Self | None:
        """Return the same of the rescaled posterior; None if that has no noise in the weights."""
        posterior = self.posterior.rescaled(noise, signal)
        return None if posterior is None else replace(cast(Any, self), posterior=posterior)


@final
@dataclass(frozen=True)
class Scaled(Derived):
    """A posterior whose log-probabilities are scaled and normalised again: temperature and vector scaling.

    log p'_c ∝ weight_c · log p_c + bias_c for the draws, and the same with numbers of its own for the mean's weights
    (Guo et al. 2017, arXiv 1706.04599, §4.2). A single weight 1/T is temperature scaling.

    Attributes:
        posterior: The posterior as it was.
        scaling: ``draws.weight``, ``draws.bias``, ``mean.weight`` and ``mean.bias``, each [C], or [1] for all choices.
    """

    description: ClassVar[str] = "a posterior whose log-probabilities are scaled, which the plain adapter does not do"

    posterior: Posterior
    scaling: Params
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.scaling.keys() != {f"{of}.{part}" for of in ("draws", "mean") for part in ("weight", "bias")}:
            raise InputError("a scaled posterior needs weight and bias for the draws and for the mean")
        for name, value in self.scaling.items():
            if value.ndim > 1 or value.shape != self.scaling[name.replace("bias", "weight")].shape:
                raise InputError(f"the scaling's {name} must be one number for each choice, or one for all")
            if not bool(torch.isfinite(value).all()) or (name.endswith("weight") and bool((value <= 0).any())):
                raise InputError(f"the scaling's {name} must be finite{', and positive' * name.endswith('weight')}")

    @property
    def unscaled(self) -> Posterior:
        """The posterior as it was before any scaling."""
        return self.posterior.unscaled

    def scaled(self, log_probs: Tensor, of: str) -> Tensor:
        """Return log-probabilities with this scaling, after those of the posterior as it was."""
        return self.apply(self.posterior.scaled(log_probs, of), of)

    def without_noise(self, point: Posterior) -> Scaled:
        """Return the point with the scaling of the mean."""
        scaling = {
            f"{of}.{part}": self.scaling[f"mean.{part}"] for of in ("draws", "mean") for part in ("weight", "bias")
        }
        return Scaled(self.posterior.without_noise(point), scaling, self.origin)

    @property
    def draws_are_weights(self) -> bool:
        """As of the posterior as it was."""
        return self.posterior.draws_are_weights

    @property
    def before_answer(self) -> Params | None:
        """As of the posterior as it was."""
        return self.posterior.before_answer

    @property
    def minimum_draws(self) -> int:
        """As of the posterior as it was."""
        return self.posterior.minimum_draws

    def passes(self, draws: Draws, *, mean: bool) -> int:
        """As of the posterior as it was."""
        return self.posterior.passes(draws, mean=mean)

    def answers(self, engine: Engine, draws: Draws) -> LogProbs:
        """Return the scaled answers: by the engine, which looks at the scaled error, where draws are weights."""
        if self.draws_are_weights:
            return super().answers(engine, draws)
        log_probs, at_mean = self.posterior.answers(engine, draws)
        return self.apply(log_probs, "draws"), None if at_mean is None else self.apply(at_mean, "mean")

    def apply(self, log_probs: Float[Tensor, "*S N C"], of: str) -> Float[Tensor, "*S N C"]:
        """Return scaled log-probabilities.

        Args:
            log_probs: Log-probabilities; -inf for choices that an example does not have.
            of: ``draws`` or ``mean``.

        Returns:
            The same shape, normalised.

        Raises:
            InputError: If the scaling is for another number of choices.
        """
        return scale(log_probs, self.scaling[f"{of}.weight"], self.scaling[f"{of}.bias"])


def scale(
    log_probs: Float[Tensor, "*S N C"], weight: Float[Tensor, " W"], bias: Float[Tensor, " W"]
) -> Float[Tensor, "*S N C"]:
    """Return log-probabilities scaled and normalised again, by one weight and bias per choice or for all.

    Raises:
        InputError: If there are weights for another number of choices.
    """
    if weight.numel() not in (1, log_probs.shape[-1]):
        raise InputError(f"the scaling is for {weight.numel()} classes, and these rows have {log_probs.shape[-1]}")
    absent = log_probs == -math.inf
    moved = log_probs.masked_fill(absent, 0.0) * weight + bias
    return (
        moved.masked_fill(absent, -math.inf).log_softmax(-1).masked_fill(absent, -math.inf)
    )  # also without any choice
