"""Gaussians over the adapter parameter by parameter: diagonal, and diagonal plus low rank."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.base import Posterior, Rescaling, rescaled_mean
from bayeslora.posteriors.linearised import Linearisable
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Sampling

_WEIGHTS = "low-rank"
"""What the noise along the snapshots is drawn under, in the place of a parameter's name."""


@final
@dataclass(frozen=True)
class DiagonalGaussian(Linearisable):
    """Independent normal parameters: N(mean, diag variance).

    Attributes:
        mean: Means of all parameters.
        variance: Variances; parameters that it does not name have none.
    """

    description: ClassVar[str] = "a Gaussian with a variance of its own for each parameter"

    mean: Params
    variance: Params
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check that every variance belongs to a mean, and is finite and not negative."""
        _check_variance(self.mean, self.variance)

    @cached_property
    def _deviation(self) -> Params:
        """The square roots of the variances, which every draw needs."""
        return {name: v.sqrt() for name, v in self.variance.items()}

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return mean + √variance · ε."""
        draw = dict(self.mean)
        for name, noise in self.noise.normal(self._deviation, index, seed, sampling):
            draw[name] = torch.addcmul(self.mean[name], noise, self._deviation[name], out=noise)
        return draw

    def standard_deviation(self) -> Params:
        """Return √variance."""
        return dict(self._deviation)

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> DiagonalGaussian:
        """Return the Gaussian with σ, and the mean if asked, multiplied parameter by parameter."""
        variance = {name: v * noise(name, self) ** 2 for name, v in self.variance.items()}
        return replace(self, mean=rescaled_mean(self, signal), variance=variance)

    @property
    def noisy(self) -> Collection[str]:
        """The parameters that have a variance."""
        return self.variance.keys()

    def covariance(self, name: str, projected: Float[Tensor, "C N O I"]) -> Float[Tensor, "N C C"]:
        """Return J Σ Jᵀ of one parameter."""
        variance = self.variance[name].to(projected).view(projected.shape[2:])
        return torch.einsum("cnoi,dnoi->ncd", projected * variance, projected)


@final
@dataclass(frozen=True)
class LowRankGaussian(Posterior):
    """Normal with diagonal plus low-rank covariance, as SWAG leaves it (Maddox et al. 2019, equation 1).

    θ = mean + √scale · ( √variance ⊙ ε₁ + Dᵀ ε₂ / √(K−1) ), with the rows of D the snapshots less the mean, and one ε₂
    for all parameters.

    Attributes:
        mean: Means of all parameters.
        variance: Variances of the diagonal part, before ``scale``.
        snapshots: K raw snapshots [K *shape] of each parameter that ``variance`` names; centred when drawn.
        scale: Factor on the covariance; 1/2 in the paper.
    """

    description: ClassVar[str] = "a Gaussian of low rank plus a diagonal"

    mean: Params
    variance: Params
    snapshots: Params
    scale: float = 0.5
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check shapes, the scale, and that there are at least two snapshots."""
        _check_variance(self.mean, self.variance)
        if not 0 <= self.scale < math.inf:
            raise InputError(f"the scale of a covariance must be finite and not negative, and it is {self.scale}")
        if self.snapshots.keys() != self.variance.keys():
            raise InputError("the snapshots and the variance of a low-rank posterior name different parameters")
        for name, s in self.snapshots.items():
            if s.shape[1:] != self.mean[name].shape:
                raise InputError(f"the snapshots of {name!r} have shape {tuple(s.shape)}, which does not fit the mean")
            if len(s) != self.rank:
                raise InputError(
                    f"the parameters of a low-rank posterior need equally many snapshots; {name!r} has more"
                )
        if self.rank < 2:
            raise InputError(
                f"a low-rank posterior needs at least 2 snapshots, and there are {self.rank}; start "
                "collecting earlier or more often"
            )

    @property
    def rank(self) -> int:
        """Number of snapshots K."""
        return min((len(s) for s in self.snapshots.values()), default=0)

    @cached_property
    def _deviation(self) -> Params:
        """The square roots of the diagonal part, scale and all, which every draw needs."""
        return {name: (self.scale * v).sqrt() for name, v in self.variance.items()}

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return one draw; see the class for the formula."""
        draw = dict(self.mean)
        first = next(iter(self.snapshots.values()))
        noise = self.noise.normal({_WEIGHTS: first.new_empty(self.rank)} | self._deviation, index, seed, sampling)
        weights = next(noise)[1] * math.sqrt(self.scale / (self.rank - 1))
        for name, z in noise:
            m = self.mean[name]
            low_rank = torch.tensordot(weights.to(m.device), self.snapshots[name] - m, dims=1)
            draw[name] = torch.addcmul(m, z, self._deviation[name], out=z).add_(low_rank)
        return draw

    def standard_deviation(self) -> Params:
        """Return √diagonal of the covariance, both parts of it."""
        low_rank = {name: (s - self.mean[name]).square().sum(0) / (self.rank - 1) for name, s in self.snapshots.items()}
        return {name: (self.scale * (v + low_rank[name])).sqrt() for name, v in self.variance.items()}

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> LowRankGaussian:
        """Return the Gaussian with both parts' σ, and the mean if asked, multiplied parameter by parameter."""
        factors, mean = {name: noise(name, self) for name in self.variance}, rescaled_mean(self, signal)
        return replace(
            self,
            mean=mean,
            variance={name: v * factors[name] ** 2 for name, v in self.variance.items()},
            snapshots={n: mean[n] + (s - self.mean[n]) * factors[n] for n, s in self.snapshots.items()},
        )


def _check_variance(mean: Params, variance: Params) -> None:
    """Refuse a variance that has no mean, another shape, or a value that is negative or not finite."""
    for name, v in variance.items():
        if name not in mean or mean[name].shape != v.shape:
            raise InputError(f"the variance of {name!r} has no mean of the same shape")
        if not bool(torch.isfinite(v).all()) or bool((v < 0).any()):
            raise InputError(f"the variance of {name!r} has a value that is negative or not finite")
