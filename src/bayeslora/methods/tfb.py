"""TFB, training-free Bayesianisation: the largest noise that an adapter bears (Shi et al. 2024, arXiv 2412.05723).

B = U diag(d) Vᵀ, B' = U diag(d), A' = VᵀA, so that B'A' = BA; A' ~ N(VᵀA, Ω²) with Ω_ij = σ/d_i. The update BA then has
the covariance σ² I ⊗ UUᵀ: isotropic noise in the column space of B. σ is the largest for which the loss on anchor rows
stays within a relative tolerance of the adapter's own.

What the paper leaves open: the loss is the negative log-likelihood of the draws' average probabilities, all σ are
judged by the same draws, and "within ε" means at most (1 + ε) times the loss without noise. Where d_i is zero to
rounding, no noise on A can reach BA, and that row has none.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import PostHoc, beginning
from bayeslora.methods.guards import plain_layers
from bayeslora.methods.search import draws_nll
from bayeslora.params import Params
from bayeslora.posteriors import DiagonalGaussian, Point, Posterior
from bayeslora.tasks.types import Split, Task, labelled

logger = logging.getLogger(__name__)
_LARGEST = 1e6
"""Noise at which the search gives up: the adapter does not matter to the loss."""


@final
@dataclass(frozen=True)
class Tfb(PostHoc):
    """The largest isotropic noise on BA that the loss bears.

    Attributes:
        tolerance: Relative rise of the anchors' loss that is borne; .003 in the paper.
        anchors: Which rows the loss is taken on: ``train`` or ``validation``.
        most_anchors: Most rows of them.
        draws: Draws by which a σ is judged.
        steps: Halvings of the bracket around σ, on a logarithmic scale from a factor of 2.
        sigma: σ itself, without a search.
    """

    name: ClassVar[str] = "tfb"
    tolerance: float = 0.003
    anchors: Literal["train", "validation"] = "train"
    most_anchors: int = 500
    draws: int = 10
    steps: int = 5
    sigma: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: If a setting is out of range.
        """
        if self.anchors not in ("train", "validation"):
            raise InputError(f"TFB's anchors are 'train' or 'validation' rows, and not {self.anchors!r}")
        for key, least in (("most_anchors", 1), ("draws", 1), ("steps", 0)):
            if getattr(self, key) < least:
                raise InputError(f"{key} must be at least {least}, and it is {getattr(self, key)}")
        for key in ("tolerance", "sigma"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"TFB's {key} must be finite and positive, and it is {value}")

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse other adapters than plain LoRA, and a task without anchors; see `PostHoc.check`."""
        plain_layers(model, "TFB")
        if self.sigma is None:
            self._anchors(task)

    def _anchors(self, task: Task) -> Split:
        """Return the rows that the loss is taken on, at most ``most_anchors``."""
        split = task.train if self.anchors == "train" else task.validation
        rows = labelled(split, f"TFB searches its noise on {self.anchors} rows")
        kept = rows.examples[: self.most_anchors]
        return Split(f"{rows.name}[:{len(kept)}]", kept, rows.format, rows.classes)

    def fit(
        self,
        model: nn.Module,
        task: Task,
        *,
        start: Posterior | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        token_budget: int | None = None,
    ) -> DiagonalGaussian:
        """Return the noisy adapter; see `PostHoc.fit`.

        Raises:
            InputError: If an adapted layer is not plain LoRA, B is zero, or the loss does not depend on the noise.
        """
        self.check(model, task)
        adapter, origin = beginning(model, self, task, start)
        mean, unit = reparametrised(adapter)
        if self.sigma is not None:
            return _noisy(mean, unit, self.sigma, origin)
        rows = self._anchors(task)
        options: dict[str, Any] = {"tokenizer": tokenizer, "seed": seed, "budget": token_budget}
        bound = (1 + self.tolerance) * draws_nll(model, Point(mean, origin), rows, 1, **options)

        def within(sigma: float) -> bool:
            """Return whether the loss stays within the tolerance."""
            return draws_nll(model, _noisy(mean, unit, sigma, origin), rows, self.draws, **options) <= bound

        sigma = largest(within, self.steps)
        logger.info("TFB: sigma %.4g with %d anchors, loss at most %.4g.", sigma, len(rows), bound)
        return _noisy(mean, unit, sigma, origin)


def largest(within: Any, steps: int, first: float = 0.01) -> float:
    """Return the largest σ that serves, from a first guess by doubling or halving and then bisection of its logarithm.

    Args:
        within: Whether a σ serves; taken to be true below some σ and false above.
        steps: Bisections.
        first: First guess.

    Returns:
        A σ that serves, at most a factor of 2^(1/2^steps) below one that does not.

    Raises:
        InputError: If every σ serves, or none.
    """
    low = high = first
    if within(first):
        while within(high := 2 * low):
            low = high
            if low > _LARGEST:
                raise InputError("TFB found no noise that the anchors' loss notices; the adapter does not matter to it")
    else:
        while not within(low := high / 2):
            high = low
            if high < 1 / _LARGEST:
                raise InputError("TFB found no noise that the anchors' loss bears; raise the tolerance or the anchors")
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def reparametrised(params: Params) -> tuple[Params, Params]:
    """Return the adapter with B = U diag(d), and the standard deviations 1/d_i of A for σ = 1.

    Args:
        params: The adapter.

    Returns:
        The same adapter in other parameters, and Ω/σ for each A.

    Raises:
        InputError: If every B is zero.
    """
    mean, unit = dict(params), {}
    for name in params:
        if not name.endswith("lora_A.weight"):
            continue
        of_b = name.replace("lora_A.weight", "lora_B.weight")
        a, b = params[name].double(), params[of_b].double()
        u, d, vt = torch.linalg.svd(b, full_matrices=True)
        kept = len(d)
        mean[name] = (vt @ a).float()
        mean[of_b] = torch.cat([u[:, :kept] * d, b.new_zeros(len(b), b.shape[1] - kept)], 1).float()
        deviation = b.new_zeros(b.shape[1])
        there = d > d.max() * max(b.shape) * torch.finfo(torch.float32).eps
        deviation[:kept][there] = 1 / d[there]
        unit[name] = deviation[:, None].expand(a.shape).float().contiguous()
    if not any(bool(v.any()) for v in unit.values()):
        raise InputError("every B of the adapter is zero, so that it is not trained; TFB needs a trained adapter")
    return mean, unit


def _noisy(mean: Params, unit: Params, sigma: float, origin: Any) -> DiagonalGaussian:
    """Return the posterior with a σ."""
    return DiagonalGaussian(mean, {name: (sigma * v).square() for name, v in unit.items()}, origin)
