"""Which draws to take, and in what order the error is looked at."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors import Draws, Mixture, Posterior, Sampling, Scaled, has_weights
from bayeslora.posteriors.provenance import check_base
from bayeslora.posteriors.transforms import draw_count, draw_unit

_ROOM = 2**24
"""Numbers of all draws that are kept with a posterior: 64 MiB."""


def weight_draws(model: nn.Module, posterior: Posterior, draws: int | Draws) -> Draws:
    """Return a request for draws that stay the same weights in every pass, with the count that serves it.

    Raises:
        InputError: If the posterior's draws are no weights, or it belongs to another model.
    """
    draws = Draws.of(draws)
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
    return replace(draws, count=draw_count(posterior, draws.count, draws.sampling))


def rounds(posterior: Posterior, draws: Draws) -> list[range]:
    """Return the numbers of the draws between two looks at the error, half as many again each time."""
    if draws.tolerance is None:
        return [range(draws.count)]
    unit, parts, last = draw_unit(posterior, draws.sampling), list[range](), 0
    while last < draws.count:
        more = max(unit, draws.minimum if last == 0 else last // 2)
        parts.append(range(last, min(draws.count, last + -(-more // unit) * unit)))
        last = parts[-1].stop
    return parts


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
