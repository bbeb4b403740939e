"""Rewards under draws: the answers of a model with a scalar head, and what its draws disagree about.

A reward model that was trained on preferences says σ(r_c − r_r) for "the first text is preferred to the second", so its
rewards have no zero: two draws that agree on every preference may differ by a constant. Compare texts draw by draw
(`preference_probability`), or give each draw the zero of the same reference texts first (`penalised_rewards`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.params import evaluating, require_lora
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.transforms import requested
from bayeslora.prediction.encoding import Encoded, tokenizer_of
from bayeslora.prediction.memory import default_token_budget, draws_for
from bayeslora.prediction.passes import Passes, PassOptions, weight_draws
from bayeslora.prediction.progress import shown
from bayeslora.prediction.readings import REWARDS
from bayeslora.prediction.readouts import Readout, head_readout

Text = str | Sequence[dict[str, str]]
"""A text, or the messages of a chat, which go through the tokenizer's chat template."""


@former_keywords(seed="draws.seed", sampling="draws.sampling", stack="options.stack")
def predict_rewards(
    model: nn.Module,
    posterior: Posterior,
    texts: Sequence[Text],
    draws: int | Draws = 10,
    *,
    tokenizer: Tokenizer | None = None,
    token_budget: int | None = None,
    options: PassOptions = PassOptions(),
) -> Float[Tensor, "S N"]:
    """Return the reward of every text under every draw.

    ``mean(0)`` is the reward and ``std(0)`` its uncertainty. A text is encoded as TRL's RewardTrainer encodes it, with
    the end-of-text token after it.

    Args:
        model: PEFT model with a scalar head (``num_labels=1``); it is unchanged afterwards.
        posterior: What was learned.
        texts: The N texts, each a prompt with its answer, or messages with ``role`` and ``content``.
        draws: Number S of draws, or `Draws`; 0 for the mean, as the one draw. Draw k of a seed is the same weights in
            every call.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch, padding included, over all draws in it; None for what fits.
        options: How the passes are run, and whether a bar is shown; the numbers are the same up to rounding. Texts have
            no prefix that is shared.

    Returns:
        Float32 on the CPU.

    Raises:
        InputError: If the model has no scalar head, the posterior's draws are no weights, or a text is too long.
    """
    posterior, draws = requested(posterior, draws, scaled=False)
    if not len(texts):
        raise InputError("there are no texts to reward; give at least one")
    peft = require_lora(model)
    base = peft.get_base_model()
    if "ForSequenceClassification" not in type(base).__name__ or base.config.num_labels != 1:
        raise InputError(
            f"rewards need a model with one output, and this {type(base).__name__} is another; load it with "
            "AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)"
        )
    readout = head_readout(base, tokenizer if tokenizer is not None else tokenizer_of(peft), "scalar")
    draws, posterior = weight_draws(model, posterior, draws), draws_for(model, posterior)
    rows = _encoded(texts, readout)
    budget = token_budget or default_token_budget(model)
    total = len(rows) * draws.count
    with (
        evaluating(model),
        shown("rewards", total, options.progress) as done,
    ):
        passes = Passes(model, readout, rows, 1, budget, done, options, REWARDS, posterior.before_answer)
        return passes.run(lambda k: posterior.cached_draw(k, draws), draws.count)[..., 0]


def preference_probability(chosen: Float[Tensor, "S N"], rejected: Float[Tensor, "S N"]) -> Float[Tensor, " N"]:
    """Return the probability that one text is preferred to another, σ(r_c − r_r) averaged over the draws.

    Args:
        chosen: Rewards of the first texts.
        rejected: Rewards of the second texts under the same draws, in the same order.

    Returns:
        Probabilities.

    Raises:
        InputError: If the two have different shapes.
    """
    if chosen.shape != rejected.shape or chosen.ndim != 2:
        raise InputError(
            f"rewards to compare must be [draws, texts] both, and they are {list(chosen.shape)} and "
            f"{list(rejected.shape)}; take equally many draws and texts"
        )
    return torch.sigmoid(chosen - rejected).mean(0)


def penalised_rewards(
    rewards: Float[Tensor, "S N"], weight: float = 1.0, reference: Float[Tensor, "S M"] | None = None
) -> Float[Tensor, " N"]:
    """Return the mean over the draws less λ standard deviations, which does not trust what the draws disagree about.

    Args:
        rewards: Rewards of N texts under S draws.
        weight: λ; 0 is the mean.
        reference: Rewards of M other texts under the same draws, whose mean is each draw's zero; None takes the rewards
            as they are, with a disagreement about the zero counted as uncertainty.

    Returns:
        Penalised rewards. A single draw has no deviation.

    Raises:
        InputError: If λ is negative, or the reference has other draws.
    """
    if not weight >= 0:
        raise InputError(f"the weight of the penalty must not be negative, and it is {weight}")
    if reference is not None:
        if reference.ndim != 2 or len(reference) != len(rewards) or not reference.numel():
            raise InputError(
                f"the reference must be [draws, texts] with {len(rewards)} draws, and it is {list(reference.shape)}; "
                "take it under the same draws"
            )
        rewards = rewards - reference.mean(1, keepdim=True)
    return rewards.mean(0) - weight * rewards.std(0, correction=min(1, len(rewards) - 1))


def _encoded(texts: Sequence[Text], readout: Readout) -> list[Encoded]:
    """Return the texts as token ids."""
    tokenizer, rows = readout.tokenizer, []
    end = tokenizer.eos_token or ""
    for row, text in enumerate(texts):
        if isinstance(text, str):
            ids = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        elif tokenizer.chat_template is None:
            raise InputError(f"text {row} is a chat, and the tokenizer has no chat template; give texts instead")
        else:
            ids = tokenizer.apply_chat_template(list(text), tokenize=True, return_dict=True)["input_ids"]
        if not ids:
            raise InputError(f"text {row} has no token; leave it out")
        if readout.limit is not None and len(ids) > readout.limit:
            raise InputError(f"text {row} has {len(ids)} tokens, and the model reads at most {readout.limit}; cut it")
        rows.append(Encoded(tuple(ids), (), -1))
    return rows
