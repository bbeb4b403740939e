"""What a posterior inherits that is made of one other: linearised, or with scaled log-probabilities."""

from __future__ import annotations

from abc import ABC
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

from bayeslora.params import Params
from bayeslora.posteriors.base import Posterior, Rescaling
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
