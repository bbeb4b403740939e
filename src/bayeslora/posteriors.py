"""Posteriors: what was learned, as values.

A draw is a function of (index, seed, parameter name) and of nothing else: draw k is the same weights for the whole data
set, on every device, in any batch order and in any process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from bayeslora.errors import InputError
from bayeslora.origin import Origin
from bayeslora.params import Params, generator, swapped


class Posterior(ABC):
    """A distribution over adapter parameters.

    Attributes:
        mean: The one adapter that stands for the posterior: what is saved as the plain PEFT adapter.
        origin: Base model, adapter configuration and method; None for one built by hand, which cannot be saved.
    """

    if TYPE_CHECKING:  # a run-time property here would become the default of the families' fields

        @property
        def origin(self) -> Origin | None:
            """Base model, adapter configuration and method."""

        @property
        def mean(self) -> Params:
            """The one adapter that stands for the posterior: what is saved as the plain PEFT adapter."""

    @property
    @abstractmethod
    def distinct(self) -> int | None:
        """How many different draws there are; None where there is no limit."""

    @abstractmethod
    def draw(self, index: int, seed: int = 0) -> Params:
        """Return draw number ``index`` of the stream ``seed``.

        Args:
            index: Number of the draw, from 0.
            seed: Which stream of draws.

        Returns:
            A value for every parameter of the adapter, float32 on the CPU.
        """

    @final
    @contextmanager
    def applied(self, model: nn.Module, draw: int | None, seed: int = 0) -> Iterator[None]:
        """Make the model *be* one draw for the length of a ``with`` block.

        Args:
            model: PEFT model whose active adapter has the posterior's parameters.
            draw: Number of the draw; None for the mean.
            seed: Which stream of draws.

        Yields:
            Nothing. Afterwards, and on any exception, the model is bit for bit what it was.
        """
        with swapped(model, self.mean if draw is None else self.draw(draw, seed)):
            yield

    @final
    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the posterior to a folder: the mean as a plain PEFT adapter, and the spread beside it.

        Args:
            folder: Where to; it appears all at once when everything is written.
            overwrite: Whether a folder that is there may be replaced.
        """
        from bayeslora.storage import save_posterior

        save_posterior(self, Path(folder), overwrite=overwrite)


@final
@dataclass(frozen=True)
class Point(Posterior):
    """A point estimate: every draw is the mean."""

    mean: Params
    origin: Origin | None = None

    @property
    def distinct(self) -> int:
        """One."""
        return 1

    def draw(self, index: int, seed: int = 0) -> Params:
        """Return the mean."""
        return self.mean


@final
@dataclass(frozen=True)
class DiagonalGaussian(Posterior):
    """Independent normal parameters: N(mean, diag variance).

    Attributes:
        mean: Means of all parameters.
        variance: Variances; parameters that it does not name have none.
    """

    mean: Params
    variance: Params
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check that every variance belongs to a mean, and is finite and not negative."""
        _check_variance(self.mean, self.variance)

    @property
    def distinct(self) -> None:
        """No limit."""
        return None

    def draw(self, index: int, seed: int = 0) -> Params:
        """Return mean + √variance · ε."""
        return {
            name: m + self.variance[name].sqrt() * _noise(seed, index, name, m) if name in self.variance else m
            for name, m in self.mean.items()
        }


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

    mean: Params
    variance: Params
    snapshots: Params
    scale: float = 0.5
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check shapes, and that there are at least two snapshots."""
        _check_variance(self.mean, self.variance)
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

    @property
    def distinct(self) -> None:
        """No limit."""
        return None

    def draw(self, index: int, seed: int = 0) -> Params:
        """Return one draw; see the class for the formula."""
        weights = torch.randn(self.rank, generator=generator(seed, index, "low-rank")) / math.sqrt(self.rank - 1)
        drawn = dict(self.mean)
        for name, v in self.variance.items():
            m = self.mean[name]
            low_rank = torch.tensordot(weights, self.snapshots[name] - m, dims=1)
            drawn[name] = m + math.sqrt(self.scale) * (v.sqrt() * _noise(seed, index, name, m) + low_rank)
        return drawn


@final
@dataclass(frozen=True)
class ColumnDropout(Posterior):
    """Dropout as a draw of weights: columns of A are dropped, one mask for all tokens and examples of a draw.

    A' = A ⊙ (1 + strength · (z/(1−p) − 1)) with one z ~ Bernoulli(1−p) per input feature. It is what LoRA's dropout
    does to one token (Gal and Ghahramani 2016), made coherent, so that a draw is an adapter that can be exported.

    Attributes:
        mean: The trained parameters.
        rate: Probability p that a column is dropped.
        strength: Factor on the noise of each A by name; 1 is dropout.
    """

    mean: Params
    rate: float
    strength: Mapping[str, float]
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check the rate."""
        if not 0 < self.rate < 1:
            raise InputError(
                f"a dropout posterior needs a rate in (0, 1), and it is {self.rate}; train with "
                "LoraConfig(lora_dropout=0.1) or pass a rate"
            )

    @property
    def distinct(self) -> None:
        """No limit that matters: 2 to the number of input features."""
        return None

    def draw(self, index: int, seed: int = 0) -> Params:
        """Return the parameters with the columns of one mask dropped."""
        drawn = dict(self.mean)
        for name, strength in self.strength.items():
            a = self.mean[name]
            keep = torch.rand(a.shape[1], generator=generator(seed, index, name)) >= self.rate
            drawn[name] = a * (1 + strength * (keep.float() / (1 - self.rate) - 1))
        return drawn


@final
@dataclass(frozen=True)
class Mixture(Posterior):
    """An equal mixture of any posteriors over the same parameters: ensembles, MultiSWAG, IVON ensembles.

    Draw k comes from member k mod M and is that member's draw k // M; members have independent streams. Averaging the
    weights of members that started apart means nothing, so ``mean`` is the first member's.

    Attributes:
        members: The M posteriors.
    """

    members: tuple[Posterior, ...]
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check that there are members and that they have the same parameters."""
        if not self.members:
            raise InputError("a mixture needs at least one member")
        shapes = [{k: v.shape for k, v in m.mean.items()} for m in self.members]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise InputError(f"member {i} of the mixture has other parameters than member 0")

    @property
    def mean(self) -> Params:
        """The first member's mean."""
        return self.members[0].mean

    @property
    def distinct(self) -> int | None:
        """The sum over the members, if each has an end."""
        counts = [m.distinct for m in self.members]
        return None if None in counts else sum(c for c in counts if c is not None)

    def draw(self, index: int, seed: int = 0) -> Params:
        """Return draw ``index // M`` of member ``index % M``."""
        inner, member = divmod(index, len(self.members))
        fork = seed if member == 0 else int(generator(seed, "member", member).initial_seed())
        return self.members[member].draw(inner, fork)


def _noise(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return standard normal numbers that belong to one parameter of one draw."""
    return torch.randn(like.shape, generator=generator(seed, index, name))


def _check_variance(mean: Params, variance: Params) -> None:
    """Refuse a variance that has no mean, another shape, or a value that is negative or not finite."""
    for name, v in variance.items():
        if name not in mean or mean[name].shape != v.shape:
            raise InputError(f"the variance of {name!r} has no mean of the same shape")
        if not bool(torch.isfinite(v).all()) or bool((v < 0).any()):
            raise InputError(f"the variance of {name!r} has a value that is negative or not finite")
