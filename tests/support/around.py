"""A posterior of each family around a tiny model's adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bayeslora.params import Params, read
from bayeslora.posteriors import (
    ColumnDropout,
    DiagonalGaussian,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Posterior,
    Scaled,
    TokenDropout,
)
from bayeslora.posteriors.transforms import restricted
from support.families import scaling


def spread(model: Any) -> tuple[Params, Params]:
    mean = read(model)
    return mean, {name: torch.full_like(value, 0.01) for name, value in mean.items()}


def diagonal(model: Any) -> DiagonalGaussian:
    return DiagonalGaussian(*spread(model))


def only_a(model: Any) -> DiagonalGaussian:
    mean, variance = spread(model)
    return DiagonalGaussian(mean, {name: v for name, v in variance.items() if "lora_A" in name})


def low_rank(model: Any) -> LowRankGaussian:
    mean, variance = spread(model)
    rng = torch.Generator().manual_seed(5)
    snapshots = {n: m + 0.1 * torch.randn(3, *m.shape, generator=rng) for n, m in mean.items()}
    return LowRankGaussian(mean, variance, snapshots)


def kronecker(model: Any) -> KroneckerGaussian:
    mean, _ = spread(model)
    matrices = {name: value for name, value in mean.items() if value.ndim == 2}
    values = [{n: torch.ones(m.shape[k] + 1) for n, m in matrices.items()} for k in (0, 1)]
    vectors = [{n: torch.eye(m.shape[k]) for n, m in matrices.items()} for k in (0, 1)]
    strength = {n: torch.ones(()) for n in matrices}
    return KroneckerGaussian(mean, values[0], vectors[0], values[1], vectors[1], strength, 50.0)


def dropout(model: Any) -> ColumnDropout:
    mean, _ = spread(model)
    return ColumnDropout(mean, 0.3, {name: 1.0 for name in mean if "lora_A" in name})


def ensemble(model: Any) -> Mixture:
    mean, _ = spread(model)
    rng = torch.Generator().manual_seed(6)
    return Mixture(tuple(
        Point({n: m + 0.1 * torch.randn(m.shape, generator=rng) for n, m in mean.items()}) for _ in range(3)
    ))  # fmt: skip


AROUND: dict[str, Callable[[Any], Posterior]] = {
    "point": lambda model: Point(read(model)),
    "diagonal": diagonal,
    "only-a": only_a,
    "low-rank": low_rank,
    "kronecker": kronecker,
    "dropout": dropout,
    "ensemble": ensemble,
    "mixture": lambda model: Mixture((diagonal(model), low_rank(model))),
    "last-layer": lambda model: restricted(diagonal(model), 1),
    "scaled": lambda model: Scaled(diagonal(model), scaling()),
    "with-token-dropout": lambda model: Mixture((diagonal(model), TokenDropout(read(model), 0.2))),
}

LINEARISED: dict[str, Callable[[Any], Posterior]] = {
    "linearised": lambda model: Linearised(kronecker(model)),
}
"""Those that have draws of logits."""
