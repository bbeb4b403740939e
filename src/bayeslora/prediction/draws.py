"""Which draws to take, and in what order the error is looked at."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from bayeslora.errors import InputError
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.provenance import check_base


def weight_draws(model: nn.Module, posterior: Posterior, draws: int | Draws) -> Draws:
    """Return a request for draws that stay the same weights in every pass, with the count that serves it."""
    draws = Draws.of(draws)
    if posterior.unscaled is not posterior:
        raise InputError(
            "a temperature was fitted to the choices of a task and says nothing about anything else; use what is "
            "scaled, posterior.posterior"
        )
    if not posterior.draws_are_weights:
        raise InputError(
            f"the draws of a {type(posterior).__name__} are not weights that stay the same from text to text; use "
            "its mean, Point(posterior.mean) or `bayeslora export --mean`, or another posterior"
        )
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    return replace(draws, count=posterior.count(draws))


def rounds(posterior: Posterior, draws: Draws) -> list[range]:
    """Return the numbers of the draws between two looks at the error, half as many again each time."""
    if draws.tolerance is None:
        return [range(draws.count)]
    unit, parts, last = posterior.unit(draws.sampling), list[range](), 0
    while last < draws.count:
        more = max(unit, draws.minimum if last == 0 else last // 2)
        parts.append(range(last, min(draws.count, last + -(-more // unit) * unit)))
        last = parts[-1].stop
    return parts
