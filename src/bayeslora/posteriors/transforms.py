"""What can be done to a posterior of any family: temper it, prune it, keep its noise to chosen layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors import (
    GROUPS,
    ColumnDropout,
    DiagonalGaussian,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Posterior,
    Sampling,
    Scaled,
    TokenDropout,
)

Factor = float | Tensor


def draw_unit(posterior: Posterior, sampling: Sampling = "independent") -> int:
    """Return how many draws belong together: whole groups of the sampling, of each member of a mixture.

    Args:
        posterior: Any posterior.
        sampling: How the draws belong together.

    Returns:
        The number that draws are taken in multiples of.
    """
    if isinstance(posterior, Scaled):
        return draw_unit(posterior.posterior, sampling)
    if isinstance(posterior, Mixture):
        return len(posterior.members) * math.lcm(*(draw_unit(member, sampling) for member in posterior.members))
    return GROUPS[sampling] if posterior.distinct is None else 1


def draw_count(posterior: Posterior, draws: int, sampling: Sampling = "independent") -> int:
    """Return how many draws serve a request: a mixture's members get equally many, and none is drawn twice.

    Args:
        posterior: Any posterior.
        draws: Number asked for.
        sampling: How the draws belong together: antithetic draws come in pairs, simplex draws in fives.

    Returns:
        ``draws``, rounded up to a multiple of `draw_unit` and cut to the number of different draws.

    Raises:
        InputError: If ``draws`` is less than 1.
    """
    if draws < 1:
        raise InputError(f"draws must be at least 1, and it is {draws}")
    if isinstance(posterior, Scaled):
        return draw_count(posterior.posterior, draws, sampling)
    if isinstance(posterior, Mixture):
        size = len(posterior.members)
        draws = size * max(draw_count(m, -(-draws // size)) for m in posterior.members)
    if posterior.distinct is not None:
        return min(draws, posterior.distinct)
    unit = draw_unit(posterior, sampling)
    return -(-draws // unit) * unit


def tempered(posterior: Posterior, temperature: float) -> Posterior:
    """Return the posterior with its covariance multiplied by a temperature.

    Args:
        posterior: Any posterior; a mixture is tempered member by member and keeps its members' means.
        temperature: 0 leaves the means alone, below 1 is a cold posterior.

    Returns:
        A posterior of the same family.

    Raises:
        InputError: If the temperature is negative or not finite.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"the temperature must be finite and not negative, and it is {temperature}")
    return _rescaled(posterior, lambda name, p: math.sqrt(temperature), None)


def restricted(posterior: Posterior, where: int | Callable[[str], bool]) -> Posterior:
    """Return the posterior with noise in chosen parameters only; the others stay at their mean.

    Args:
        posterior: Any posterior; a mixture is restricted member by member.
        where: How many of the last layers keep their noise (parameters outside the numbered layers, such as a head,
            keep theirs too), or a predicate on parameter names.

    Returns:
        A posterior of the same family.
    """
    keep = where if callable(where) else in_last_layers(posterior.mean, where)
    return _rescaled(posterior, lambda name, p: float(keep(name)), None)


def in_last_layers(names: Iterable[str], count: int) -> Callable[[str], bool]:
    """Return whether a parameter is in one of the last numbered layers, or in none (a head).

    Args:
        names: All parameters.
        count: Number of layers.

    Returns:
        A predicate on their names.
    """
    numbers = {name: _layer(name) for name in names}
    first = max((n for n in numbers.values() if n is not None), default=-1) - count + 1

    def keep(name: str) -> bool:
        """Return whether a parameter is among them."""
        number = numbers[name]
        return number is None or number >= first

    return keep


