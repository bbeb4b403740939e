"""Prediction from a posterior of any family: by its draws, and by its mean."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import monte_carlo_error
from bayeslora.params import Params, evaluating
from bayeslora.posteriors import (
    Linearised,
    Mixture,
    Point,
    Posterior,
    Sampling,
    Scaled,
    TokenDropout,
    has_weights,
    member_seed,
)
from bayeslora.posteriors.provenance import check_base, check_scores
from bayeslora.prediction.draws import Draws, kept_draw, members_of
from bayeslora.prediction.linearised import LOGIT_DRAWS, gradient_budget, logit_draws, logit_moments
from bayeslora.prediction.memory import default_token_budget
from bayeslora.prediction.passes import Passes, batched
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Split


def predict(
    model: nn.Module,
    posterior: Posterior,
    split: Split,
    draws: int = 10,
    *,
    seed: int = 0,
    sampling: Sampling = "independent",
    tolerance: float | None = None,
    fewest_draws: int = 4,
    mean: bool = True,
    tokenizer: Any = None,
    token_budget: int | None = None,
    stack: bool = True,
    share_prefix: bool = True,
    compile: bool = False,
    progress: bool = False,
) -> Prediction:
    """Return the predictive distribution of every example: by S draws, and by the posterior's mean in one pass.

    Args:
        model: PEFT model with the base and the adapter configuration that the posterior was trained on. Its own adapter
            weights do not matter and are unchanged afterwards.
        posterior: What was learned.
        split: The N examples and how they are put to the model.
        draws: Number S of draws, rounded up: a mixture's members get equally many, antithetic draws come in pairs and
            simplex draws in fives. There are never more than there are different draws: 1 for a point, M for an
            ensemble of M points. A linearised posterior has at least 256, of its logits.
        seed: Which stream of draws.
        sampling: How the draws belong together; ``simplex`` gets most from few of them.
        tolerance: An example takes no more draws once the standard error of its probabilities is at most this; None for
            ``draws`` draws of each. It does not apply to posteriors whose draws are no weights.
        fewest_draws: Draws of each example before the first look at the error.
        mean: Whether to pass the data under the mean too.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch, padding included, over all draws in it; a single longer example is its own
            batch. None: 2048 on a CPU, and what its free memory allows on a GPU.
        stack: Whether several draws may share a pass over the base, where the model allows it: the same numbers up to
            rounding.
        share_prefix: Whether a beginning that all prompts have in common may be run once for each draw, where the model
            allows it: the same numbers up to rounding.
        compile: Whether to compile the model's layers with `torch.compile`: the same numbers up to rounding, sooner
            where there are many rows, for compiling takes about a minute. It does not apply to linearised posteriors.
        progress: Whether to show a bar with the time left.

    Returns:
        The prediction, with ``log_probs`` [S N C] and ``mean_log_probs`` [N C] in float32 on the CPU. For a point the
        two are the same; for a mixture the mean is its first member's.

    Raises:
        InputError: If the split is empty, a number makes no sense, or the posterior, the model and the split do not fit
            together.
    """
    if not len(split):
        raise InputError(f"{split.name} has no examples")
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    readout = readout_for(model, split, tokenizer)
    if readout.name == "likelihood":
        check_scores(posterior.origin, split.normalisation, split.name)
    if _is_linearised(posterior):
        token_budget = gradient_budget(model, token_budget, split)
        draws = max(draws, LOGIT_DRAWS) if draws > 0 else draws
    rows, cut = readout.encode(split)
    classes = max(len(example.choices) for example in split)
    how = Draws.of(posterior, draws, seed, sampling, tolerance, fewest_draws, mean)
    began = time.perf_counter()
    with (
        evaluating(model),
        readout.attached(model),
        tqdm(total=_passes(posterior, how) * len(rows), desc="predict", unit="row", disable=not progress) as bar,
    ):
        passes = Passes(
            model,
            readout,
            rows,
            classes,
            token_budget or default_token_budget(model),
            bar.update,
            stack,
            share_prefix,
            compile,
        )
        log_probs, at_mean = _answers(passes, posterior, how)
    components = members_of(posterior, len(log_probs))
    error = torch.zeros(len(split))
    if posterior.distinct is None or len(log_probs) < posterior.distinct:
        error = monte_carlo_error(log_probs, components, paired=how.paired)
    return Prediction(
        log_probs=log_probs,
        mean_log_probs=at_mean,
        components=components,
        truncated=cut,
        readout=readout.name,
        seconds=time.perf_counter() - began,
        monte_carlo_error=error,
    )


def _answers(
    passes: Passes, posterior: Posterior, how: Draws
) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"] | None]:
    """Return the log-probabilities of the draws, and those of the posterior's mean."""
    match posterior:
        case Scaled(posterior=inner) if not has_weights(inner):
            draws, mean = _answers(passes, inner, how)
            return posterior.apply(draws, "draws"), None if mean is None else posterior.apply(mean, "mean")
        case Mixture(members=members) if not has_weights(posterior):
            size = min(how.count, len(members))
            shares = [len(range(k, how.count, size)) for k in range(size)]
            found = [
                _answers(passes, m, replace(how, count=share, seed=member_seed(how.seed, k), tolerance=None))
                for k, (m, share) in enumerate(zip(members, shares, strict=False))
            ]
            return torch.stack([found[k % size][0][k // size] for k in range(how.count)]), found[0][1]
        case Linearised(posterior=inner):
            with posterior.applied(passes.model, None):
                batches = batched(passes.model, passes.readout, passes.rows, passes.token_budget)
                logits, covariances = logit_moments(passes.model, [inner], batches, len(passes.rows), passes.done)
            drawn = logit_draws(logits, covariances[0], how.count, how.seed)
            return drawn.log_softmax(-1), logits.log_softmax(-1)
        case TokenDropout():
            at_mean = passes.run(lambda _: posterior.mean, 1)[0] if how.mean else None
            dropped = []
            for k in range(how.count):
                with posterior.dropping(passes.model, k, how.seed):
                    dropped.append(passes.run(lambda _: posterior.mean, 1)[0])
            return torch.stack(dropped), at_mean
    return _weights(passes, posterior, how)


def _weights(
    passes: Passes, posterior: Posterior, how: Draws
) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"] | None]:
    """Return the log-probabilities under draws of weights and under the mean, which counts as one draw more."""
    apart = posterior.distinct is None  # else the mean is draw 0: a point's, or that of points' first member
    components = members_of(posterior, how.count)
    alive = torch.arange(len(passes.rows))
    at_mean: Tensor | None = None
    found = torch.full((how.count, len(passes.rows), passes.classes), -math.inf)
    for numbers in how.rounds():
        extra = int(how.mean and apart and numbers.start == 0)

        def draw(number: int, start: int = numbers.start - extra) -> Params:
            """Return the mean where it is asked for, then the draws of this round."""
            return (
                posterior.mean if start + number < 0 else kept_draw(posterior, start + number, how.seed, how.sampling)
            )

        log_p = passes.run(draw, extra + len(numbers), alive.tolist())
        if numbers.start == 0 and how.mean:
            at_mean = _scaled(posterior, log_p[0], "mean")
        found[numbers.start : numbers.stop, alive] = _scaled(posterior, log_p[extra:], "draws")
        if how.tolerance is None or numbers.stop == how.count:
            break
        own = None if components is None else components[: numbers.stop]
        error = monte_carlo_error(found[: numbers.stop, alive], own, paired=how.paired)
        alive = alive[error > how.tolerance]
        if not len(alive):
            break
    return found[: numbers.stop], at_mean


def _scaled(posterior: Posterior, log_p: Tensor, of: str) -> Tensor:
    """Return log-probabilities with the scalings that are wrapped around a posterior, the innermost first."""
    if not isinstance(posterior, Scaled):
        return log_p
    return posterior.apply(_scaled(posterior.posterior, log_p, of), of)


def _is_linearised(posterior: Posterior) -> bool:
    """Say whether a posterior, or one that it is made of, is linearised."""
    match posterior:
        case Mixture(members=members):
            return any(map(_is_linearised, members))
        case Scaled(posterior=inner):
            return _is_linearised(inner)
    return isinstance(posterior, Linearised)


def _passes(posterior: Posterior, how: Draws) -> int:
    """Return how often the data are passed, at most."""
    match posterior:
        case Mixture(members=members) if not has_weights(posterior):
            shares = [len(range(k, how.count, len(members))) for k in range(min(how.count, len(members)))]
            return sum(_passes(m, replace(how, count=n)) for m, n in zip(members, shares, strict=False))
        case Scaled():
            return _passes(posterior.posterior, how)
        case Point() | Linearised():
            return 1
    return how.count + how.mean
