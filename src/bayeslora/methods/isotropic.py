"""Isotropic noise around the MAP: N(θ̂, σ²I), the control for every method that learns a variance.

It has no paper. A method whose calibration it matches at the same σ owes that calibration to the size of its noise, and
not to the variance that it learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import Method, Recorder, check_num_data, origin_for
from bayeslora.params import Params, read
from bayeslora.posteriors import DiagonalGaussian


@final
@dataclass(frozen=True)
class Isotropic(Method):
    """A MAP fine-tune with the same noise on every adapter parameter.

    Attributes:
        sigma: Standard deviation σ.
    """

    name: ClassVar[str] = "isotropic"
    sigma: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: If σ is negative or not finite.
        """
        if not 0 <= self.sigma < math.inf:
            raise InputError(f"sigma must be finite and not negative, and it is {self.sigma}")

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> dict[str, Any]:
        """Return a callback that notes the run; training is plain."""
        return {"callbacks": [Recorder(self.name, check_num_data(num_data))]}

    def posterior(self, model: nn.Module) -> DiagonalGaussian:
        """Return the model's adapter as it is, with noise."""
        return self.around(read(model), model)

    def around(self, mean: Params, model: nn.Module) -> DiagonalGaussian:
        """Return the noise around an adapter that was trained by any means.

        Args:
            mean: The adapter.
            model: The model, for the origin.

        Returns:
            The posterior.
        """
        return DiagonalGaussian(
            mean, {n: torch.full_like(m, self.sigma**2) for n, m in mean.items()}, origin_for(model, self)
        )
