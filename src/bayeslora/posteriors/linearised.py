"""A Gaussian whose predictions come from the model linearised at its mean, and what a Gaussian needs for that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import generator
from bayeslora.posteriors.base import Posterior, Rescaling
from bayeslora.posteriors.engine import Engine, LogProbs
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Draws
from bayeslora.posteriors.wrappers import Derived

LOGIT_DRAWS = 256
"""Least draws of a linearised posterior's logits: they cost next to nothing, and a few would decide by their noise."""


class Linearisable(Posterior, ABC):
    """A Gaussian that gives J Σ Jᵀ parameter by parameter, for the Jacobian J of the logits."""

    @property
    @abstractmethod
    def noisy(self) -> Collection[str]:
        """The parameters that have noise."""

    def projection(self, name: str) -> Hashable:
        """Return what `projected` depends on: posteriors that have it in common share what it returns."""
        return name

    def projected(self, name: str, jacobian: Float[Tensor, "C N O I"]) -> Tensor:
        """Return what is left of J Σ Jᵀ to weight for one parameter: the Jacobian as it is, or less."""
        return jacobian

    @abstractmethod
    def covariance(self, name: str, projected: Tensor) -> Float[Tensor, "N C C"]:
        """Return J Σ Jᵀ of one parameter for each example."""

    def covariances(self, name: str, projected: Tensor, group: Sequence[Linearisable]) -> Float[Tensor, "K N C C"]:
        """Return J Σ Jᵀ of one parameter under posteriors of this one's projection, of which it is one."""
        return torch.stack([posterior.covariance(name, projected) for posterior in group])

    @abstractmethod
    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> Linearisable:
        """Return the Gaussian with its noise, and its mean if asked, multiplied parameter by parameter."""


@final
@dataclass(frozen=True)
class Linearised(Derived):
    """A Gaussian whose predictions come from the model linearised in its parameters at the mean.

    The choices' logits are then normal in closed form, f ~ N(f(mean), J Σ Jᵀ), with J the Jacobian of the logits
    (Immer et al. 2021, arXiv 2008.08703; Yang et al. 2024, arXiv 2308.13111, equation 12). Draws are of the logits;
    `draw` still gives draws of the weights, for those who need adapters.

    Attributes:
        posterior: The Gaussian over the weights.
    """

    description: ClassVar[str] = "a Gaussian over the adapter, for the model linearised at its mean"
    draws_are_weights = False
    minimum_draws = LOGIT_DRAWS
    noise_in_logits = True

    posterior: Linearisable
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Refuse other families."""
        if not isinstance(self.posterior, Linearisable):
            raise InputError(
                f"a {type(self.posterior).__name__} cannot be linearised; give a DiagonalGaussian or KroneckerGaussian"
            )

    def passes(self, draws: Draws, *, mean: bool) -> int:
        """One, which gives the Jacobian too."""
        return 1

    def answers(self, engine: Engine, draws: Draws) -> LogProbs:
        """Return draws of the normal logits, and their mean, as log-probabilities."""
        size = len(engine.contents), engine.classes
        log_probs, at_mean = torch.full((draws.count, *size), -torch.inf), torch.full(size, -torch.inf)

        def take(rows: Sequence[int], logits: Tensor, covariances: Tensor) -> None:
            """Draw the logits of some examples."""
            contents, classes = [engine.contents[row] for row in rows], logits.shape[1]
            found = logit_draws(logits, covariances[0], contents, draws.count, draws.seed)
            log_probs[:, rows, :classes] = found.log_softmax(-1)
            at_mean[rows, :classes] = logits.log_softmax(-1)

        engine.moments(self.posterior, take)
        return log_probs, at_mean


def logit_draws(
    logits: Float[Tensor, "N C"],
    covariances: Float[Tensor, "N C C"],
    contents: Sequence[object],
    draws: int,
    seed: int,
) -> Float[Tensor, "S N C"]:
    """Return draws of normal logits; draw k of an example depends on seed, k and the example's content only.

    Means are minus infinity for choices that an example does not have.
    """
    values, vectors = torch.linalg.eigh(covariances.double())
    # the symmetric root, for it alone does not turn with the rounding of the covariance
    root = vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT
    noise = root.new_zeros(len(logits), draws, logits.shape[1])
    for row, content in enumerate(contents):
        choices = int(torch.isfinite(logits[row]).sum())
        size = -(-draws * choices // 16) * 16  # torch draws blocks of 16, and more of them leave the first as they are
        numbers = torch.randn(size, generator=generator(seed, "logits", content))[: draws * choices]
        noise[row, :, :choices] = numbers.view(draws, choices)
    return logits + torch.einsum("ncd,nsd->snc", root, noise).float()
