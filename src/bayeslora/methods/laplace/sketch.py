"""Sums of outer products, exact or as a sketch of bounded memory, and their eigenvalues."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.params import generator


@final
class Factor:
    """A sum of outer products Σ v vᵀ, held exactly where it is small, else as a sketch; ``key`` seeds Ω.

    The sketch is Y = (Σ v vᵀ) Ω with a fixed Ω, [size width]; its Nyström approximation is exact where the rank of the
    sum is at most the width (Tropp et al. 2017, arXiv 1706.05736, algorithm 3).
    """

    def __init__(self, size: int, width: int, key: str, device: torch.device) -> None:
        self.size = size
        self.trace = torch.zeros((), dtype=torch.float64, device=device)
        if size <= width:
            omega = torch.eye(size)
        else:
            omega = torch.linalg.qr(torch.randn(size, width, generator=generator("sketch", key)))[0]
        self.omega = omega.to(device)
        self.sketch = torch.zeros_like(self.omega)

    def add(self, vectors: Float[Tensor, "M size"]) -> None:
        """Add vectors, on the factor's device."""
        self.sketch += vectors.T @ (vectors @ self.omega)
        self.trace += vectors.double().square().sum()  # a tensor: nothing waits for the device

    def eigen(self, rank: int, factor: float = 1.0) -> tuple[Float[Tensor, " values"], Float[Tensor, "size K"]]:
        """Return ``factor`` times the largest eigenvalues, and their vectors; float32 on the CPU.

        The last value is that of each other direction, over which what is left of the trace is spread. Of a sketch at
        most ``rank`` are kept, of an exact sum all.
        """
        omega, y = self.omega.double().cpu(), self.sketch.double().cpu()
        if self.size <= omega.shape[1]:
            values, vectors = torch.linalg.eigh((y + y.T) / 2)
            values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
            rest = 0.0
        else:
            shift = max(float(y.norm()) * self.size**0.5 * torch.finfo(torch.float32).eps, 1e-300)
            shifted = y + shift * omega
            core = omega.T @ shifted
            lower = torch.linalg.cholesky((core + core.T) / 2)
            vectors, roots, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower, shifted.T, upper=False).T, False)
            values = (roots.square() - shift).clamp_min(0)[:rank]
            vectors = vectors[:, :rank]
            rest = max(0.0, float(self.trace) - float(values.sum())) / (self.size - len(values))
        return (torch.cat([values, values.new_tensor([rest])]) * factor).float(), vectors.float().contiguous()
