"""Training-Free Bayesianization: the largest noise scale within a loss tolerance (Shi et al. 2024, arXiv 2412.05723).

B = U diag(d) Vᵀ, B' = U diag(d), A' = VᵀA, so that B'A' = BA; A' ~ N(VᵀA, Ω²) with Ω_ij = σ/d_i. The update BA then has
the covariance σ² I ⊗ UUᵀ: isotropic noise in the column space of B. σ is the largest with

    |ℓ(σ) − ℓ(0)| ≤ tolerance · max( ℓ(0), floor ),  floor = log 2

with ℓ(σ) the negative log-likelihood of the draws' average probabilities on anchor rows, per row. As in the released
code the labels are the adapter's own answers without noise: no row needs a label, and noise can only cost. Against the
true labels it helps an over-confident adapter, and the loss does not say how much of it the adapter bears.

What differs, and why: docs/methods/tfb.md. The paper has no floor, which a saturated adapter needs; the released
code's tolerance is wider, and the upper end of its search holds its σ. Where d_i is zero to rounding, no noise on A can
reach BA, and that row has none.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, final

import torch
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import LATER, PostHoc, TrainedAdapter, check_ranges
from bayeslora.methods.divergence import DIVERGENCE, ScaleByDivergence, check_scale
from bayeslora.methods.guards import plain_layers
from bayeslora.methods.search import anchored, largest
from bayeslora.params import Params
from bayeslora.posteriors import DiagonalGaussian, Point, Posterior
from bayeslora.posteriors.provenance import Origin
from bayeslora.tasks.types import Split, Task, labelled

logger = logging.getLogger(__name__)
_FIRST = {"pseudo": 1e-2, "true": 1e-4}
"""Noise at which the search begins; against true labels the loss may fall before it rises, so it comes from below."""


@final
@dataclass(frozen=True)
class Tfb(PostHoc[DiagonalGaussian]):
    """The largest isotropic noise on BA within a tolerance of the loss.

    Attributes:
        tolerance: Relative change of the anchors' loss that is borne; .003 in the paper.
        anchors: Which rows the loss is taken on: ``train`` or ``validation``. They need no labels.
        most_anchors: Most rows of them; if there are more, the seed decides which.
        draws: Draws by which a σ is judged.
        steps: Halvings of the bracket around σ, on a logarithmic scale from a factor of 2.
        sigma: σ itself, without a search.
        labels: What the loss is taken against: ``pseudo``, the adapter's own answers without noise, or ``true``, the
            rows' labels.
        floor: Least loss that the tolerance is relative to, in nats a row; 0 for the adapter's own whatever it is, as
            in the paper.
        scale: What holds the noise: None for the tolerance of the loss, ``divergence`` for the mean divergence of the
            draws from the adapter, on validation rows where there are some (`ScaleByDivergence`). Then ``tolerance``,
            ``anchors``, ``labels`` and ``floor`` do not matter.
        divergence: That divergence κ, nats a row.
    """

    name: ClassVar[str] = "tfb"
    tolerance: float = 0.003
    anchors: Literal["train", "validation"] = "train"
    most_anchors: int = 500
    draws: int = 10
    steps: int = 5
    sigma: float | None = None
    labels: Literal["pseudo", "true"] = "pseudo"
    floor: float = math.log(2)
    scale: Literal["divergence"] | None = field(default=None, metadata=LATER)
    divergence: float = field(default=DIVERGENCE, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.anchors not in ("train", "validation"):
            raise InputError(f"TFB's anchors are 'train' or 'validation' rows, and not {self.anchors!r}")
        if self.labels not in _FIRST:
            raise InputError(f"TFB's labels are 'pseudo' or 'true', and not {self.labels!r}")
        check_ranges(self, at_least={"most_anchors": 1, "draws": 1, "steps": 0})
        check_ranges(self, prefix="TFB's ", positive=("tolerance", "sigma"), not_negative=("floor",))
        check_scale(self.scale, self.divergence, "TFB")
        if self.scale and self.sigma is not None:
            raise InputError("TFB's noise is found by divergence or given as sigma; give one of the two")

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse other adapters than plain LoRA, and a task without anchors; see `PostHoc.check`."""
        plain_layers(model, "TFB")
        if self.scale:
            self._search.check(model, task)
        elif self.sigma is None:
            self._rows(task)

    @property
    def _search(self) -> ScaleByDivergence:
        """The search by divergence, with as many rows, draws and steps."""
        return ScaleByDivergence(self.divergence, most_anchors=self.most_anchors, draws=self.draws, steps=self.steps)

    def _rows(self, task: Task) -> Split:
        """Return the rows that anchors are taken from."""
        split = task.train if self.anchors == "train" else task.validation
        purpose = f"TFB searches its noise on {self.anchors} rows"
        if self.labels == "true":
            return labelled(split, purpose)
        if split is None or not len(split):
            raise InputError(f"{purpose}, and the task has none; give data with that split, labelled or not")
        return split

    def _fit(self, adapter: TrainedAdapter) -> DiagonalGaussian:
        """Return the noisy adapter."""
        mean, unit = reparametrised(adapter.start.mean)
        origin = adapter.origin
        if self.scale:
            return self._search.scaled(adapter, _noisy(mean, unit, _FIRST["pseudo"], origin))
        if self.sigma is not None:
            return _noisy(mean, unit, self.sigma, origin)
        point = Point(mean, origin)
        rows = anchored(self._rows(adapter.task), self.most_anchors, adapter.seed)
        if self.labels == "pseudo":
            rows = answered(adapter, rows, point)
        loss = adapter.nll(point, rows, 1)
        change = self.tolerance * max(loss, self.floor)

        def within(sigma: float) -> bool:
            """Return whether the loss stays within what is borne."""
            return abs(adapter.nll(_noisy(mean, unit, sigma, origin), rows, self.draws) - loss) <= change

        sigma = largest(
            within,
            self.steps,
            _FIRST[self.labels],
            unbounded=lambda: "TFB found no noise that the anchors' loss notices; the adapter does not matter to it",
            nowhere=lambda: "TFB found no noise that the anchors' loss bears; raise the tolerance or the floor",
        )
        logger.info("TFB: sigma %.4g with %d anchors, loss %.4g, change at most %.4g.", sigma, len(rows), loss, change)
        return _noisy(mean, unit, sigma, origin)


