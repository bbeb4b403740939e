"""The generalised Gauss-Newton matrix of the loss by the adapter's parameters: its diagonal, or K-FAC.

H = Σ_n J_nᵀ Λ_n J_n, with J the Jacobian of the logits and Λ the Hessian of the loss by the logits, block by block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Int
from bayeslora.errors import InputError
from bayeslora.params import Params, generator
from bayeslora.posteriors import DiagonalGaussian, KroneckerGaussian
from bayeslora.posteriors.provenance import Origin
from bayeslora.prediction.jacobians import Gradients, Site, differentiated


def ggn_root(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C C"]:
    """Return L with L Lᵀ = diag(p) − p pᵀ, the Hessian of the cross-entropy by the logits.

    Args:
        logits: The choices' logits; -inf for choices that an example does not have.

    Returns:
        Column c is √p_c (e_c − p).
    """
    p = logits.softmax(-1)
    return (torch.diag_embed(torch.ones_like(p)) - p[:, :, None]) * p.sqrt()[:, None, :]


def mixed(gradients: Gradients, module: nn.Module, root: Float[Tensor, "N C C"]) -> Float[Tensor, "C R T O"]:
    """Return the gradients of a layer's output along the columns of L instead of the classes.

    Args:
        gradients: Of one batch.
        module: The layer.
        root: `ggn_root` of the batch's logits.

    Returns:
        One gradient for each column.
    """
    outputs = gradients.outputs[module]
    own = root[gradients.owners[module].to(root.device)].to(outputs.device)
    return torch.einsum("rdc,drto->crto", own, outputs)


@final
class Factor:
    """A sum of outer products Σ v vᵀ, held exactly where it is small and as a sketch where it is large.

    The sketch is Y = (Σ v vᵀ) Ω with a fixed Ω of few columns; its Nyström approximation is exact where the rank of the
    sum is at most that number (Tropp et al. 2017, arXiv 1706.05736, algorithm 3). Memory is size × width whatever the
    number of vectors, and the result does not depend on their order but by rounding.

    Args:
        size: Length of the vectors.
        width: Columns of Ω; a factor of at most that size is held exactly.
        key: Seeds Ω.
        device: Where the sums are held.
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
        """Add vectors to the sum.

        Args:
            vectors: One a row, on the factor's device.
        """
        self.sketch += vectors.T @ (vectors @ self.omega)
        self.trace += vectors.double().square().sum()  # a tensor: nothing waits for the device

    def eigen(self, rank: int, factor: float = 1.0) -> tuple[Float[Tensor, " values"], Float[Tensor, "size K"]]:
        """Return the largest eigenvalues and their vectors, and what is left of the trace spread over the others.

        Args:
            rank: Most eigenvalues K to keep where the factor is a sketch; an exact one keeps all.
            factor: What to multiply the sum with.

        Returns:
            Eigenvalues, the last one that of each other direction, and the eigenvectors; float32 on the CPU.
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
        found = torch.cat([values, values.new_tensor([rest])]) * factor
        return found.float(), vectors.float().contiguous()


_OVERSAMPLING = 4
"""Columns of a sketch for each eigenvalue that is kept of it."""


class Curvature(ABC):
    """A curvature that is summed batch by batch.

    Attributes:
        sites: The parameters.
    """

    sites: Sequence[Site]

    @abstractmethod
    def add(self, gradients: Gradients, root: Float[Tensor, "N C C"]) -> None:
        """Add a batch.

        Args:
            gradients: Its gradients.
            root: Root of the loss's Hessian by the logits.
        """

    @abstractmethod
    def spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the eigenvalues of each parameter's block and how often each occurs, float64."""

    @abstractmethod
    def posterior(self, mean: Params, precision: float, origin: Origin | None) -> DiagonalGaussian | KroneckerGaussian:
        """Return the Gaussian N(mean, (H + λI)⁻¹).

        Args:
            mean: All parameters of the adapter.
            precision: The prior precision λ.
            origin: The posterior's origin.
        """


def accumulated(
    model: nn.Module,
    curvature: Curvature,
    batches: Sequence[tuple[list[int], dict[str, Tensor]]],
    labels: Int[Tensor, " N"],
    root: Callable[[Tensor], Tensor] = ggn_root,
) -> float:
    """Sum a curvature in one pass over the data.

    Args:
        model: PEFT model with the readout attached.
        curvature: What is summed.
        batches: Indices of the examples, and the batch.
        labels: Index of the right choice of each example.
        root: Root of the loss's Hessian as a function of the logits.

    Returns:
        The log-likelihood of the data.

    Raises:
        InputError: If the logits or a gradient is not finite.
    """
    total: Tensor | float = 0.0
    with differentiated(model, curvature.sites) as gradients_of:
        for order, batch in batches:
            gradients = gradients_of(batch)
            place = gradients.logits.device
            finite = [g.isfinite().all().to(place) for g in gradients.outputs.values()]
            if not bool(torch.stack([~gradients.logits.isnan().any(), *finite]).all()):  # one wait a batch
                raise InputError(
                    "the curvature is not finite: the model overflows on the training rows; load it in float32 or "
                    "bfloat16"
                )
            curvature.add(gradients, root(gradients.logits))
            right = labels[order].to(place)
            total = total + gradients.logits.log_softmax(-1).gather(1, right[:, None]).double().sum()
    return float(total)


