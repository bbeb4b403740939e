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
from bayeslora.methods.laplace.sketch import Factor
from bayeslora.params import Params, generator
from bayeslora.posteriors import DiagonalGaussian, KroneckerGaussian
from bayeslora.posteriors.provenance import Origin
from bayeslora.prediction.jacobians import Gradients, Pass, Site, differentiated

Root = Callable[[Tensor, Sequence[int]], Tensor]
"""Gives K columns L [N C K] for a batch's logits [N C] and the numbers of its rows; L Lᵀ is the loss's Hessian by them,
or has it as its expectation."""


def ggn_root(logits: Float[Tensor, "N C"], rows: Sequence[int] = ()) -> Float[Tensor, "N C C"]:
    """Return L, with columns √p_c (e_c − p), for which L Lᵀ = diag(p) − p pᵀ, the Hessian of the cross-entropy."""
    p = logits.softmax(-1)
    return (torch.diag_embed(torch.ones_like(p)) - p[:, :, None]) * p.sqrt()[:, None, :]


@final
class SampledRoot:
    """K columns of each row's root, drawn with probabilities as their squared lengths: a Monte Carlo Fisher matrix.

    A column √p_c (e_c − p) is the gradient of the loss of label c. Labels drawn from p give the Fisher matrix, which
    for the cross-entropy is the Gauss-Newton matrix (Kunstner et al. 2019, arXiv 1905.12558), but where the model is
    sure of a label they nearly always draw that one, whose gradient vanishes. Drawn by q_c ∝ p_c |e_c − p|² and
    weighted by p_c / (K q_c) the expectation is the same, every draw has the trace of the whole, and the variance is
    the least (Drineas et al. 2006, SIAM J. Comput. 36). A row's K draws are systematic: one uniform number, K equal
    steps, so that no column comes more often than its share rounded up.

    The numbers belong to the rows, so neither the batches nor their order matter.
    """

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        self.columns = columns
        self.uniform = torch.rand(rows, dtype=torch.float64, generator=generator(seed, "labels"))

    def __call__(self, logits: Float[Tensor, "N C"], rows: Sequence[int]) -> Float[Tensor, "N C K"]:
        """Return the columns of some rows."""
        place = torch.device("cpu") if logits.device.type == "mps" else logits.device  # MPS has no float64
        p = logits.to(place, torch.float64).softmax(-1)
        squares = p.square()
        others = (squares.sum(1, keepdim=True) - squares).clamp_min(0)
        total = (p * ((1 - p).square() + others)).cumsum(1)
        steps = (self.uniform[list(rows), None] + torch.arange(self.columns)) / self.columns
        drawn = torch.searchsorted(total, steps.to(place) * total[:, -1:], right=True).clamp(max=p.shape[1] - 1)
        columns = nn.functional.one_hot(drawn, p.shape[1]) - p[:, None]
        length = (total[:, -1:] / self.columns).sqrt() / columns.norm(dim=2).clamp_min(1e-300)
        return (length[..., None] * columns).mT.to(logits.device, logits.dtype)


_OVERSAMPLING = 4
"""Columns of a sketch for each eigenvalue that is kept of it."""

Spectra = dict[str, tuple[Tensor, Tensor]]
"""By parameter the eigenvalues of its block of H, and how often each occurs; float64."""


class Curvature(ABC):
    """A curvature by the parameters of ``sites``, summed batch by batch."""

    sites: Sequence[Site]

    @abstractmethod
    def add(self, gradients: Gradients) -> None:
        """Add a batch's gradients along the columns of the root of the loss's Hessian by the logits."""

    @abstractmethod
    def totals(self) -> list[Tensor]:
        """Return the sums over the data themselves, to add those of other rows to in place."""

    @abstractmethod
    def spectra(self) -> Spectra:
        """Return the eigenvalues of each parameter's block."""

    @abstractmethod
    def posterior(self, mean: Params, precision: float, origin: Origin | None) -> DiagonalGaussian | KroneckerGaussian:
        """Return the Gaussian N(mean, (H + λI)⁻¹); ``precision`` is λ."""


def accumulated(
    model: nn.Module,
    curvature: Curvature,
    batches: Sequence[tuple[list[int], dict[str, Tensor]]],
    labels: Int[Tensor, " N"],
    root: Root = ggn_root,
    done: Callable[[int], object] = lambda _: None,
) -> float:
    """Sum a curvature in one pass, with the readout attached to the model; return the data's log-likelihood."""
    total: Tensor | float = 0.0
    with differentiated(model, curvature.sites) as passed:
        for order, batch in batches:
            log_p = _added(passed(batch), curvature, root, order)
            right = labels[order].to(log_p.device)
            total = total + log_p.gather(1, right[:, None]).double().sum()
            done(len(order))
    return float(total)


