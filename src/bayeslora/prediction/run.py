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
    Draws,
    Linearised,
    Mixture,
    Point,
    Posterior,
    Scaled,
    TokenDropout,
    has_weights,
    member_seed,
)
from bayeslora.posteriors.provenance import check_base, check_scores
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.transforms import draw_count
from bayeslora.prediction.draws import kept_draw, members_of, rounds
from bayeslora.prediction.linearised import LOGIT_DRAWS, gradient_budget, logit_draws, logit_moments
from bayeslora.prediction.memory import default_token_budget
from bayeslora.prediction.options import PassOptions
from bayeslora.prediction.passes import Passes, batched
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Split


@former_keywords("draws", Draws, seed="seed", sampling="sampling", tolerance="tolerance", fewest_draws="minimum")
@former_keywords(
    "options", PassOptions, stack="stack", share_prefix="share_prefix", compile="compile", progress="progress"
)
def predict(
    model: nn.Module,
    posterior: Posterior,
    split: Split,
    draws: int | Draws = 10,
    *,
    mean: bool = True,
    tokenizer: Any = None,
    token_budget: int | None = None,
    options: PassOptions = PassOptions(),
) -> Prediction:
    """Return the predictive distribution of every example: by S draws, and by the posterior's mean in one pass.

    Args:
        model: PEFT model with the base and the adapter configuration that the posterior was trained on. Its own adapter
            weights do not matter and are unchanged afterwards.
        posterior: What was learned.
        split: The N examples and how they are put to the model.
        draws: Number S of draws, or `Draws` with their seed, sampling and tolerance. A linearised posterior has at
            least 256, of its logits. A tolerance does not apply to posteriors whose draws are no weights.
        mean: Whether to pass the data under the mean too.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch, padding included, over all draws in it; a single longer example is its own
            batch. None: 2048 on a CPU, and what its free memory allows on a GPU.
        options: How the passes are run, and whether a bar is shown; the numbers are the same up to rounding.

    Returns:
        The prediction, with ``log_probs`` [S N C] and ``mean_log_probs`` [N C] in float32 on the CPU. For a point the
        two are the same; for a mixture the mean is its first member's.

    Raises:
        InputError: If the split is empty, a number makes no sense, or the posterior, the model and the split do not fit
            together.
    """
    draws = Draws.of(draws)
    if not len(split):
        raise InputError(f"{split.name} has no examples")
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    readout = readout_for(model, split, tokenizer)
    if readout.name == "likelihood":
        check_scores(posterior.origin, split.normalisation, split.name)
    if _is_linearised(posterior):
        token_budget = gradient_budget(model, token_budget, split)
        draws = replace(draws, count=max(draws.count, LOGIT_DRAWS))
    rows, cut = readout.encode(split)
    classes = max(len(example.choices) for example in split)
    draws = replace(draws, count=draw_count(posterior, draws.count, draws.sampling))
    began = time.perf_counter()
    most = _passes(posterior, draws.count, mean) * len(rows)
    with (
        evaluating(model),
        readout.attached(model),
        tqdm(
            total=most,
            desc="predict",
            unit="row",
            disable=not options.progress,
        ) as bar,
    ):
        budget = token_budget or default_token_budget(model)
        passes = Passes(model, readout, rows, classes, budget, bar.update, options)
        log_probs, at_mean = _answers(passes, posterior, draws, mean)
    components = members_of(posterior, len(log_probs))
    error = torch.zeros(len(split))
    if posterior.distinct is None or len(log_probs) < posterior.distinct:
        error = monte_carlo_error(log_probs, components, paired=draws.paired)
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
    passes: Passes, posterior: Posterior, draws: Draws, with_mean: bool
) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"] | None]:
    """Return the log-probabilities of the draws, and those of the posterior's mean."""
    match posterior:
        case Scaled(posterior=inner) if not has_weights(inner):
            drawn, mean = _answers(passes, inner, draws, with_mean)
            return posterior.apply(drawn, "draws"), None if mean is None else posterior.apply(mean, "mean")
        case Mixture(members=members) if not has_weights(posterior):
            size = min(draws.count, len(members))
            shares = [len(range(k, draws.count, size)) for k in range(size)]
            found = [
                _answers(
                    passes, m, replace(draws, count=share, seed=member_seed(draws.seed, k), tolerance=None), with_mean
                )
                for k, (m, share) in enumerate(zip(members, shares, strict=False))
            ]
            return torch.stack([found[k % size][0][k // size] for k in range(draws.count)]), found[0][1]
        case Linearised(posterior=inner):
            with posterior.applied(passes.model, None):
                batches = batched(passes.model, passes.readout, passes.rows, passes.token_budget)
                logits, covariances = logit_moments(passes.model, [inner], batches, len(passes.rows), passes.done)
            drawn = logit_draws(logits, covariances[0], draws.count, draws.seed)
            return drawn.log_softmax(-1), logits.log_softmax(-1)
        case TokenDropout():
            at_mean = passes.run(lambda _: posterior.mean, 1)[0] if with_mean else None
            dropped = []
            for k in range(draws.count):
                with posterior.dropping(passes.model, k, draws.seed):
                    dropped.append(passes.run(lambda _: posterior.mean, 1)[0])
            return torch.stack(dropped), at_mean
    return _weights(passes, posterior, draws, with_mean)


def _weights(
    passes: Passes, posterior: Posterior, draws: Draws, with_mean: bool
) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"] | None]:
    """Return the log-probabilities under draws of weights and under the mean, which counts as one draw more."""
    apart = posterior.distinct is None  # else the mean is draw 0: a point's, or that of points' first member
    components = members_of(posterior, draws.count)
    alive = torch.arange(len(passes.rows))
    at_mean: Tensor | None = None
    found = torch.full((draws.count, len(passes.rows), passes.classes), -math.inf)
    for numbers in rounds(posterior, draws):
        extra = int(with_mean and apart and numbers.start == 0)

        def draw(number: int, start: int = numbers.start - extra) -> Params:
            """Return the mean where it is asked for, then the draws of this round."""
            if start + number < 0:
                return posterior.mean
            return kept_draw(posterior, start + number, draws.seed, draws.sampling)

        log_p = passes.run(draw, extra + len(numbers), alive.tolist())
        if numbers.start == 0 and with_mean:
            at_mean = _scaled(posterior, log_p[0], "mean")
        found[numbers.start : numbers.stop, alive] = _scaled(posterior, log_p[extra:], "draws")
        if draws.tolerance is None or numbers.stop == draws.count:
            break
        own = None if components is None else components[: numbers.stop]
        error = monte_carlo_error(found[: numbers.stop, alive], own, paired=draws.paired)
        alive = alive[error > draws.tolerance]
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


def _passes(posterior: Posterior, draws: int, mean: bool) -> int:
    """Return how often the data are passed, at most."""
    match posterior:
        case Mixture(members=members) if not has_weights(posterior):
            shares = [len(range(k, draws, len(members))) for k in range(min(draws, len(members)))]
            return sum(_passes(m, n, mean) for m, n in zip(members, shares, strict=False))
        case Scaled():
            return _passes(posterior.posterior, draws, mean)
        case Point() | Linearised():
            return 1
    return draws + mean
