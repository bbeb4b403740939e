"""Which draws to take, and in what order the error is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final, get_args

from torch import nn

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors import Mixture, Posterior, Sampling, Scaled, has_weights
from bayeslora.posteriors.provenance import check_base
from bayeslora.posteriors.transforms import draw_count, draw_unit

_ROOM = 2**24
"""Numbers of all draws that are kept with a posterior: 64 MiB."""


@final
@dataclass(frozen=True)
class Draws:
    """Which draws to take.

    Attributes:
        count: Largest number S.
        seed: Which stream.
        sampling: How they belong together.
        tolerance: Standard error at which an example takes no more; None for S draws of each.
        fewest: Draws before the first look at the error.
        mean: Whether the mean is asked for too.
        unit: Number of draws that cannot be parted: one of each member, or an antithetic pair or simplex five of each.
    """

    count: int
    seed: int
    sampling: Sampling
    tolerance: float | None
    fewest: int
    mean: bool
    unit: int = 1

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        draws: int,
        seed: int,
        sampling: Sampling,
        tolerance: float | None,
        fewest: int,
        mean: bool,
    ) -> Draws:
        """Return what serves a request for draws from a posterior.

        Args:
            posterior: The posterior.
            draws: Number asked for.
            seed: Which stream.
            sampling: How they belong together.
            tolerance: Standard error at which an example takes no more; None for all of them.
            fewest: Draws before the first look at the error.
            mean: Whether the mean is asked for too.

        Returns:
            The draws to take.

        Raises:
            InputError: If a number makes no sense.
        """
        if sampling not in get_args(Sampling):
            raise InputError(f"sampling must be one of {', '.join(get_args(Sampling))}, and it is {sampling!r}")
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise InputError(f"tolerance must be finite and positive, and it is {tolerance}")
        if fewest < 2:
            raise InputError(f"fewest_draws must be at least 2, for one draw has no error, and it is {fewest}")
        count, unit = draw_count(posterior, draws, sampling), draw_unit(posterior, sampling)
        return cls(count, seed, sampling, tolerance, fewest, mean, unit)

    @classmethod
    def of_weights(
        cls, model: nn.Module, posterior: Posterior, draws: int, seed: int, sampling: Sampling = "independent"
    ) -> Draws:
        """Return what serves a request for draws that stay the same weights in every pass.

        Args:
            model: PEFT model that is to have the draws.
            posterior: The posterior.
            draws: Number asked for.
            seed: Which stream.
            sampling: How they belong together.

        Returns:
            The draws to take.

        Raises:
            InputError: If the posterior's draws are no weights, it belongs to another model, or a number makes no
                sense.
        """
        if isinstance(posterior, Scaled):
            raise InputError(
                "a temperature was fitted to the choices of a task and says nothing about anything else; use what is "
                "scaled, posterior.posterior"
            )
        if not has_weights(posterior):
            raise InputError(
                f"the draws of a {type(posterior).__name__} are not weights that stay the same from text to text; use "
                "its mean, Point(posterior.mean) or `bayeslora export --mean`, or another posterior"
            )
        if posterior.origin is not None:
            check_base(posterior.origin, model)
        return cls.of(posterior, draws, seed, sampling, None, 2, False)

    @property
    def paired(self) -> bool:
        """Whether draws come in antithetic pairs."""
        return self.sampling == "antithetic"

    def rounds(self) -> list[range]:
        """Return the numbers of the draws between two looks at the error, half as many again each time."""
        if self.tolerance is None:
            return [range(self.count)]
        found, last = [], 0
        while last < self.count:
            more = max(self.unit, self.fewest if last == 0 else last // 2)
            found.append(range(last, min(self.count, last + -(-more // self.unit) * self.unit)))
            last = found[-1].stop
        return found


def members_of(posterior: Posterior, count: int) -> tuple[int, ...] | None:
    """Return the mixture's member of each draw.

    Args:
        posterior: The posterior.
        count: Number of draws.

    Returns:
        One number for each draw; None for no mixture.
    """
    if isinstance(posterior, Scaled):
        return members_of(posterior.posterior, count)
    if not isinstance(posterior, Mixture):
        return None
    return tuple(k % len(posterior.members) for k in range(count))


def kept_draw(posterior: Posterior, index: int, seed: int, sampling: Sampling) -> Params:
    """Return a draw, and keep it with the posterior for the next prediction while there is room.

    Args:
        posterior: The posterior.
        index: Number of the draw.
        seed: Which stream.
        sampling: How the draws belong together.

    Returns:
        The same values as ``posterior.draw``; not to be changed.
    """
    key = (index, seed, sampling)
    if key not in posterior.kept:
        drawn = posterior.draw(*key)
        size = sum(value.numel() for value in drawn.values())
        if (len(posterior.kept) + 1) * size > _ROOM:
            return drawn
        posterior.kept[key] = drawn
    return posterior.kept[key]