@final
class DiagonalCurvature(Curvature):
    """The diagonal: sums of squares of the gradients along the columns of the Hessian's root, example by example.

    Args:
        sites: The parameters.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.sums: dict[str, Tensor] = {}

    def add(self, gradients: Gradients, root: Float[Tensor, "N C C"]) -> None:
        """Add a batch."""
        for site in self.sites:
            jacobian = gradients.jacobian(site)
            own = torch.einsum("ndc,dnoi->cnoi", root.to(jacobian.device), jacobian).square().sum((0, 1))
            self.sums[site.name] = self.sums[site.name] + own if site.name in self.sums else own

    def spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the diagonal's entries, each once."""
        return {name: (h.double().cpu(), torch.ones(h.shape, dtype=torch.float64)) for name, h in self.sums.items()}

    def posterior(self, mean: Params, precision: float, origin: Origin | None) -> DiagonalGaussian:
        """Return a Gaussian with the variances 1/(h + λ)."""
        variance = {name: (1 / (h.cpu() + precision)).view_as(mean[name]) for name, h in self.sums.items()}
        return DiagonalGaussian(mean, variance, origin)


@final
class KroneckerCurvature(Curvature):
    """K-FAC: G = Σ g gᵀ and X = mean of x xᵀ, over the tokens that reach the answer (Martens and Grosse 2015).

    Args:
        sites: The parameters.
        rank: Eigenvalues kept of a factor that is too large to be held.
        tokens: ``expand``, or ``reduce``; see `bayeslora.Laplace`.
    """

    def __init__(self, sites: Sequence[Site], rank: int, tokens: str = "expand") -> None:
        self.sites, self.rank, self.tokens = sites, rank, tokens
        self.left: dict[nn.Module, Factor] = {}
        self.right: dict[nn.Module, Factor] = {}
        self.count: dict[nn.Module, Tensor] = {}

    def add(self, gradients: Gradients, root: Float[Tensor, "N C C"]) -> None:
        """Add a batch."""
        for module, name in {site.module: site.name for site in self.sites}.items():
            x, g = gradients.inputs[module], mixed(gradients, module, root)
            reaching = g.abs().amax((0, 3)) > 0
            if self.tokens == "reduce":
                weight = reaching.float() / reaching.sum(1, keepdim=True).clamp_min(1)
                x, g = (weight[..., None] * x).sum(1, keepdim=True), g.sum(2, keepdim=True)
                reaching = reaching.any(1, keepdim=True)
            inputs = torch.where(reaching[..., None], x, 0.0).flatten(0, 1)  # to pick them would wait for the device
            outputs = g.flatten(0, 2)  # those of other tokens are zero
            if module not in self.left:
                width = _OVERSAMPLING * self.rank
                self.left[module] = Factor(outputs.shape[1], width, f"{name}/left", x.device)
                self.right[module] = Factor(inputs.shape[1], width, f"{name}/right", x.device)
            self.left[module].add(outputs)
            self.right[module].add(inputs)
            self.count[module] = self.count.get(module, 0) + reaching.sum()
            self._found = None

    def spectra(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the products of the factors' eigenvalues."""
        found = {}
        for name, sides in self._eigen().items():
            values = [v.double() for v, _ in sides]
            often = []
            for _, vectors in sides:
                size, kept = vectors.shape
                often.append(torch.tensor([1.0] * kept + [float(size - kept)], dtype=torch.float64))
            found[name] = (values[0][:, None] * values[1], often[0][:, None] * often[1])
        return found

    def posterior(self, mean: Params, precision: float, origin: Origin | None) -> KroneckerGaussian:
        """Return a Gaussian with the precisions G ⊗ X + λI."""
        eigen = self._eigen()
        return KroneckerGaussian(
            mean,
            left_values={name: sides[0][0] for name, sides in eigen.items()},
            left_vectors={name: sides[0][1] for name, sides in eigen.items()},
            right_values={name: sides[1][0] for name, sides in eigen.items()},
            right_vectors={name: sides[1][1] for name, sides in eigen.items()},
            strength={name: torch.ones(()) for name in eigen},
            precision=precision,
            origin=origin,
        )

    _found: dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] | None = None

    def _eigen(self) -> dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Return the eigenvalues and vectors of both factors, computed once."""
        if self._found is None:
            found = {}
            for site in self.sites:
                right = (torch.tensor([1.0, 0.0]), torch.ones(1, 1))  # a bias is a column with the input 1
                if not site.bias:
                    right = self.right[site.module].eigen(self.rank, 1 / max(1, int(self.count[site.module])))
                found[site.name] = (self.left[site.module].eigen(self.rank), right)
            self._found = found
        return self._found