def _added(one: Pass, curvature: Curvature, root: Root, order: Sequence[int]) -> Float[Tensor, "N C"]:
    """Add one batch to a curvature, and return its log-probabilities; its pass is held no longer."""
    gradients, place = one.along(root(one.logits, order)), one.logits.device
    finite = [g.isfinite().all().to(place) for g in gradients.outputs.values()]
    if not bool(torch.stack([~one.logits.isnan().any(), *finite]).all()):  # one wait a batch
        raise InputError(
            "the curvature is not finite: the model overflows on the training rows; load it in float32 or bfloat16"
        )
    curvature.add(gradients)
    return one.logits.log_softmax(-1)


@final
class DiagonalCurvature(Curvature):
    """The diagonal: sums of squares of the gradients along the columns of the Hessian's root, example by example."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.sums: dict[str, Tensor] = {}

    def add(self, gradients: Gradients) -> None:
        """Add a batch."""
        for site in self.sites:
            squares = gradients.jacobian(site).square().sum((0, 1))
            self.sums[site.name] = self.sums[site.name] + squares if site.name in self.sums else squares

    def totals(self) -> list[Tensor]:
        """Return the diagonal of each parameter."""
        return list(self.sums.values())

    def spectra(self) -> Spectra:
        """Return the diagonal's entries, each once."""
        return {name: (h.double().cpu(), torch.ones(h.shape, dtype=torch.float64)) for name, h in self.sums.items()}

    def posterior(self, mean: Params, precision: float, origin: Origin | None) -> DiagonalGaussian:
        """Return a Gaussian with the variances 1/(h + λ)."""
        variance = {name: (1 / (h.cpu() + precision)).view_as(mean[name]) for name, h in self.sums.items()}
        return DiagonalGaussian(mean, variance, origin)


@final
class KroneckerCurvature(Curvature):
    """K-FAC: G = Σ g gᵀ and X = mean of x xᵀ, over the tokens that reach the answer (Martens and Grosse 2015)."""

    def __init__(self, sites: Sequence[Site], rank: int, tokens: str = "expand") -> None:
        self.sites, self.rank, self.tokens = sites, rank, tokens
        self.left: dict[nn.Module, Factor] = {}
        self.right: dict[nn.Module, Factor] = {}
        self.count: dict[nn.Module, Tensor] = {}
        self._eigen: dict[str, Params] = {}

    def add(self, gradients: Gradients) -> None:
        """Add a batch."""
        for module, name in {site.module: site.name for site in self.sites}.items():
            x, g = gradients.inputs[module], gradients.outputs[module]
            size = g.abs().amax((0, 3))
            # that of a first token's query is zero by cancellation: some kernels give zero, others rounding
            reaching = size > torch.finfo(torch.float32).eps * size.amax(1, keepdim=True)
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
            self._eigen = {}

    def totals(self) -> list[Tensor]:
        """Return the sketches, traces and numbers of tokens of each layer."""
        self._eigen = {}
        factors = [factor for side in (self.left, self.right) for factor in side.values()]
        return [total for f in factors for total in (f.sketch, f.trace)] + list(self.count.values())

    def spectra(self) -> Spectra:
        """Return the products of the factors' eigenvalues."""
        spectra, eigen = {}, self.eigen()
        for name, left in eigen["left_values"].items():
            often_left, often_right = (_multiplicities(eigen[f"{side}_vectors"][name]) for side in ("left", "right"))
            values = left.double()[:, None] * eigen["right_values"][name].double()
            spectra[name] = (values, often_left[:, None] * often_right)
        return spectra

    def posterior(self, mean: Params, precision: float, origin: Origin | None) -> KroneckerGaussian:
        """Return a Gaussian with the precisions G ⊗ X + λI."""
        strength = {site.name: torch.ones(()) for site in self.sites}
        return KroneckerGaussian(mean, **self.eigen(), strength=strength, precision=precision, origin=origin)

    def eigen(self) -> dict[str, Params]:
        """Return eigenvalues, the last that of each other direction, and vectors of both factors, computed once."""
        if not self._eigen:
            parts: dict[str, Params] = {f"{s}_{part}": {} for s in ("left", "right") for part in ("values", "vectors")}
            for site in self.sites:
                left, right = self.left[site.module].eigen(self.rank), (torch.tensor([1.0, 0.0]), torch.ones(1, 1))
                if not site.bias:  # which is a column with the input 1
                    right = self.right[site.module].eigen(self.rank, 1 / max(1, int(self.count[site.module])))
                parts["left_values"][site.name], parts["left_vectors"][site.name] = left
                parts["right_values"][site.name], parts["right_vectors"][site.name] = right
            self._eigen = parts
        return self._eigen


def _multiplicities(vectors: Float[Tensor, "size K"]) -> Float[Tensor, " values"]:
    """Return how often each eigenvalue occurs: once, and the last one in all directions that are left."""
    size, count = vectors.shape
    return torch.tensor([1.0] * count + [float(size - count)], dtype=torch.float64)
