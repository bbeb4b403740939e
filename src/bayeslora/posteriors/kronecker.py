"""Gaussians whose precision is a Kronecker product in each parameter, as K-FAC leaves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.base import Rescaling, rescaled_mean
from bayeslora.posteriors.linearised import Linearisable
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Sampling


@final
@dataclass(frozen=True)
class KroneckerGaussian(Linearisable):
    """Normal parameters with precision G ⊗ X + λI for each matrix W [O I], G on its rows and X on its columns.

    Each factor is kept by its largest eigenvalues: G = U diag(s) Uᵀ + ρ(I − UUᵀ), so that a factor of a large side has
    low rank K and never its O×O or I×I entries. A vector is a matrix with one column.

    Attributes:
        mean: Means of all parameters.
        left_values: Eigenvalues of G [K+1] by parameter, the last one ρ, that of all other directions.
        left_vectors: Eigenvectors of G [O K], orthonormal.
        right_values: Eigenvalues of X [K+1], the last one that of all other directions.
        right_vectors: Eigenvectors of X [I K].
        strength: Factor on the noise: a number or one for each entry; 1 is the Gaussian of the formula.
        precision: Prior precision λ.
    """

    description: ClassVar[str] = "a Gaussian with a Kronecker-factored covariance"

    mean: Params
    left_values: Params
    left_vectors: Params
    right_values: Params
    right_vectors: Params
    strength: Params
    precision: float
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check shapes, signs and the prior precision."""
        if not 0 < self.precision < math.inf:
            raise InputError(f"the prior precision must be finite and positive, and it is {self.precision}")
        for name, factor in self.strength.items():
            for values, vectors, size in zip(
                (self.left_values, self.right_values),
                (self.left_vectors, self.right_vectors),
                self.mean[name].reshape(len(self.mean[name]), -1).shape,
                strict=True,
            ):
                if vectors[name].shape != (size, len(values[name]) - 1):
                    raise InputError(f"the factors of {name!r} do not fit its shape {tuple(self.mean[name].shape)}")
                if not bool(torch.isfinite(values[name]).all()) or bool((values[name] < 0).any()):
                    raise InputError(f"the curvature of {name!r} has an eigenvalue that is negative or not finite")
            if factor.ndim and factor.shape != self.mean[name].shape:
                raise InputError(f"the strength of {name!r} has another shape than its mean")

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return mean + strength ⊙ (G ⊗ X + λI)^(−1/2) ε."""
        draw = dict(self.mean)
        like = {name: self.mean[name] for name in self.strength}
        for name, noise in self.noise.normal(like, index, seed, sampling):
            m = self.mean[name]
            spread = self._product(name, noise.reshape(len(m), -1), self._roots[name]).view_as(m)
            draw[name] = torch.addcmul(m, spread, self.strength[name], out=spread)
        return draw

    @cached_property
    def _roots(self) -> Params:
        """The square roots of the covariance's eigenvalues [L+1 R+1] by parameter, which every draw needs."""
        return {name: (self.eigenvalues(name) + self.precision).rsqrt() for name in self.strength}

    def standard_deviation(self) -> Params:
        """Return √diagonal of the covariance."""
        return {name: self.variance(name).sqrt() for name in self.strength}

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> KroneckerGaussian:
        """Return the Gaussian with its strength, and the mean if asked, multiplied parameter by parameter."""
        strength = {name: s * torch.as_tensor(noise(name, self)) for name, s in self.strength.items()}
        return replace(self, mean=rescaled_mean(self, signal), strength=strength)

    @property
    def noisy(self) -> Collection[str]:
        """The parameters that have factors."""
        return self.strength.keys()

    def projection(self, name: str) -> Hashable:
        """Return eigenvectors and strength: posteriors that differ in the prior precision alone share them."""
        strength = self.strength[name]
        sides = id(self.left_vectors[name]), id(self.right_vectors[name])
        return (*sides, id(strength) if strength.ndim else float(strength))

    def projected(self, name: str, jacobian: Float[Tensor, "C N O I"]) -> Float[Tensor, "L+1 R+1 N C C"]:
        """Return the products of the parts of J in each pair of eigenspaces, which `covariance` weights by eigenvalues.

        Last row and column belong to all directions that the factors do not keep.
        """
        u, v = (side[name].to(jacobian) for side in (self.left_vectors, self.right_vectors))
        strength = self.strength[name].to(jacobian)
        matrix = jacobian * (strength.view(jacobian.shape[2:]) if strength.ndim else strength)
        left, right = u.T @ matrix, matrix @ v
        core = u.T @ right
        beyond = left - core @ v.T  # along an eigenvector of G, across those of X
        aside = right - u @ core
        rest = matrix - u @ left - aside @ v.T
        both = torch.einsum("cnlr,dnlr->lrncd", core, core)
        rows = torch.einsum("cnli,dnli->lncd", beyond, beyond)[:, None]
        columns = torch.einsum("cnor,dnor->rncd", aside, aside)
        last = torch.einsum("cnoi,dnoi->ncd", rest, rest)
        return torch.cat([torch.cat([both, rows], 1), torch.cat([columns, last[None]])[None]])

    def covariances(
        self, name: str, projected: Float[Tensor, "L+1 R+1 N C C"], group: Sequence[Linearisable]
    ) -> Float[Tensor, "K N C C"]:
        """Return J Σ Jᵀ of one parameter under Gaussians that differ in their eigenvalues alone, in one product."""
        weights = torch.stack([cast(KroneckerGaussian, each).weights(name) for each in group])
        return torch.tensordot(weights.to(projected), projected, 2)

    def weights(self, name: str) -> Float[Tensor, "L+1 R+1"]:
        """Return the eigenvalues of the covariance of one parameter, without the strength."""
        return (self.eigenvalues(name) + self.precision).reciprocal()

    def covariance(self, name: str, projected: Float[Tensor, "L+1 R+1 N C C"]) -> Float[Tensor, "N C C"]:
        """Return J Σ Jᵀ of one parameter."""
        return torch.tensordot(self.weights(name).to(projected), projected, 2)

    def multiply(
        self, name: str, matrix: Float[Tensor, "*N O I"], function: Callable[[Tensor], Tensor] = torch.reciprocal
    ) -> Float[Tensor, "*N O I"]:
        """Return f(G ⊗ X + λI) vec(M) without the strength; the reciprocal gives the covariance times M."""
        return self._product(name, matrix, function(self.eigenvalues(name).to(matrix) + self.precision))

    def _product(
        self, name: str, matrix: Float[Tensor, "*N O I"], f: Float[Tensor, "L+1 R+1"]
    ) -> Float[Tensor, "*N O I"]:
        """Return the matrix with the factors' eigenvectors and other eigenvalues times vec(M)."""
        u, v = (side[name].to(matrix) for side in (self.left_vectors, self.right_vectors))
        both, rows, columns, rest = f[:-1, :-1], f[:-1, -1:], f[-1:, :-1], f[-1, -1]
        left, right = u.T @ matrix, matrix @ v
        core = u.T @ right
        product = rest * matrix + u @ ((rows - rest) * left) + ((columns - rest) * right) @ v.T
        return product + u @ ((both - rows - columns + rest) * core) @ v.T

    def eigenvalues(self, name: str) -> Float[Tensor, "L+1 R+1"]:
        """Return the products of the factors' eigenvalues, without λ; the last are those of all other directions."""
        return self.left_values[name][:, None] * self.right_values[name]

    def variance(self, name: str) -> Tensor:
        """Return the marginal variances of a parameter: the diagonal of its covariance, in its shape."""
        f = (self.eigenvalues(name) + self.precision).reciprocal()
        sides = []
        for vectors in (self.left_vectors[name], self.right_vectors[name]):
            squares = vectors.square()
            rest = (1 - squares.sum(1, keepdim=True)).clamp_min(0)
            if vectors.shape[0] == vectors.shape[1]:  # no other direction: only rounding, which a weak prior enlarges
                rest.zero_()
            sides.append(torch.cat([squares, rest], 1))
        diagonal = sides[0] @ f @ sides[1].T
        return self.strength[name] ** 2 * diagonal.view_as(self.mean[name])
