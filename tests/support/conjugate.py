"""Linear regressions with LoRA layers whose exact posterior has the form of a family, and simulation-based calibration.

A parameter comes from the prior, data from the parameter, the exact posterior is put in the family's form, and draws
come from the family's own code. The rank of the parameter among the draws, by any function of both, is then uniform
(Cook, Gelman and Rubin 2006; Talts et al. 2018, arXiv 1804.06788). The likelihood is among the functions, for it also
sees a posterior that forgets the data (Modrák et al. 2023, arXiv 2211.02383).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bayeslora.posteriors import (
    ColumnDropout,
    DiagonalGaussian,
    Draws,
    KroneckerGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Posterior,
)
from bayeslora.posteriors.transforms import tempered

A, B, B2 = "layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight", "layers.1.q.lora_B.weight"
SCALING = 2.0
"""LoRA's alpha / r."""
OUT, RANK, IN = 3, 2, 5


@dataclass(frozen=True)
class Problem:
    """A parameter [P] from the prior, the exact posterior of data from it, and what ranks are of, ([S P]) → [S Q]."""

    truth: Tensor
    posterior: Posterior
    names: tuple[str, ...]
    centre: Tensor
    likelihood: Callable[[Tensor], Tensor]
    draw: Callable[[int, int], Tensor] | None = None  # [L P] of a count and a seed; None: the posterior's, one by one

    def draws(self, count: int, seed: int) -> Tensor:
        if self.draw is not None:
            return self.draw(count, seed)
        found = [self.posterior.draw(k, seed) for k in range(count)]
        return torch.stack([torch.cat([draw[n].flatten() for n in self.names]) for draw in found]).double()


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def gaussian_likelihood(design: Tensor, y: Tensor, precision: Tensor) -> Callable[[Tensor], Tensor]:
    """log p(y | θ) but for a constant, of θ [S P], for y ~ N(design θ, precision⁻¹)."""

    def log_likelihood(theta: Tensor) -> Tensor:
        error = y - theta @ design.T
        return -0.5 * ((error @ precision) * error).sum(-1)

    return log_likelihood


