"""Prediction from a posterior of any family: by its draws, by its mean, and by the base without the adapter.

`predict` has one parameter more than the eight that are enough elsewhere: ``mean`` and ``base`` say which answers are
wanted beside the draws', while `Draws` says which weights are drawn, and nothing in `PassOptions` changes a result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import monte_carlo_error
from bayeslora.params import Params, evaluating, is_spread
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.engine import LogProbs, Take
from bayeslora.posteriors.linearised import Linearisable
from bayeslora.posteriors.provenance import check_base, check_scores
from bayeslora.posteriors.sampling import former_keywords
from bayeslora.posteriors.transforms import requested
from bayeslora.prediction.base import asking_base, base_beside, check_base_answers
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.jacobians import linear_sites
from bayeslora.prediction.linearised import gradient_batches, gradient_budget, logit_moments
from bayeslora.prediction.memory import default_token_budget, draws_for
from bayeslora.prediction.passes import Passes, PassOptions
from bayeslora.prediction.progress import shown
from bayeslora.prediction.readouts import Readout, readout_for
from bayeslora.prediction.sharding import Answers, over_processes
from bayeslora.tasks.types import Split


@former_keywords(
    seed="draws.seed",
    sampling="draws.sampling",
    tolerance="draws.tolerance",
    fewest_draws="draws.minimum",
    stack="options.stack",
    share_prefix="options.share_prefix",
    compile="options.compile",
    progress="options.progress",
)
def predict(
    model: nn.Module,
    posterior: Posterior,
    split: Split,
    draws: int | Draws = 10,
    *,
    mean: bool = True,
    base: bool = False,
    tokenizer: Tokenizer | None = None,
    token_budget: int | None = None,
    options: PassOptions = PassOptions(),
) -> Prediction:
    """Return the predictive distribution of every example: by S draws, and by the posterior's mean in one pass.

    Args:
        model: PEFT model with the base and the adapter configuration that the posterior was trained on. Its own adapter
            weights do not matter and are unchanged afterwards.
        posterior: What was learned.
        split: The N examples and how they are put to the model.
        draws: Number S of draws, or `Draws` with their seed, sampling and tolerance; 0 for the mean alone, as the one
            draw. A linearised posterior has at least 256, of its logits. A tolerance does not apply to posteriors whose
            draws are no weights.
        mean: Whether to pass the data under the mean too.
        base: Whether to pass the data under the untuned base too, through the same readout. It goes along with the
            draws as one more of them, or in a pass of its own where they are no weights or share their first layers.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        token_budget: Most tokens of a batch, padding included, over all draws in it; a single longer example is its own
            batch. None: 2048 on a CPU, and what its free memory allows on a GPU.
        options: How the passes are run, and whether a bar is shown; the numbers are the same up to rounding.

    Returns:
        The prediction, with ``log_probs`` [S N C], ``mean_log_probs`` [N C] and, if asked, ``base_log_probs`` [N C] in
        float32 on the CPU. For a point the first two are the same; for a mixture the mean is its first member's. In
        several processes see `bayeslora.sharded`.

    Raises:
        InputError: If the split is empty, a number makes no sense, or the posterior, the model and the split do not fit
            together; or the base is asked for and has no answer, for its head was trained or its weights changed.
    """
    posterior, draws = requested(posterior, draws)
    readout = fitting_readout(model, posterior, split, tokenizer, base)
    rows, cut = readout.encode(split)
    draws = replace(draws, count=posterior.count(replace(draws, count=max(draws.count, posterior.minimum_draws))))
    began = time.perf_counter()
    classes = max(len(example.choices) for example in split)

    def answers(numbers: Sequence[int]) -> Answers:
        """Return the answers to some of the rows."""
        total = len(numbers) * (posterior.passes(draws, mean=mean) + base)
        with evaluating(model), readout.attached(model), shown("predict", total, options.progress) as done:
            passes = Passes(model, readout, rows, classes, token_budget or default_token_budget(model), done, options)
            engine = _Engine(passes, numbers, mean, token_budget, base)
            log_probs, at_mean = posterior.answers(engine, draws)
            return log_probs, at_mean, engine.base_answers(posterior) if base else None

    log_probs, at_mean, at_base = over_processes(answers, [readout.length(row) for row in rows])
    components = posterior.components(len(log_probs))
    error = _error(posterior, log_probs, components, draws)
    seconds = time.perf_counter() - began
    return Prediction(log_probs, at_mean, components, cut, readout.name, seconds, error, at_base)


def fitting_readout(
    model: nn.Module, posterior: Posterior, split: Split, tokenizer: Tokenizer | None, base: bool
) -> Readout:
    """Return the split's readout once posterior, model and split are known to fit together."""
    if not len(split):
        raise InputError(f"{split.name} has no examples")
    if is_spread(model):
        raise InputError(
            "the model's weights are spread over processes (FSDP), and prediction needs them whole in each; load the "
            "model anew, and predict by the posterior"
        )
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    readout = readout_for(model, split, tokenizer)
    if readout.name == "likelihood":
        check_scores(posterior.origin, split.normalisation, split.name)
    if base:
        check_base_answers(model)
    return readout


