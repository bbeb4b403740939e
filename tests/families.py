"""A small posterior of each family, with parameters in two layers and a head without noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayeslora.params import Params
from bayeslora.posteriors import ColumnDropout, DiagonalGaussian, LowRankGaussian, Mixture, Point, Posterior

A0, B0, A1, HEAD = (
    "base_model.model.layers.0.q.lora_A.weight",
    "base_model.model.layers.0.q.lora_B.weight",
    "base_model.model.layers.1.q.lora_A.weight",
    "base_model.model.score.weight",
)
SHAPES = {A0: (2, 3), B0: (2, 2), A1: (2, 3), HEAD: (3,)}
SPREAD = (A0, B0, A1)  # the head has no noise


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean() -> Params:
    return {name: normal(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}


def variance() -> Params:
    return {name: 0.1 + normal(SHAPES[name], 10 + i).square() for i, name in enumerate(SPREAD)}


def snapshots(count: int = 4) -> Params:
    return {name: mean()[name] + normal((count, *SHAPES[name]), 20 + i) for i, name in enumerate(SPREAD)}


def diagonal() -> DiagonalGaussian:
    return DiagonalGaussian(mean(), variance())


def low_rank(scale: float = 0.5) -> LowRankGaussian:
    return LowRankGaussian(mean(), variance(), snapshots(), scale)


def dropout() -> ColumnDropout:
    return ColumnDropout(mean(), 0.25, {A0: 1.0, A1: 1.0})


FAMILIES: dict[str, Callable[[], Posterior]] = {
    "point": lambda: Point(mean()),
    "diagonal": diagonal,
    "low-rank": low_rank,
    "dropout": dropout,
    "mixture": lambda: Mixture((diagonal(), low_rank())),
}


def vector(params: Params) -> Tensor:
    return torch.cat([params[name].flatten() for name in SHAPES]).double()


def dense_covariance(p: LowRankGaussian) -> Tensor:
    """scale · (diag + DᵀD / (K − 1)), the head's rows zero."""
    full = p.variance | {HEAD: torch.zeros(SHAPES[HEAD])}
    raw = p.snapshots | {HEAD: p.mean[HEAD].expand(p.rank, -1)}
    deviations = torch.stack([vector({n: raw[n][k] - p.mean[n] for n in SHAPES}) for k in range(p.rank)])
    return p.scale * (vector(full).diag() + deviations.T @ deviations / (p.rank - 1))
