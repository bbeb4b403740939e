"""Prediction from a posterior of any family: by its draws, and by its mean."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora._typing import Float
from bayeslora.engine.linearised import LOGIT_DRAWS, gradient_budget, logit_draws, logit_moments
from bayeslora.engine.passes import Passes, batched
from bayeslora.engine.readouts import readout_for
from bayeslora.errors import InputError
from bayeslora.operations import draw_count
from bayeslora.origin import check_base
from bayeslora.params import Params, evaluating
from bayeslora.posteriors import Linearised, Mixture, Point, Posterior, Scaled, TokenDropout, member_seed
from bayeslora.prediction import Prediction
from bayeslora.tasks.types import Split

TOKEN_BUDGET = 2048
"""Tokens of a batch, padding included, unless the caller says otherwise."""


def predict(
    model: nn.Module,
    posterior: Posterior,
    split: Split,
    draws: int = 10,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    token_budget: int = TOKEN_BUDGET,
    stack: bool = True,
    progress: bool = False,
) -> Prediction:
    """Return the predictive distribution of every example: by S draws, and by the posterior's mean in one pass.

    Args:
        model: PEFT model with the base and the adapter configuration that the posterior was trained on. Its own adapter
            weights do not matter and are unchanged afterwards.
        posterior: What was learned.
        split: The N examples and how they are put to the model.
        draws: Number S of draws. A mixture's members get equally many, and there are never more than there are
            different draws: 1 for a point, M for an ensemble of M points. A linearised posterior has at least 256, of
            its logits.
        seed: Which stream of draws.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch, padding included, over all draws in it; a single longer example is its own
            batch.
        stack: Whether several draws may share a pass over the base, where the model allows it: the same numbers up to
            rounding.
        progress: Whether to show a bar with the time left.

    Returns:
        The prediction, with ``log_probs`` [S N C] and ``mean_log_probs`` [N C] in float32 on the CPU. For a point the
        two are the same; for a mixture the mean is its first member's.

    Raises:
        InputError: If the split is empty, or the posterior, the model and the split do not fit together.
    """
    if not len(split):
        raise InputError(f"{split.name} has no examples")
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    readout = readout_for(model, split, tokenizer)
    if _is_linearised(posterior):
        token_budget = gradient_budget(token_budget, split)
        draws = max(draws, LOGIT_DRAWS) if draws > 0 else draws
    rows, cut = readout.encode(split)
    classes = max(len(example.choices) for example in split)
    count = draw_count(posterior, draws)
    began = time.perf_counter()
    with (
        evaluating(model),
        readout.attached(model),
        tqdm(total=_passes(posterior, count) * len(rows), desc="predict", unit="row", disable=not progress) as bar,
    ):
        passes = Passes(model, readout, rows, classes, token_budget, bar.update, stack)
        log_probs, mean = _answers(passes, posterior, count, seed)
    return Prediction(
        log_probs=log_probs,
        mean_log_probs=mean,
        components=_members(posterior, count),
        truncated=cut,
        readout=readout.name,
        seconds=time.perf_counter() - began,
    )


def _answers(
    passes: Passes, posterior: Posterior, count: int, seed: int
) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"]]:
    """Return the log-probabilities of the draws, and those of the posterior's mean."""
    if _has_weights(posterior):
        return _weights(passes, posterior, count, seed)
    match posterior:
        case Mixture(members=members):
            size = min(count, len(members))
            shares = [len(range(k, count, size)) for k in range(size)]
            found = [
                _answers(passes, m, share, member_seed(seed, k))
                for k, (m, share) in enumerate(zip(members, shares, strict=False))
            ]
            return torch.stack([found[k % size][0][k // size] for k in range(count)]), found[0][1]
        case Scaled(posterior=inner):
            draws, mean = _answers(passes, inner, count, seed)
            return posterior.apply(draws, "draws"), posterior.apply(mean, "mean")
        case Linearised(posterior=inner):
            with posterior.applied(passes.model, None):
                batches = batched(passes.model, passes.readout, passes.rows, passes.token_budget)
                logits, covariances = logit_moments(passes.model, [inner], batches, len(passes.rows), passes.done)
            drawn = logit_draws(logits, covariances[0], count, seed)
            return drawn.log_softmax(-1), logits.log_softmax(-1)
    assert isinstance(posterior, TokenDropout)
    mean = passes.run(lambda _: posterior.mean, 1)[0]
    dropped = []
    for k in range(count):
        with posterior.dropping(passes.model, k, seed):
            dropped.append(passes.run(lambda _: posterior.mean, 1)[0])
    return torch.stack(dropped), mean


def _has_weights(posterior: Posterior) -> bool:
    """Say whether a posterior's predictions are those of the model with drawn weights."""
    if isinstance(posterior, Mixture):
        return all(map(_has_weights, posterior.members))
    return not isinstance(posterior, Scaled | Linearised | TokenDropout)


def _weights(
    passes: Passes, posterior: Posterior, count: int, seed: int
) -> tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"]]:
    """Return the log-probabilities under draws of weights and under the mean, which counts as one draw more."""
    first = posterior.draw(0, seed)
    extra = int(any(first[name] is not value for name, value in posterior.mean.items()))  # else the mean is draw 0

    def draw(number: int) -> Params:
        """Return the mean, then the draws."""
        return posterior.mean if number < extra else posterior.draw(number - extra, seed)

    found = passes.run(draw, count + extra)
    return found[extra:], found[0]


def _is_linearised(posterior: Posterior) -> bool:
    """Say whether a posterior, or one that it is made of, is linearised."""
    match posterior:
        case Mixture(members=members):
            return any(map(_is_linearised, members))
        case Scaled(posterior=inner):
            return _is_linearised(inner)
    return isinstance(posterior, Linearised)


def _passes(posterior: Posterior, count: int) -> int:
    """Return how often the data are passed."""
    match posterior:
        case Mixture(members=members):
            return sum(_passes(m, len(range(k, count, len(members)))) for k, m in enumerate(members[:count]))
        case Scaled():
            return _passes(posterior.posterior, count)
        case Point() | Linearised():
            return 1
    return count + 1


def _members(posterior: Posterior, count: int) -> tuple[int, ...] | None:
    """Return the mixture's member of each draw."""
    if isinstance(posterior, Scaled):
        return _members(posterior.posterior, count)
    if not isinstance(posterior, Mixture):
        return None
    return tuple(k % len(posterior.members) for k in range(count))