def features(rng: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """A matrix A, and what B is multiplied with, s·A x of some rows."""
    a, x = normal(rng, RANK, IN), normal(rng, rows, IN)
    return a, SCALING * x @ a.T


def linear_in_b(rng: torch.Generator, z: Tensor, noise: Tensor, prior: Tensor, a: Tensor) -> tuple[Any, ...]:
    """B from its prior precisions [O R], and data y = B z + ε with ε of precision ``noise`` [O O]."""
    b = normal(rng, OUT, RANK) / prior.sqrt()
    design = torch.kron(torch.eye(OUT, dtype=torch.float64), z.contiguous())  # y and B row by row of B
    whole = torch.kron(noise, torch.eye(len(z), dtype=torch.float64))
    error = torch.linalg.solve_triangular(torch.linalg.cholesky(whole).T, normal(rng, len(whole), 1), upper=True)
    y = design @ b.flatten() + error[:, 0]
    precision = design.T @ whole @ design + prior.flatten().diag()
    centre = torch.linalg.solve(precision, design.T @ whole @ y)
    mean = {A: a.float(), B: centre.view(OUT, RANK).float()}
    return b.flatten(), centre, precision, mean, gaussian_likelihood(design, y, whole)


def diagonal(rng: torch.Generator, temperature: float = 1.0) -> Problem:
    """Orthogonal features and a prior of its own for each parameter."""
    a, z = features(rng, 6)
    z = torch.linalg.qr(z).Q * torch.tensor([1.0, 3.0])
    prior = 0.5 + 2 * torch.rand(OUT, RANK, generator=rng, dtype=torch.float64)
    truth, centre, precision, mean, likelihood = linear_in_b(rng, z, 2 * torch.eye(OUT).double(), prior, a)
    variance = {B: (1 / precision.diagonal() / temperature).view(OUT, RANK).float()}
    posterior: Posterior = DiagonalGaussian(mean, variance)
    return Problem(truth, tempered(posterior, temperature), (B,), centre, likelihood)


def isotropic(rng: torch.Generator) -> Problem:
    """Orthonormal features and one prior: a posterior with one variance."""
    a, z = features(rng, 6)
    z = 2 * torch.linalg.qr(z).Q
    prior = torch.ones(OUT, RANK, dtype=torch.float64)
    truth, centre, precision, mean, likelihood = linear_in_b(rng, z, torch.eye(OUT).double(), prior, a)
    posterior = DiagonalGaussian(mean, {B: torch.full((OUT, RANK), 1 / float(precision[0, 0]))})
    return Problem(truth, posterior, (B,), centre, likelihood)


def low_rank(rng: torch.Generator) -> Problem:
    """Two layers whose outputs are added: a dense covariance across both, as a diagonal and seven directions."""
    size = 2 * OUT * RANK
    (a, z), (_, other) = features(rng, 5), features(rng, 5)
    identity = torch.eye(OUT, dtype=torch.float64)
    design = torch.cat([torch.kron(identity, z.contiguous()), torch.kron(identity, other.contiguous())], 1)
    truth = normal(rng, size)
    y = design @ truth + normal(rng, len(design))
    precision = design.T @ design + torch.eye(size, dtype=torch.float64)
    centre = torch.linalg.solve(precision, design.T @ y)
    values, vectors = torch.linalg.eigh(torch.linalg.inv(precision))
    scale = 0.5
    rows = ((size - 1) * (values - values[0]) / scale).sqrt()[:, None] * vectors.T
    part = OUT * RANK
    mean = {A: a.float(), B: centre[:part].view(OUT, RANK).float(), B2: centre[part:].view(OUT, RANK).float()}
    variance = {n: torch.full((OUT, RANK), float(values[0]) / scale) for n in (B, B2)}
    raw = (centre + rows).float()
    snapshots = {B: raw[:, :part].reshape(size, OUT, RANK), B2: raw[:, part:].reshape(size, OUT, RANK)}
    posterior = LowRankGaussian(mean, variance, snapshots, scale)
    likelihood = gaussian_likelihood(design, y, torch.eye(len(design), dtype=torch.float64))
    return Problem(truth, posterior, (B, B2), centre, likelihood)


def factors(matrix: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the last zero for all other directions, and eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)[-kept:]
    return torch.cat([values, values.new_zeros(1)]).float(), vectors[:, -kept:].float()


def kronecker_gaussian(mean: Any, name: str, left: Any, right: Any, precision: float) -> KroneckerGaussian:
    left_values, left_vectors, right_values, right_vectors = ({name: part} for part in (*left, *right))
    strength = {name: torch.ones(())}
    return KroneckerGaussian(mean, left_values, left_vectors, right_values, right_vectors, strength, precision)


def correlated_noise(rng: torch.Generator) -> Tensor:
    root = normal(rng, OUT, OUT)
    return root @ root.T + 0.3 * torch.eye(OUT, dtype=torch.float64)


def kronecker_b(rng: torch.Generator) -> Problem:
    """Correlated outputs and features: the precision of B is Λ ⊗ ZᵀZ + λI."""
    a, z = features(rng, 4)
    noise, prior = correlated_noise(rng), 0.7
    truth, centre, _, mean, likelihood = linear_in_b(rng, z, noise, torch.full((OUT, RANK), prior).double(), a)
    posterior = kronecker_gaussian(mean, B, factors(noise, OUT), factors(z.T @ z, RANK), prior)
    return Problem(truth, posterior, (B,), centre, likelihood)


def kronecker_a(rng: torch.Generator) -> Problem:
    """B fixed and fewer rows than inputs: the precision of A is s²BᵀΛB ⊗ XᵀX + λI, the second factor of rank 3 of 5."""
    b, x, noise, prior = normal(rng, OUT, RANK), normal(rng, 3, IN), correlated_noise(rng), 0.7
    truth = normal(rng, RANK * IN) / math.sqrt(prior)
    design = SCALING * torch.kron(b, x)
    whole = torch.kron(noise, torch.eye(3, dtype=torch.float64))
    error = torch.linalg.solve_triangular(torch.linalg.cholesky(whole).T, normal(rng, len(whole), 1), upper=True)
    y = design @ truth + error[:, 0]
    precision = design.T @ whole @ design + prior * torch.eye(RANK * IN, dtype=torch.float64)
    centre = torch.linalg.solve(precision, design.T @ whole @ y)
    left, right = factors(SCALING**2 * b.T @ noise @ b, RANK), factors(x.T @ x, 3)
    mean = {A: centre.view(RANK, IN).float(), B: b.float()}
    posterior = kronecker_gaussian(mean, A, left, right, prior)
    return Problem(truth, posterior, (A,), centre, gaussian_likelihood(design, y, whole))


def mixture(rng: torch.Generator) -> Problem:
    """A second layer that the data say nothing of has a prior of three parts, so that they stay equally probable."""
    made = diagonal(rng)
    assert isinstance(made.posterior, DiagonalGaussian)
    priors = [(m, s) for m, s in ((-2.0, 0.5), (0.0, 1.0), (3.0, 0.3))]
    parts = [torch.full((OUT, RANK), m) for m, _ in priors]
    members = tuple(
        DiagonalGaussian(
            made.posterior.mean | {B2: part}, made.posterior.variance | {B2: torch.full((OUT, RANK), s**2)}
        )
        for part, (_, s) in zip(parts, priors, strict=True)
    )
    posterior = Mixture(members)
    m, s = priors[int(torch.randint(3, (), generator=rng))]
    truth = torch.cat([made.truth, m + s * normal(rng, OUT * RANK)])
    chosen = torch.randint(3, (1000,), generator=rng).tolist()

    def draw(count: int, seed: int) -> Tensor:
        """Draws with members at random: those in turn are stratified, of which ranks are not uniform."""
        found = [posterior.draw(3 * k + chosen[k], seed) for k in range(count)]
        return torch.stack([torch.cat([one[n].flatten() for n in (B, B2)]) for one in found]).double()

    centre = torch.cat([made.centre, torch.full((OUT * RANK,), 1 / 3).double()])
    likelihood = lambda theta: made.likelihood(theta[:, : OUT * RANK])  # noqa: E731
    return Problem(truth, posterior, (B, B2), centre, likelihood, draw)


def dropout(rng: torch.Generator) -> Problem:
    """Masks of columns, of which the data say nothing: the posterior is the prior."""
    a, rate = normal(rng, RANK, IN), 0.3
    keep = torch.rand(IN, generator=rng, dtype=torch.float64) >= rate
    truth = (a.float().double() * keep / (1 - rate)).flatten()
    posterior = ColumnDropout({A: a.float()}, rate, {A: 1.0})
    direction = normal(rng, RANK * IN)
    return Problem(truth, posterior, (A,), a.flatten(), lambda theta: (theta @ direction).exp())


def linearised(rng: torch.Generator) -> Problem:
    """Logits that are linear in B at four new inputs: their draws are those of the exact predictive distribution."""
    made, new = kronecker_b(rng), normal(rng, 4, RANK)
    assert isinstance(made.posterior, KroneckerGaussian)
    inner = made.posterior
    jacobian = torch.einsum("co,ni->cnoi", torch.eye(OUT), new.float())

    def logits(b: Tensor) -> Tensor:
        return new @ b.view(OUT, RANK).T

    engine = SimpleNamespace(
        mean=True,
        contents=range(4),
        classes=OUT,
        moments=lambda p, take: take(
            range(4), logits(made.centre).float(), p.covariance(B, p.projected(B, jacobian))[None]
        ),
    )

    def differences(log_probs: Tensor) -> Tensor:
        """What a softmax keeps of logits [S N C], [S N·(C-1)]."""
        return (log_probs[..., 1:] - log_probs[..., :1]).double().flatten(1)

    def draw(count: int, seed: int) -> Tensor:
        engine_: Any = engine
        return differences(Linearised(inner).answers(engine_, Draws(count, seed))[0])

    truth, centre = (differences(logits(b)[None])[0] for b in (made.truth, made.centre))
    return Problem(truth, inner, (B,), centre, lambda values: values.cos().sum(-1), draw)


CASES: dict[str, Callable[[torch.Generator], Problem]] = {
    "diagonal": diagonal,
    "isotropic": isotropic,
    "tempered": lambda rng: diagonal(rng, 0.3),
    "low-rank": low_rank,
    "kronecker-b": kronecker_b,
    "kronecker-a": kronecker_a,
    "mixture": mixture,
    "dropout": dropout,
    "linearised": linearised,
}
"""Problems by the family that their posterior is of."""

QUANTITIES = ("first", "projection", "square", "likelihood")
"""What ranks are of: a number, a fixed direction, the squared distance from the prior's mean, and the likelihood."""


def shrunk(draws: Tensor, centre: Tensor) -> Tensor:
    return centre + (draws - centre) / 1.2


MUTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda draws, centre: draws,
    "scale 1.2": lambda draws, centre: centre + 1.2 * (draws - centre),
    "scale 1/1.2": shrunk,
    "no mean shift": lambda draws, centre: draws - centre,
    "draws correlated by a half": lambda draws, centre: centre + (draws - centre + draws[:1] - centre) / math.sqrt(2),
    "no correlation of parameters": lambda draws, centre: torch.stack(
        [column.roll(k) for k, column in enumerate(draws.T)], 1
    ),
}
"""Wrong draws [L P] around a centre [P] that the ranks are to show."""