def _error(
    posterior: Posterior, log_probs: Float[Tensor, "S N C"], components: tuple[int, ...] | None, draws: Draws
) -> Float[Tensor, " N"]:
    """Return the Monte Carlo error of each example; 0 where every draw that there is has been taken."""
    if posterior.distinct is not None and len(log_probs) >= posterior.distinct:
        return torch.zeros(log_probs.shape[1])
    return monte_carlo_error(log_probs, components, paired=draws.sampling == "antithetic")


@final
@dataclass(frozen=True)
class _Engine:
    """What a posterior asks for its answers: see `bayeslora.posteriors.engine.Engine`."""

    passes: Passes
    numbers: Sequence[int]  # of the examples that are asked for, in their order
    mean: bool
    token_budget: int | None
    base: bool = False
    at_base: list[Tensor] = field(default_factory=list)  # the base's answers, once they have come along with draws

    @property
    def model(self) -> nn.Module:
        """The model that answers."""
        return self.passes.model

    @property
    def contents(self) -> list[object]:
        """What tells an example from others, wherever it stands among them."""
        return [row.content for row in self._rows]

    @property
    def _rows(self) -> list[Encoded]:
        """The examples."""
        return [self.passes.rows[i] for i in self.numbers]

    def once(self, params: Params) -> Float[Tensor, "N C"]:
        """Return the log-probabilities under some weights; all examples pass, for noise may depend on the batch."""
        return self.passes.run(lambda _: params, 1)[0, list(self.numbers)]

    @property
    def classes(self) -> int:
        """The number of choices of the example that has most."""
        return self.passes.classes

    def moments(self, posterior: Linearisable, take: Take) -> None:
        """Give mean and covariance of the logits of the model linearised at the mean, batch by batch."""
        passes, model = self.passes, self.passes.model
        with posterior.applied(model, None):
            sites = linear_sites(model, posterior.noisy.__contains__)
            budget = gradient_budget(model, sites, self.token_budget, passes.classes)
            batches = gradient_batches(model, passes.readout, self._rows, budget, passes.classes)
            logit_moments(model, [posterior], batches, budget, take, done=passes.done)

    def weights(self, posterior: Posterior, draws: Draws) -> LogProbs:
        """Return the log-probabilities under drawn weights and under the mean, which counts as one draw more."""
        mean_passes = posterior.passes(draws, mean=self.mean) - draws.count  # 0 where the mean is draw 0, else 1
        posterior = draws_for(self.model, posterior)
        passes = replace(self.passes, before=posterior.before_answer)
        base = base_beside(self.model, posterior, draws) if self.base and not self.at_base else []
        first = [*base, *[posterior.mean] * mean_passes]
        components = posterior.components(draws.count)
        alive, examples = torch.arange(len(self.numbers)), torch.tensor(self.numbers)
        at_mean: Tensor | None = None
        log_probs = torch.full((draws.count, len(alive), self.passes.classes), -math.inf)
        for numbers in rounds(posterior, draws):
            extra = len(first) if numbers.start == 0 else 0

            def draw(number: int, start: int = numbers.start - extra) -> Params:
                """Return the base and the mean where they are asked for, then the draws of this round."""
                return first[number] if start + number < 0 else posterior.cached_draw(start + number, draws)

            log_p = passes.run(draw, extra + len(numbers), examples[alive].tolist())
            if numbers.start == 0:
                self.at_base.extend(log_p[: len(base)])
                at_mean = posterior.scaled(log_p[len(base)], "mean") if self.mean else None
            log_probs[numbers.start : numbers.stop, alive] = posterior.scaled(log_p[extra:], "draws")
            if draws.tolerance is None or numbers.stop == draws.count:
                break
            members = None if components is None else components[: numbers.stop]
            error = _error(posterior, log_probs[: numbers.stop, alive], members, draws)
            alive = alive[error > draws.tolerance]
            if not len(alive):
                break
        return log_probs[: numbers.stop], at_mean

    def base_answers(self, posterior: Posterior) -> Float[Tensor, "N C"]:
        """Return the base's answers, in a pass of its own unless they have come along with the draws."""
        if not self.at_base:
            with asking_base(self.model, posterior.mean) as params:
                self.at_base.extend(self.passes.run(lambda _: params, 1, self.numbers))
        return self.at_base[0]


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