def answered(adapter: TrainedAdapter, rows: Split, posterior: Posterior) -> Split:
    """Return rows with a posterior's most probable choices, of one draw, as their labels."""
    choices = adapter.predict(posterior, rows, 1).answer.tolist()
    examples = tuple(replace(example, label=k) for example, k in zip(rows, choices, strict=True))
    return replace(rows, examples=examples)


def reparametrised(params: Params) -> tuple[Params, Params]:
    """Return the adapter with B = U diag(d) and A = VᵀA, and for each A the deviations 1/d_i that σ = 1 gives."""
    mean, unit = dict(params), {}
    for name in params:
        if not name.endswith("lora_A.weight"):
            continue
        of_b = name.replace("lora_A.weight", "lora_B.weight")
        a, b = params[name].double(), params[of_b].double()
        u, d, vt = torch.linalg.svd(b, full_matrices=True)
        rank = len(d)
        mean[name] = (vt @ a).float()
        mean[of_b] = torch.cat([u[:, :rank] * d, b.new_zeros(len(b), b.shape[1] - rank)], 1).float()
        deviation = b.new_zeros(b.shape[1])
        nonzero = d > d.max() * max(b.shape) * torch.finfo(torch.float32).eps
        deviation[:rank][nonzero] = 1 / d[nonzero]
        unit[name] = deviation[:, None].expand(a.shape).float().contiguous()
    if not any(bool(v.any()) for v in unit.values()):
        raise InputError("every B of the adapter is zero, so that it is not trained; TFB needs a trained adapter")
    return mean, unit


def _noisy(mean: Params, unit: Params, sigma: float, origin: Origin) -> DiagonalGaussian:
    """Return the posterior with a σ."""
    return DiagonalGaussian(mean, {name: (sigma * v).square() for name, v in unit.items()}, origin)
