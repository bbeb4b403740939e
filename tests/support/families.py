"""A small posterior of each family, with parameters in two layers and a head without noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayeslora.params import Params
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
)

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


def factor(size: int, kept: int, rest: float, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the last that of the directions left out, and eigenvectors."""
    vectors = torch.linalg.qr(normal((size, kept), seed))[0]
    return torch.cat([0.5 + normal((kept,), seed + 1).square(), torch.tensor([rest])]), vectors


def kronecker(precision: float = 0.7) -> KroneckerGaussian:
    """A matrix with both factors of low rank, one with whole ones, and a vector."""
    left = {A0: factor(2, 1, 0.3, 30), B0: factor(2, 2, 0.0, 32), HEAD: factor(3, 2, 0.2, 34)}
    right = {A0: factor(3, 1, 0.1, 36), B0: factor(2, 2, 0.0, 38), HEAD: (torch.tensor([1.0, 0.0]), torch.ones(1, 1))}
    left_values, left_vectors, right_values, right_vectors = (
        {n: side[n][k] for n in left} for side in (left, right) for k in (0, 1)
    )
    strength = {n: torch.ones(()) for n in left}
    return KroneckerGaussian(mean(), left_values, left_vectors, right_values, right_vectors, strength, precision)


def scaling(weight: float = 0.5) -> Params:
    return {f"{of}.{part}": torch.tensor([weight if part == "weight" else 0.0]) for of in ("draws", "mean")
            for part in ("weight", "bias")}  # fmt: skip


FAMILIES: dict[str, Callable[[], Posterior]] = {
    "point": lambda: Point(mean()),
    "diagonal": diagonal,
    "low-rank": low_rank,
    "dropout": dropout,
    "mixture": lambda: Mixture((diagonal(), low_rank())),
    "kronecker": kronecker,
    "linearised": lambda: Linearised(kronecker()),
    "scaled": lambda: Scaled(diagonal(), scaling()),
}


def vector(params: Params) -> Tensor:
    return torch.cat([params[name].flatten() for name in SHAPES]).double()


def dense_factor(values: Tensor, vectors: Tensor) -> Tensor:
    values, vectors = values.double(), vectors.double()
    return vectors @ values[:-1].diag() @ vectors.T + values[-1] * (torch.eye(len(vectors)) - vectors @ vectors.T)


def dense_kronecker(p: KroneckerGaussian) -> Tensor:
    """(G ⊗ X + λI)⁻¹ block by block, zero where there is no noise."""
    blocks = []
    for name in SHAPES:
        size = p.mean[name].numel()
        if name not in p.strength:
            blocks.append(torch.zeros(size, size, dtype=torch.float64))
            continue
        g = dense_factor(p.left_values[name], p.left_vectors[name])
        x = dense_factor(p.right_values[name], p.right_vectors[name])
        inverse = torch.linalg.inv(torch.kron(g, x) + p.precision * torch.eye(size))
        strength = p.strength[name].double().expand(p.mean[name].shape).flatten()
        blocks.append(strength[:, None] * inverse * strength)
    return torch.block_diag(*blocks)  # type: ignore[no-untyped-call]


def dense_covariance(p: LowRankGaussian) -> Tensor:
    """scale · (diag + DᵀD / (K − 1)), the head's rows zero."""
    full = p.variance | {HEAD: torch.zeros(SHAPES[HEAD])}
    raw = p.snapshots | {HEAD: p.mean[HEAD].expand(p.rank, -1)}
    deviations = torch.stack([vector({n: raw[n][k] - p.mean[n] for n in SHAPES}) for k in range(p.rank)])
    return p.scale * (vector(full).diag() + deviations.T @ deviations / (p.rank - 1))
