"""How likely prompts are to the tuned model and to its base: what tuning has seen, before any answer.

The likelihood ratio of a text under a tuned model and its base tells foreign texts (Zhang et al. 2025, arXiv
2404.08679, S_q for a question). Ours averages the tuned model over the draws, log p̄(x) = log (1/S) Σ_s p_s(x), and is a
mean over the tokens: prompts differ in length, and a sum would tell long ones from short ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.params import Params, evaluating
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.transforms import requested
from bayeslora.prediction.base import asking_base, base_beside, check_base_answers
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.memory import default_token_budget, draws_for
from bayeslora.prediction.passes import Passes, PassOptions, weight_draws
from bayeslora.prediction.progress import shown
from bayeslora.prediction.readings import SCORES
from bayeslora.prediction.readouts import Readout
from bayeslora.prediction.run import fitting_readout
from bayeslora.prediction.sharding import Answers, over_processes
from bayeslora.tasks.types import Split


def prompt_likelihood_ratio(
    model: nn.Module,
    posterior: Posterior,
    split: Split,
    draws: int | Draws = 10,
    *,
    tokenizer: Tokenizer | None = None,
    token_budget: int | None = None,
    options: PassOptions = PassOptions(),
) -> Float[Tensor, " N"]:
    """Return (log p̄(prompt) − log p_base(prompt)) / T of every prompt of T tokens after its first, in nats a token.

    Low is foreign: tuning has made such a prompt less likely, beside others. A prompt is what `predict` puts to the
    model before the answer, with template and solved examples; its first token is given.

    Args:
        model: As in `predict`; a causal language model.
        posterior: What was learned; a scaling that was fitted to answers is left out. Noise that is on the answer's
            tokens only leaves prompts at the mean.
        split: The N examples; labels and choices do not matter, unless the prompt lists them.
        draws: Number S of draws, or `Draws` without a tolerance; 0 for the mean.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: As in `predict`.
        options: As in `predict`.

    Returns:
        Float32 on the CPU.

    Raises:
        InputError: If the model has a classification head, the base cannot be asked, the posterior's draws are no
            weights, or a prompt has a single token; and as `predict` does.
    """
    posterior, draws = requested(posterior.unscaled, draws, scaled=False)
    readout = fitting_readout(model, posterior, split, tokenizer, base=False)
    if readout.name == "head":
        raise InputError(
            "a model with a classification head does not say how likely a prompt is; use a causal language model with "
            "the readout 'letters' or 'likelihood'"
        )
    check_base_answers(model)
    if posterior.before_answer is not None:
        posterior, draws = requested(posterior, 0, scaled=False)
    draws, posterior = weight_draws(model, posterior, draws), draws_for(model, posterior)
    rows = _texts(readout, split)
    budget = token_budget or default_token_budget(model)

    def answers(numbers: Sequence[int]) -> Answers:
        """Return the log-likelihoods of some of the prompts."""
        total = len(numbers) * (draws.count + 1)
        with evaluating(model), readout.attached(model), shown("prompts", total, options.progress) as done:
            passes = Passes(model, readout, rows, 1, budget, done, options, SCORES)
            return _log_likelihoods(passes, posterior, draws, numbers)

    tuned, _, base = over_processes(answers, [readout.length(row) for row in rows])
    assert base is not None
    log_p = tuned.double().logsumexp(0) - math.log(len(tuned))
    tokens = torch.tensor([len(row.answers[0]) for row in rows])
    return ((log_p - base.double())[:, 0] / tokens).float()


def _texts(readout: Readout, split: Split) -> list[Encoded]:
    """Return each prompt as what follows its first token."""
    prompts = [row.prompt for row in readout.encode(split)[0]]
    if single := [i for i, prompt in enumerate(prompts) if len(prompt) < 2]:
        raise InputError(
            f"row {single[0]} of {split.name} has a prompt of one token, which is given; use longer prompts"
        )
    # with a factor, if only 1, the normaliser over the vocabulary is always counted
    return [Encoded(prompt[:1], (prompt[1:],), -1, (1.0,)) for prompt in prompts]


def _log_likelihoods(passes: Passes, posterior: Posterior, draws: Draws, numbers: Sequence[int]) -> Answers:
    """Return the log-likelihoods [S n 1] of some of the prompts under the draws, and those under the base."""
    first = base_beside(passes.model, posterior, draws)

    def draw(number: int) -> Params:
        """Return the base where it goes along, then the draws."""
        return first[number] if number < len(first) else posterior.cached_draw(number - len(first), draws)

    found = passes.run(draw, len(first) + draws.count, numbers)
    if first:
        return found[1:], None, found[0]
    with asking_base(passes.model, posterior.mean) as params:
        return found, None, passes.run(lambda _: params, 1, numbers)[0]
