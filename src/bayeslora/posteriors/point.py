"""The simplest posterior: a point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from bayeslora.params import Params
from bayeslora.posteriors.base import Posterior, Rescaling
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Sampling


@final
@dataclass(frozen=True)
class Point(Posterior):
    """A point estimate: every draw is the mean."""

    description: ClassVar[str] = "one adapter, without a spread"
    distinct = 1

    mean: Params
    origin: Origin | None = None

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return the mean."""
        return self.mean

    def standard_deviation(self) -> Params:
        """Return nothing: no parameter has a σ."""
        return {}

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> Point:
        """Return the point, which has no noise."""
        return self