def ranks(case: str, simulations: int, draws: int, seed: int) -> dict[str, Tensor]:
    """Ranks [Q simulations] of the truth among a number of draws, right ones and those of each mutation."""
    found: dict[str, list[Tensor]] = {name: [] for name in MUTATIONS}
    for number in range(simulations):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
        problem = CASES[case](rng)
        own = problem.draws(draws, number)
        ties = torch.rand(draws + 1, len(QUANTITIES), generator=rng)
        direction = torch.linspace(-1, 1.3, own.shape[1], dtype=torch.float64)

        def quantities(theta: Tensor, problem: Problem = problem, direction: Tensor = direction) -> Tensor:
            return torch.stack(
                [theta[:, 0], theta @ direction, theta.square().sum(-1), problem.likelihood(theta)], 1
            ).float()

        truth = quantities(problem.truth[None])
        for name, mutate in MUTATIONS.items():
            values = quantities(mutate(own, problem.centre))
            below = (values < truth) | ((values - truth).abs() <= 1e-5 * (1 + truth.abs())) & (ties[1:] < ties[:1])
            found[name].append(below.sum(0))
    return {name: torch.stack(each, 1) for name, each in found.items()}


def p_value(numbers: Tensor, draws: int, degrees: int = 4) -> float:
    """Neyman's smooth test (1937) of ranks uniform on 0…L: moments by orthonormal polynomials, χ² with as many."""
    points = torch.linspace(-1, 1, draws + 1, dtype=torch.float64)
    polynomials = torch.linalg.qr(points[:, None] ** torch.arange(degrees + 1)).Q * math.sqrt(draws + 1)
    moments = polynomials[numbers.long(), 1:].mean(0)
    statistic = len(numbers) * moments.square().sum()
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), statistic / 2))
