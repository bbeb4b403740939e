"""Posteriors made of posteriors: mixtures, and those whose predictions are not those of their draws as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.base import Posterior
from bayeslora.posteriors.dropout import TokenDropout
from bayeslora.posteriors.gaussian import DiagonalGaussian
from bayeslora.posteriors.kronecker import KroneckerGaussian
from bayeslora.posteriors.mixture import Mixture
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Sampling


@final
@dataclass(frozen=True)
class Linearised(Posterior):
    """A Gaussian whose predictions come from the model linearised in its parameters at the mean.

    The choices' logits are then normal in closed form, f ~ N(f(mean), J Σ Jᵀ), with J the Jacobian of the logits
    (Immer et al. 2021, arXiv 2008.08703; Yang et al. 2024, arXiv 2308.13111, equation 12). Draws are of the logits;
    `draw` still gives draws of the weights, for those who need adapters.

    Attributes:
        posterior: The Gaussian over the weights.
    """

    posterior: DiagonalGaussian | KroneckerGaussian
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Refuse other families."""
        if not isinstance(self.posterior, DiagonalGaussian | KroneckerGaussian):
            raise InputError(
                f"a {type(self.posterior).__name__} cannot be linearised; give a DiagonalGaussian or KroneckerGaussian"
            )

    @property
    def mean(self) -> Params:
        """The Gaussian's mean."""
        return self.posterior.mean

    @property
    def distinct(self) -> None:
        """No limit."""
        return None

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return a draw of the weights."""
        return self.posterior.draw(index, seed, sampling)


@final
@dataclass(frozen=True)
class Scaled(Posterior):
    """A posterior whose log-probabilities are scaled and normalised again: temperature and vector scaling.

    log p'_c ∝ weight_c · log p_c + bias_c for the draws, and the same with numbers of its own for the mean's weights
    (Guo et al. 2017, arXiv 1706.04599, §4.2). A single weight 1/T is temperature scaling.

    Attributes:
        posterior: The posterior as it was.
        scaling: ``draws.weight``, ``draws.bias``, ``mean.weight`` and ``mean.bias``, each [C], or [1] for all choices.
    """

    posterior: Posterior
    scaling: Params
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.scaling.keys() != {f"{of}.{part}" for of in ("draws", "mean") for part in ("weight", "bias")}:
            raise InputError("a scaled posterior needs weight and bias for the draws and for the mean")
        for name, value in self.scaling.items():
            if not bool(torch.isfinite(value).all()) or (name.endswith("weight") and bool((value <= 0).any())):
                raise InputError(f"the scaling's {name} must be finite{', and positive' * name.endswith('weight')}")

    @property
    def mean(self) -> Params:
        """The mean of the posterior as it was; an adapter cannot carry the scaling."""
        return self.posterior.mean

    @property
    def distinct(self) -> int | None:
        """As of the posterior as it was."""
        return self.posterior.distinct

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return a draw of the posterior as it was."""
        return self.posterior.draw(index, seed, sampling)

    def apply(self, log_probs: Float[Tensor, "*S N C"], of: str) -> Float[Tensor, "*S N C"]:
        """Return scaled log-probabilities.

        Args:
            log_probs: Log-probabilities; -inf for choices that an example does not have.
            of: ``draws`` or ``mean``.

        Returns:
            The same shape, normalised.

        Raises:
            InputError: If the scaling is for another number of choices.
        """
        return scale(log_probs, self.scaling[f"{of}.weight"], self.scaling[f"{of}.bias"])


def scale(
    log_probs: Float[Tensor, "*S N C"], weight: Float[Tensor, " W"], bias: Float[Tensor, " W"]
) -> Float[Tensor, "*S N C"]:
    """Return log-probabilities scaled and normalised again; see `Scaled`.

    Args:
        log_probs: Log-probabilities; -inf for choices that an example does not have.
        weight: One weight per choice, or one for all.
        bias: One bias per choice, or one for all.

    Returns:
        The same shape.

    Raises:
        InputError: If there are weights for another number of choices.
    """
    if weight.numel() not in (1, log_probs.shape[-1]):
        raise InputError(f"the scaling is for {weight.numel()} classes, and these rows have {log_probs.shape[-1]}")
    absent = log_probs == -math.inf
    moved = log_probs.masked_fill(absent, 0.0) * weight + bias
    return (
        moved.masked_fill(absent, -math.inf).log_softmax(-1).masked_fill(absent, -math.inf)
    )  # also without any choice


def has_weights(posterior: Posterior) -> bool:
    """Say whether a posterior's predictions are those of the model with drawn weights, scaled or not.

    Args:
        posterior: The posterior.

    Returns:
        False for what is linearised or drops tokens, and for mixtures of such, or of scaled members.
    """
    if isinstance(posterior, Mixture):
        return all(has_weights(member) and not isinstance(member, Scaled) for member in posterior.members)
    if isinstance(posterior, Scaled):
        return has_weights(posterior.posterior)
    return not isinstance(posterior, Linearised | TokenDropout)