def pruned(posterior: Posterior, fraction: float) -> Posterior:
    """Return the posterior with the parameters of lowest signal-to-noise |mean|/σ set to zero, matrix by matrix.

    The cut is made in each matrix by itself (Cong et al. 2025, arXiv 2506.14280): a cut over all of them would remove
    B alone. Parameters without noise are never removed.

    Args:
        posterior: Any posterior; a mixture is pruned member by member, a point is left as it is.
        fraction: Share of each matrix to remove, in [0, 1].

    Returns:
        A posterior of the same family; removed parameters have mean 0 and variance 0.

    Raises:
        InputError: If the fraction is outside [0, 1], or for dropout, whose signal-to-noise is the same everywhere.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"the fraction to prune must be in [0, 1], and it is {fraction}")

    def mask(name: str, p: Posterior) -> Factor:
        """Return 0 where a parameter is removed and 1 elsewhere."""
        deviation = standard_deviation(p).get(name)
        if deviation is None:
            return 1.0
        ratio = torch.where(deviation > 0, p.mean[name].abs() / deviation, math.inf).flatten()
        worst = ratio.argsort(stable=True)[: int(fraction * ratio.numel())]
        kept = torch.ones_like(ratio)
        kept[worst[ratio[worst] < math.inf]] = 0
        return kept.view_as(deviation)

    return _rescaled(posterior, mask, mask)


def standard_deviation(posterior: Posterior) -> Params:
    """Return the marginal standard deviation of each parameter that has one.

    Args:
        posterior: A point or a Gaussian.

    Returns:
        σ by name, in the shape of the parameter; empty for a point.

    Raises:
        InputError: For families without one (a mixture, dropout).
    """
    match posterior:
        case Point():
            return {}
        case DiagonalGaussian():
            return {name: v.sqrt() for name, v in posterior.variance.items()}
        case LowRankGaussian(mean=mean, scale=scale):
            return {
                name: (
                    scale * (v + (posterior.snapshots[name] - mean[name]).square().sum(0) / (posterior.rank - 1))
                ).sqrt()
                for name, v in posterior.variance.items()
            }
        case KroneckerGaussian():
            return {name: posterior.variance(name).sqrt() for name in posterior.strength}
    raise InputError(f"a {type(posterior).__name__} has no standard deviation parameter by parameter")


def _rescaled(
    posterior: Posterior,
    noise: Callable[[str, Posterior], Factor],
    signal: Callable[[str, Posterior], Factor] | None,
) -> Posterior:
    """Multiply the noise, and the mean if asked, parameter by parameter: the one operation behind the others."""
    if isinstance(posterior, Mixture):
        return replace(posterior, members=tuple(_rescaled(m, noise, signal) for m in posterior.members))
    if isinstance(posterior, Linearised | Scaled):
        return replace(posterior, posterior=_rescaled(posterior.posterior, noise, signal))  # type: ignore[arg-type]
    if isinstance(posterior, Point):
        return posterior
    if isinstance(posterior, TokenDropout):
        raise InputError("dropout token by token has no noise in the weights; use the kind 'columns'")
    mean = posterior.mean if signal is None else {n: m * signal(n, posterior) for n, m in posterior.mean.items()}
    if isinstance(posterior, ColumnDropout):
        factors = {name: noise(name, posterior) for name in posterior.strength}
        return replace(posterior, strength={n: s * float(factors[n]) for n, s in posterior.strength.items()})
    if isinstance(posterior, KroneckerGaussian):
        strength = {n: s * torch.as_tensor(noise(n, posterior)) for n, s in posterior.strength.items()}
        return replace(posterior, mean=mean, strength=strength)
    if isinstance(posterior, DiagonalGaussian | LowRankGaussian):
        factors = {name: noise(name, posterior) for name in posterior.variance}
        variance = {name: v * factors[name] ** 2 for name, v in posterior.variance.items()}
        if isinstance(posterior, DiagonalGaussian):
            return replace(posterior, mean=mean, variance=variance)
        snapshots = {n: mean[n] + (s - posterior.mean[n]) * factors[n] for n, s in posterior.snapshots.items()}
        return replace(posterior, mean=mean, variance=variance, snapshots=snapshots)
    raise InputError(f"a {type(posterior).__name__} cannot be rescaled")


def _layer(name: str) -> int | None:
    """Return the number of the layer in a parameter's name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None
