"""How the noise of draws is made and how draws of a stream belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayeslora.params import generator

if TYPE_CHECKING:
    pass


Sampling = Literal["independent", "antithetic", "simplex", "sobol"]
"""How the draws of a stream belong together: not at all; each odd draw mirrors the one before it at the mean; the noise
of five draws sums to zero; or they are Sobol's sequence with a random digital shift, so that each number of each
parameter fills its distribution evenly. Each draw by itself has the posterior's distribution in all four."""


_GROUP = 5
"""Draws of ``simplex`` whose noise sums to zero."""


GROUPS: Mapping[Sampling, int] = {"independent": 1, "antithetic": 2, "simplex": _GROUP, "sobol": 1}
"""How many draws of a posterior belong together so that a part of them loses what they are for."""


def noise(seed: int, index: int, name: str, like: Tensor, sampling: Sampling = "independent") -> Tensor:
    """Return standard normal numbers that belong to one parameter of one draw.

    Args:
        seed: Which stream of draws.
        index: Number of the draw.
        name: Name of the parameter.
        like: A tensor of the wanted shape.
        sampling: How the draws of a stream belong together.

    Returns:
        Float32 on the CPU.
    """
    if sampling == "sobol":
        return torch.special.ndtri(_sobol(seed, index, name, like)).float()
    if sampling == "antithetic":
        even = torch.randn(like.shape, generator=generator(seed, index - index % 2, name))
        return -even if index % 2 else even
    if sampling == "simplex":
        return _simplex(seed, index, name, like)
    return torch.randn(like.shape, generator=generator(seed, index, name))


def uniform(seed: int, index: int, name: str, like: Tensor, sampling: Sampling = "independent") -> Tensor:
    """Return numbers uniform on [0, 1) that belong to one parameter of one draw; see `noise`.

    Args:
        seed: Which stream of draws.
        index: Number of the draw.
        name: Name of the parameter.
        like: A tensor of the wanted shape.
        sampling: How the draws of a stream belong together.

    Returns:
        Float32 on the CPU.
    """
    if sampling == "sobol":
        return _sobol(seed, index, name, like).float()
    if sampling == "simplex":
        return torch.special.ndtr(_simplex(seed, index, name, like))
    if sampling == "antithetic":
        even = torch.rand(like.shape, generator=generator(seed, index - index % 2, name))
        return 1 - even if index % 2 else even
    return torch.rand(like.shape, generator=generator(seed, index, name))


def _simplex(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return standard normal numbers that sum to zero over the draws of a group; any two correlate by -1/(K-1).

    z_i = √(K/(K−1)) (ε_i − ε̄), the most negative correlation that K exchangeable normal numbers can have (antithetic
    coupling of K processes: Craiu and Meng 2005, Annals of Statistics 33). A group's average of what is linear in the
    noise is exact, as with pairs that mirror each other. Its average of what is quadratic is worth K − 1 independent
    draws; a pair's is worth one.
    """
    group, own = divmod(index, _GROUP)
    every = torch.randn((_GROUP, *like.shape), generator=generator(seed, "simplex", group, name))
    return math.sqrt(_GROUP / (_GROUP - 1)) * (every[own] - every.mean(0))


_BITS = 30
"""Binary digits of torch's Sobol numbers."""


def _sobol(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return a point of Sobol's sequence in (0, 1), its digits shifted at random; float64.

    A parameter with more numbers than the sequence has dimensions takes it several times, with other shifts.
    """
    point = sobol_digits(index, min(like.numel(), SobolEngine.MAXDIM))
    shift = torch.randint(0, 2**_BITS, (like.numel(),), generator=generator(seed, "sobol", name))
    digits = point.repeat(-(-like.numel() // len(point)))[: like.numel()] ^ shift
    return ((digits.double() + 0.5) / 2**_BITS).view(like.shape)


@lru_cache(maxsize=128)
def sobol_digits(index: int, dimensions: int) -> Tensor:
    """Return the digits of a point of Sobol's sequence as integers."""
    engine: Any = SobolEngine(dimensions)  # type: ignore[no-untyped-call]
    point: Tensor = engine.fast_forward(index).draw(1, dtype=torch.float64)[0]
    return (point * 2**_BITS).long()
