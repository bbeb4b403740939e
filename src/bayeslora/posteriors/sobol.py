"""Points of Sobol's sequence as numbers of one parameter: its digits shifted at random, in an order of its own."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bayeslora._typing import Float, Int
from bayeslora.params import seed_of

DIGITS = 30
"""Binary digits of torch's Sobol numbers, and of the index of a point."""


def sobol_point(seed: int, index: int, name: str, shift: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return a point of Sobol's sequence in (0, 1), its digits shifted; float64.

    Every parameter has the sequence in an order of its own, for the same dimension in the same order would correlate
    two parameters. One with more numbers than the sequence has dimensions takes it several times.
    """
    size, most = shift.numel(), SobolEngine.MAXDIM
    keys = [(seed, "sobol", name, *([part] if part else [])) for part in range(0, max(size, 1), most)]
    points = [sobol_digits(_shuffled(index, *key), min(size, most), shift.device) for key in keys]
    return ((torch.cat(points).narrow(0, 0, size) ^ shift).double() + 0.5) / 2**DIGITS


def _shuffled(index: int, *key: object) -> int:
    """Return another index, one to one, so that blocks of 2^m indices stay blocks (Burley 2020, JCGT 9(4), §3)."""
    # a random flip of each binary digit, which depends on the digits above it: Owen's scrambling, of the index
    below = range(index.bit_length() - 1)
    return seed_of(*key) % 2**DIGITS ^ index ^ sum(seed_of(*key, b, index >> b + 1) % 2 << b for b in below)


def sobol_digits(index: int, dimensions: int, device: torch.device) -> Int[Tensor, " n"]:
    """Return the digits of a point of Sobol's sequence as integers: its direction numbers at the Gray code's ones."""
    directions, gray = _directions(dimensions, device), index ^ index >> 1
    point = torch.zeros(dimensions, dtype=torch.int64, device=device)
    for bit in range(gray.bit_length()):
        if gray >> bit & 1:
            point ^= directions.select(0, bit)
    return point


@lru_cache(maxsize=8)
def _directions(dimensions: int, device: torch.device) -> Int[Tensor, "bits n"]:
    """Return the sequence's direction numbers as integers."""
    engine = SobolEngine(dimensions)  # type: ignore[no-untyped-call]
    return engine.sobolstate.T.contiguous().to(device)
