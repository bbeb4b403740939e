"""Laplace-LoRA: a Gaussian around a trained adapter from the curvature of its loss.

Yang et al. 2024 (arXiv 2308.13111): N(θ̂, (H + λI)⁻¹), with H the generalised Gauss-Newton matrix of the summed
cross-entropy over the choices, block by block: for the weight of a linear layer with inputs x and output gradients g,
either a Kronecker product G ⊗ X (K-FAC), or its diagonal. A and B are layers of their own. The long side of each factor
is kept as a sketch whose memory grows neither with the data nor with the square of the layer. λ is the prior precision,
where the evidence

    log Z = log p(D|θ̂) − ½ λ|θ̂|² + ½ P log λ − ½ log det(H + λI)

is largest (equation 14 there, in closed form from the eigenvalues), or the negative log-likelihood of validation rows
smallest. Predictions are those of the model linearised at θ̂ (`Linearised`), or of draws of the weights.

With many classes, labels are sampled instead of a backward pass for each (`SampledRoot`).

What we do differently: tokens that do not reach the answer (padding too) are not counted as inputs x, and what the low
rank leaves of a factor's trace is spread over its other directions instead of dropped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from bayeslora.errors import InputError
from bayeslora.methods.base import LATER, PostHoc, TrainedAdapter, check_ranges
from bayeslora.methods.divergence import DIVERGENCE, ScaleByDivergence, check_scale
from bayeslora.methods.laplace.ggn import (
    Curvature,
    DiagonalCurvature,
    KroneckerCurvature,
    SampledRoot,
    Spectra,
    accumulated,
    ggn_root,
)
from bayeslora.methods.search import smallest
from bayeslora.metrics.classification import nll
from bayeslora.metrics.uncertainty import average
from bayeslora.params import Params, generator, lora_parameters, swapped
from bayeslora.posteriors import DiagonalGaussian, KroneckerGaussian, Linearised
from bayeslora.posteriors.linearised import LOGIT_DRAWS, Linearisable, logit_draws
from bayeslora.posteriors.transforms import in_last_layers
from bayeslora.prediction.jacobians import Site, linear_sites
from bayeslora.prediction.linearised import gradient_batches, gradient_budget, logit_moments
from bayeslora.prediction.progress import shown
from bayeslora.prediction.readouts import readout_for
from bayeslora.prediction.sharding import added_over_processes
from bayeslora.tasks.types import Split, Task, labelled

logger = logging.getLogger(__name__)
LOG_PRECISIONS = (-14.0, 23.0)
"""Where log λ is searched: λ from 1e-6 to 1e10."""
MANY, SAMPLES = 16, 4
"""A row with more choices than the first has labels sampled: so many as the second."""
LEAST_JUDGES = 32
"""Least validation rows that λ is judged on, if there are as many, where labels are sampled."""
CANDIDATES = tuple(10 ** (k / 4) for k in range(-8, 33))
"""Prior precisions λ that are tried on validation rows."""


@final
@dataclass(frozen=True)
class Laplace(PostHoc[Linearised | KroneckerGaussian | DiagonalGaussian]):
    """Curvature of the loss around a trained adapter.

    Attributes:
        structure: ``kron`` for K-FAC, ``diag`` for the diagonal.
        predictive: ``linearised``, or ``draws`` of the weights.
        prior: Prior precision λ, or how to find it: ``validation`` rows, or ``marginal``, the evidence; where the
            training rows are memorised the curvature vanishes, and the evidence makes the noise as large as the
            weights.
        rank: Eigenvalues that are kept of the factor of a long side; 10 in the paper's code.
        last_layers: Noise in so many last layers only (a head counts as none); None for all.
        tokens: ``expand`` takes a sequence's tokens as examples of their own, as in the paper; ``reduce`` sums their
            gradients and averages their inputs first (Eschenhagen et al. 2023, arXiv 2311.00636).
        draws: Draws of the weights by which λ is judged on validation rows.
        samples: Labels that are sampled for each row (`SampledRoot`), a backward pass each; 0 takes all C. None: 4
            where a row has more than 16 choices, else 0. With samples λ is judged on as many validation rows, all
            choices of each, as take no more passes than the training rows did, and at least on 32.
        scale: ``divergence`` multiplies the covariance that ``prior`` gives so that the answers have a mean divergence
            from the adapter's (`ScaleByDivergence`); None leaves it.
        divergence: That divergence κ, nats a row.
    """

    name: ClassVar[str] = "laplace"
    structure: Literal["kron", "diag"] = "kron"
    predictive: Literal["linearised", "draws"] = "linearised"
    prior: float | Literal["marginal", "validation"] = "validation"
    rank: int = 10
    last_layers: int | None = None
    tokens: Literal["expand", "reduce"] = "expand"
    draws: int = 10
    samples: int | None = None
    scale: Literal["divergence"] | None = field(default=None, metadata=LATER)
    divergence: float = field(default=DIVERGENCE, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        for key, known in (
            ("structure", ("kron", "diag")),
            ("predictive", ("linearised", "draws")),
            ("tokens", ("expand", "reduce")),
        ):
            if getattr(self, key) not in known:
                raise InputError(f"Laplace's {key} is {' or '.join(known)}, and not {getattr(self, key)!r}")
        if isinstance(self.prior, str):
            if self.prior not in ("marginal", "validation"):
                raise InputError(f"Laplace's prior is a precision, 'marginal' or 'validation', and not {self.prior!r}")
        elif not 0 < self.prior < math.inf:
            raise InputError(f"the prior precision must be finite and positive, and it is {self.prior}")
        check_ranges(self, prefix="Laplace's ", at_least={"rank": 1, "draws": 1, "last_layers": 0, "samples": 0})
        check_scale(self.scale, self.divergence, "Laplace")

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse an adapter without a parameter to be uncertain about, and a task without rows; see `PostHoc.check`."""
        labelled(task.train, "Laplace takes the curvature on training rows")
        if self.prior == "validation":
            labelled(task.validation, "the prior is chosen on validation rows")
        if self.scale:
            self._search.check(model, task)
        self._sites(model)

    @property
    def _search(self) -> ScaleByDivergence:
        """The search by divergence, with as many draws of the weights."""
        return ScaleByDivergence(self.divergence, draws=self.draws)

    def _sites(self, model: nn.Module) -> list[Site]:
        """Return the parameters that are uncertain."""
        names = lora_parameters(model)
        keep = in_last_layers(names, self.last_layers) if self.last_layers is not None else names.__contains__
        sites = linear_sites(model, keep)
        if not sites:
            raise InputError(f"last_layers={self.last_layers} leaves Laplace no parameter; take more layers")
        return sites

    def _fit(self, adapter: TrainedAdapter) -> Linearised | KroneckerGaussian | DiagonalGaussian:
        """Return the Gaussian around the adapter."""
        model, train, mean, origin = adapter.model, adapter.task.train, adapter.start.mean, adapter.origin
        assert train is not None
        sites, samples = self._sites(model), self.samples_of(train)
        origin = replace(origin, settings={**origin.settings, "samples": samples})
        diagonal = self.structure == "diag"
        curvature = DiagonalCurvature(sites) if diagonal else KroneckerCurvature(sites, self.rank, self.tokens)
        log_likelihood = summed(adapter, curvature, samples)
        if self.prior == "validation":
            candidates = [curvature.posterior(mean, precision, origin) for precision in CANDIDATES]
            rows = self._judges(adapter, samples)
            if self.predictive == "draws":
                precision = _best([adapter.nll(posterior, rows, self.draws) for posterior in candidates])
            else:
                precision = _best(linearised_nlls(adapter, rows, candidates))
        elif self.prior == "marginal":
            precision = maximise_marginal_likelihood(curvature.spectra(), mean)
        else:
            precision = float(self.prior)
        evidence = log_likelihood + log_occam_factor(curvature.spectra(), mean, precision)
        of = f"{samples} sampled labels a row" if samples else "all labels"
        logger.info("Laplace: curvature of %s, prior precision %.4g, log evidence %.5g.", of, precision, evidence)
        posterior = curvature.posterior(mean, precision, origin)
        found = Linearised(posterior, origin) if self.predictive == "linearised" else posterior
        return self._search.scaled(adapter, found) if self.scale else found

    def samples_of(self, rows: Split) -> int:
        """Return how many labels are sampled for each row; 0 where all are taken."""
        most = max(len(example.choices) for example in rows)
        samples = (SAMPLES if most > MANY else 0) if self.samples is None else self.samples
        return samples if samples < most else 0

    def _judges(self, adapter: TrainedAdapter, samples: int) -> Split:
        """Return the validation rows that λ is judged on: with sampled labels no more passes than the curvature has."""
        rows = labelled(adapter.task.validation, "the prior is chosen on validation rows")
        if not samples or self.predictive == "draws":
            return rows
        most = max(len(example.choices) for example in rows)
        count = max(LEAST_JUDGES, samples * len(adapter.task.train or ()) // most)
        if count >= len(rows):
            return rows
        logger.info("Laplace: the prior precision is judged on %d of %d validation rows.", count, len(rows))
        picked = torch.randperm(len(rows), generator=generator(adapter.seed, "judges"))[:count]
        return rows.take(picked.sort().values.tolist())


def summed(adapter: TrainedAdapter, curvature: Curvature, samples: int) -> float:
    """Sum a curvature over the training rows, of sampled labels or, with 0, of all; return the log-likelihood."""
    model, train = adapter.model, adapter.task.train
    assert train is not None
    readout = readout_for(model, train, adapter.tokenizer)
    root = SampledRoot(len(train), samples, adapter.seed) if samples else ggn_root
    passes = samples or max(len(example.choices) for example in train)
    budget = gradient_budget(model, curvature.sites, adapter.token_budget, passes)
    rows, log_likelihood = readout.encode(train)[0], torch.zeros((), dtype=torch.float64)

    def add(numbers: Sequence[int]) -> None:
        """Add some of the rows."""
        with (
            swapped(model, adapter.start.mean),
            readout.attached(model),
            shown("curvature", len(numbers), adapter.progress) as done,
        ):
            batches = gradient_batches(model, readout, [rows[i] for i in numbers], budget, passes)
            numbered = [([numbers[i] for i in group], batch) for group, batch in batches]
            log_likelihood.add_(accumulated(model, curvature, numbered, train.labels, root, done))

    added_over_processes(add, [readout.length(row) for row in rows], lambda: [log_likelihood, *curvature.totals()])
    return float(log_likelihood)


def linearised_nlls(adapter: TrainedAdapter, rows: Split, candidates: Sequence[Linearisable]) -> list[float]:
    """Return the negative log-likelihood by the linearised model of each candidate, nats a row, in one pass."""
    model = adapter.model
    readout = readout_for(model, rows, adapter.tokenizer)
    encoded, classes = readout.encode(rows)[0], max(len(example.choices) for example in rows)
    totals, labels = torch.zeros(len(candidates), dtype=torch.float64), rows.labels

    def take(order: Sequence[int], logits: Tensor, covariances: Tensor) -> None:
        """Add the loss of some rows, by the same noise under every candidate."""
        contents = [encoded[row].content for row in order]
        for k, covariance in enumerate(covariances):
            draws = logit_draws(logits, covariance, contents, LOGIT_DRAWS, adapter.seed)
            totals[k] += len(order) * nll(average(draws.log_softmax(-1)), labels[order]).double()

    budget = gradient_budget(model, linear_sites(model), adapter.token_budget, classes)

    def add(numbers: Sequence[int]) -> None:
        """Add the losses of some of the rows."""
        with (
            swapped(model, candidates[0].mean),
            readout.attached(model),
            shown("prior precision", len(numbers), adapter.progress) as done,
        ):
            batches = gradient_batches(model, readout, [encoded[i] for i in numbers], budget, classes)
            numbered = [([numbers[i] for i in group], batch) for group, batch in batches]
            logit_moments(model, candidates, numbered, budget, take, done)

    added_over_processes(add, [readout.length(row) for row in encoded], lambda: [totals])
    return [float(total) / len(rows) for total in totals]


def _best(scores: Sequence[float]) -> float:
    """Return the one of `CANDIDATES` with the lowest score, the first of several."""
    best = min(range(len(scores)), key=lambda k: (scores[k], k))
    if not math.isfinite(scores[best]):
        raise InputError("no prior precision gives finite predictions; the model's output overflows")
    return CANDIDATES[best]


def log_occam_factor(spectra: Spectra, mean: Params, precision: float) -> float:
    """Return log Z − log p(D|θ̂) = −½ λ|θ̂|² + ½ P log λ − ½ log det(H + λI) in nats, over the spectra's parameters."""
    log_det = sum(float((often * (values + precision).log()).sum()) for values, often in spectra.values())
    square = sum(float(mean[name].double().square().sum()) for name in spectra)
    size = sum(mean[name].numel() for name in spectra)
    return 0.5 * (size * math.log(precision) - precision * square - log_det)


def maximise_marginal_likelihood(spectra: Spectra, mean: Params) -> float:
    """Return the prior precision λ with the largest evidence; see `log_occam_factor`."""
    low, high = LOG_PRECISIONS
    log_precision = smallest(lambda x: -log_occam_factor(spectra, mean, math.exp(x)), low, high)
    if log_precision in (low, high):
        reason = "the loss has no curvature" if log_precision == low else "every parameter is zero"
        raise InputError(
            f"the evidence has no maximum at a positive and finite prior precision ({reason}); train longer, or give "
            "Laplace(prior=...) a number or 'validation'"
        )
    return math.exp(log_precision)
