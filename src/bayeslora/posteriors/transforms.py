"""What can be done to a posterior of any family: temper it, prune it, keep its noise to chosen layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.answer_noise import AnswerNoise
from bayeslora.posteriors.base import Factor, Posterior, Rescaling
from bayeslora.posteriors.point import Point
from bayeslora.posteriors.sampling import Draws
from bayeslora.posteriors.wrappers import Scaled


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
    return _rescaled(posterior, lambda name, p: math.sqrt(temperature))


def requested(posterior: Posterior, draws: int | Draws, *, scaled: bool = True) -> tuple[Posterior, Draws]:
    """Return what a request for draws asks, and of what: 0 draws ask for one of a point at the mean.

    Args:
        posterior: Any posterior.
        draws: Number of draws, or `Draws`.
        scaled: Whether the point has the scaling that the posterior has for its mean, which is one of a task's choices
            and says nothing about other texts.

    Returns:
        The posterior, or the point; and the draws of it.
    """
    draws = Draws.of(draws)
    if draws.count:
        return posterior, draws
    point = Point(posterior.mean, posterior.origin)
    return posterior.without_noise(point) if scaled else point, replace(draws, count=1)


def restricted(
    posterior: Posterior,
    where: int | Callable[[str], bool] | None = None,
    *,
    tokens: Literal["all", "answer"] = "all",
) -> Posterior:
    """Return the posterior with noise in chosen parameters or on the answer's tokens only; the rest is at the mean.

    Args:
        posterior: Any posterior; a mixture is restricted member by member.
        where: How many of the last layers keep their noise (parameters outside the numbered layers, such as a head,
            keep theirs too), or a predicate on parameter names; None for all.
        tokens: ``answer`` keeps the noise to the answer's tokens and the last of the prompt, which predicts the first
            of them: see `bayeslora.posteriors.AnswerNoise`. The draws of a mixture then all start from the prompt under
            its first member's mean.

    Returns:
        A posterior of the same family, or an `AnswerNoise`, in which a scaling stays outermost.

    Raises:
        InputError: If ``tokens`` is neither, or draws are no weights.
    """
    if tokens not in ("all", "answer"):
        raise InputError(f"noise is on the tokens 'all' or 'answer', and tokens is {tokens!r}")
    if where is not None:
        keep = where if callable(where) else in_last_layers(posterior.mean, where)
        posterior = _rescaled(posterior, lambda name, p: float(keep(name)))
    return _on_answers(posterior) if tokens == "answer" else posterior


def _on_answers(posterior: Posterior) -> Posterior:
    """Return the posterior with noise on the answer's tokens only."""
    if posterior.before_answer is not None:
        return posterior
    if isinstance(posterior, Scaled):
        return replace(posterior, posterior=_on_answers(posterior.posterior))
    return AnswerNoise(posterior, posterior.origin)


def in_last_layers(names: Iterable[str], count: int) -> Callable[[str], bool]:
    """Return whether a parameter is in one of the last numbered layers, or in none (a head)."""
    layers = {name: int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))}
    first = max(layers.values(), default=-1) - count + 1
    return lambda name: layers.get(name, first) >= first


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

    all_deviations: dict[int, Params | None] = {}

    def kept_part(name: str, p: Posterior) -> Factor:
        """Return 0 where a parameter is removed and 1 elsewhere."""
        if id(p) not in all_deviations:  # once for a member, not once for each of its parameters
            all_deviations[id(p)] = p.standard_deviation()
        deviations = all_deviations[id(p)]
        if deviations is None:
            raise InputError(f"a {type(p).__name__} has no standard deviation parameter by parameter")
        if name not in deviations:
            return 1.0
        deviation = deviations[name]
        ratio = torch.where(deviation > 0, p.mean[name].abs() / deviation, math.inf).flatten()
        worst = ratio.argsort(stable=True)[: int(fraction * ratio.numel())]
        mask = torch.ones_like(ratio)
        mask[worst[ratio[worst] < math.inf]] = 0
        return mask.view_as(deviation)

    return _rescaled(posterior, kept_part, kept_part)


def _rescaled(posterior: Posterior, noise: Rescaling, signal: Rescaling | None = None) -> Posterior:
    """Return the posterior rescaled, or refuse one without noise in its weights."""
    changed = posterior.rescaled(noise, signal)
    if changed is None:
        raise InputError("dropout token by token has no noise in the weights; use the kind 'columns'")
    return changed
