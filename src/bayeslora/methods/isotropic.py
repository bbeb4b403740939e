"""Isotropic noise around a trained adapter: N(θ̂, σ²I), the control for every method that learns a variance.

It has no paper. A method whose calibration it matches at the same σ owes that calibration to the size of its noise, and
not to the variance that it learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import LATER, PostHoc, TrainedAdapter, check_ranges
from bayeslora.methods.divergence import DIVERGENCE, ScaleByDivergence, check_scale
from bayeslora.posteriors import DiagonalGaussian
from bayeslora.tasks.types import Task, labelled

SIGMAS = tuple(0.001 * 2 ** (k / 2) for k in range(17))
"""Standard deviations that ``sigma="validation"`` tries: .001 to .256, each √2 of the one before."""
_FIRST = 0.02
"""The σ at which the search by divergence begins."""


@final
@dataclass(frozen=True)
class Isotropic(PostHoc[DiagonalGaussian]):
    """The same noise on every adapter parameter.

    Attributes:
        sigma: Standard deviation σ, or ``validation`` for the one of `SIGMAS` whose draws have the lowest negative
            log-likelihood on the validation rows.
        draws: Draws by which a σ is judged.
        scale: ``divergence`` for the σ with a mean divergence of the draws from the adapter (`ScaleByDivergence`),
            whatever ``sigma`` is; None for ``sigma``.
        divergence: That divergence κ, nats a row.
    """

    name: ClassVar[str] = "isotropic"
    sigma: float | Literal["validation"] = 0.02
    draws: int = 10
    scale: Literal["divergence"] | None = field(default=None, metadata=LATER)
    divergence: float = field(default=DIVERGENCE, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if isinstance(self.sigma, str) and self.sigma != "validation":
            raise InputError(f"sigma must be a number or 'validation', and it is {self.sigma!r}")
        check_ranges(self, not_negative=() if isinstance(self.sigma, str) else ("sigma",), at_least={"draws": 1})
        check_scale(self.scale, self.divergence, "isotropic noise")

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse a task without rows to choose σ on; see `PostHoc.check`."""
        if self.scale:
            self._search.check(model, task)
        elif self.sigma == "validation":
            labelled(task.validation, "isotropic noise is chosen on validation rows")

    @property
    def _search(self) -> ScaleByDivergence:
        """The search by divergence, with as many draws."""
        return ScaleByDivergence(self.divergence, draws=self.draws)

    def _fit(self, adapter: TrainedAdapter) -> DiagonalGaussian:
        """Return the noise around the adapter."""
        if self.scale:
            return self._search.scaled(adapter, _noisy(adapter, _FIRST))
        if not isinstance(self.sigma, str):
            return _noisy(adapter, self.sigma)
        rows = labelled(adapter.task.validation, "isotropic noise is chosen on validation rows")
        by_score = {}
        for sigma in SIGMAS:
            posterior = _noisy(adapter, sigma)
            score = adapter.nll(posterior, rows, self.draws)
            by_score[score, sigma] = posterior
            if score > 2 * min(by_score)[0] + 1:  # far beyond the best: larger noise only loses more
                break
        return by_score[min(by_score)]


def _noisy(adapter: TrainedAdapter, sigma: float) -> DiagonalGaussian:
    """Return the adapter with the variance σ² of every parameter."""
    mean = adapter.start.mean
    return DiagonalGaussian(mean, {name: torch.full_like(m, sigma**2) for name, m in mean.items()}, adapter.origin)
