"""Dropout as a posterior: masks on the columns of A, which are weights, or on the input of A token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn, final

import torch
from torch import Tensor, nn

from bayeslora.errors import InputError
from bayeslora.params import Params, device_of, generator, require_lora
from bayeslora.posteriors.base import Posterior, Rescaling
from bayeslora.posteriors.engine import Engine, LogProbs
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Draws, Sampling


@final
@dataclass(frozen=True)
class ColumnDropout(Posterior):
    """Dropout as a draw of weights: columns of A are dropped, one mask for all tokens and examples of a draw.

    A' = A ⊙ (1 + strength · (z/(1−p) − 1)) with one z ~ Bernoulli(1−p) per input feature. It is what LoRA's dropout
    does to one token (Gal and Ghahramani 2016), made coherent, so that a draw is an adapter that can be exported.

    Attributes:
        mean: The trained parameters.
        rate: Probability p that a column is dropped.
        strength: Factor on the noise of each A by name; 1 is dropout.
    """

    description: ClassVar[str] = "adapters of which columns are dropped at random"

    mean: Params
    rate: float
    strength: Mapping[str, float]
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check the rate, and that the strengths are of matrices."""
        _check_rate(self.rate)
        for name, strength in self.strength.items():
            if name not in self.mean or self.mean[name].ndim < 2 or not math.isfinite(strength):
                raise InputError(f"the strength of {name!r} must be a finite number, and its mean a matrix")

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return the parameters with the columns of one mask dropped."""
        draw = dict(self.mean)
        like = {name: self.mean[name][0] for name in self.strength}
        for name, uniform in self.noise.uniform(like, index, seed, sampling):
            keep = (uniform >= self.rate).float()
            draw[name] = self.mean[name] * (1 + self.strength[name] * (keep / (1 - self.rate) - 1))
        return draw

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> ColumnDropout:
        """Return the dropout with its strength multiplied matrix by matrix."""
        return replace(self, strength={n: s * float(noise(n, self)) for n, s in self.strength.items()})


@final
@dataclass(frozen=True)
class TokenDropout(Posterior):
    """Dropout as it is in training: every token has its own mask on the input of each A (Gal and Ghahramani 2016).

    It is no distribution over weights: there is no adapter that gives one draw's answers, and two batches of other
    sizes see other masks. `predict` makes the same masks for the same seed, data and token budget.

    Attributes:
        mean: The trained parameters.
        rate: Probability p that a feature of a token is dropped.
    """

    description: ClassVar[str] = "adapters of which inputs are dropped at random"
    draws_are_weights = False

    mean: Params
    rate: float
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check the rate."""
        _check_rate(self.rate)

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> NoReturn:
        """Refuse: a draw is no adapter.

        Raises:
            InputError: Always.
        """
        raise InputError(
            "dropout token by token has no draws of weights to apply or export; use the kind 'columns', whose draws "
            "are adapters"
        )

    def passes(self, draws: Draws, *, mean: bool) -> int:
        """One for each draw, and one for the mean."""
        return draws.count + int(mean)

    def answers(self, engine: Engine, draws: Draws) -> LogProbs:
        """Return the answers of a pass with dropout for each draw, and of one without."""
        at_mean = engine.once(self.mean) if engine.mean else None
        log_probs = []
        for k in range(draws.count):
            with self.dropping(engine.model, k, draws.seed):
                log_probs.append(engine.once(self.mean))
        return torch.stack(log_probs), at_mean

    @contextmanager
    def dropping(self, model: nn.Module, index: int, seed: int = 0) -> Iterator[None]:
        """Drop features of each token, by the masks of one draw, for the length of a ``with`` block."""
        peft = require_lora(model)
        device = device_of(peft)
        rng = torch.Generator(device).manual_seed(generator(seed, index, "tokens").initial_seed())

        def drop(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """Drop features of the input of a layer."""
            x = args[0]
            mask = torch.rand(x.shape, generator=rng, device=x.device) >= self.rate
            return (x * mask / (1 - self.rate), *args[1:])

        handles = [
            module.register_forward_pre_hook(drop)
            for name, module in peft.named_modules()
            if name.endswith(f"lora_A.{peft.active_adapter}")
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_rate(rate: float) -> None:
    """Refuse a rate with which nothing or everything would be dropped."""
    if not 0 < rate < 1:
        raise InputError(
            f"a dropout posterior needs a rate in (0, 1), and it is {rate}; train with "
            "LoraConfig(lora_dropout=0.1) or pass a rate"
        )
