"""Scale by divergence: the noise that moves the answers a stated distance from those of the trained adapter.

For a posterior with covariance Σ it is the largest s with

    mean_x KL( p_0(·|x) ‖ p̄_s(·|x) ) = κ

p̄_s: the average of the draws' probabilities under the covariance s²Σ; p_0: the same without noise, which is the trained
adapter (MAP) or, for a mixture, the average over its members; x: anchors, whose labels are not looked at. Draw k has
the same random numbers at every s, so that the divergence is a smooth function of s; s is bracketed by doubling or
halving 1 and then bisected on a logarithmic scale. The idea is that of τ in Seq-LoRA (2026).

What is ours: it holds for every posterior that can be tempered, what is visited is checked to rise, and κ has one
default for all methods, found on validation rows of two tasks (docs/methods/divergence.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar, cast, final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.methods.base import PostHoc, TrainedAdapter, check_ranges
from bayeslora.methods.search import anchored, largest
from bayeslora.metrics.uncertainty import divergences
from bayeslora.posteriors import Posterior
from bayeslora.posteriors.transforms import tempered
from bayeslora.tasks.types import Split, Task

logger = logging.getLogger(__name__)
P = TypeVar("P", bound=Posterior)

DIVERGENCE = 0.1
"""The default of κ, nats a row: see docs/methods/divergence.md."""
NOTE = "scaled by divergence"
"""The setting of a posterior's origin that says how its scale was found."""
_TINY = 1e-30
"""Least probability that is left where one draw is taken out of a sum."""
_ERRORS = 3.0
"""Standard errors by which the divergence must fall as the scale rises before it is worth a warning."""


@final
@dataclass(frozen=True)
class ScaleByDivergence(PostHoc[Posterior]):
    """A posterior's noise scaled so that the draws' answers differ from the trained adapter's by so much on average.

    It is fitted to any posterior with noise in its weights: ``ScaleByDivergence().fit(model, task, start=posterior)``.

    Attributes:
        divergence: The mean divergence κ of the draws' average from the answers without noise, nats a row.
        anchors: Which rows it is taken on, ``validation`` or ``train``; their labels are not looked at. None for
            validation rows where the task has some, else training rows.
        most_anchors: Most rows of them; if there are more, the seed decides which.
        draws: Draws by which a scale is judged.
        steps: Halvings of the bracket around the scale, on a logarithmic scale from a factor of 2.
    """

    name: ClassVar[str] = "divergence"
    divergence: float = DIVERGENCE
    anchors: Literal["validation", "train"] | None = None
    most_anchors: int = 200
    draws: int = 10
    steps: int = 5

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.anchors not in (None, "train", "validation"):
            raise InputError(f"anchors are 'validation' or 'train' rows, or None, and not {self.anchors!r}")
        check_ranges(self, positive=("divergence",), at_least={"most_anchors": 1, "draws": 1, "steps": 0})

    def check(self, model: nn.Module, task: Task) -> None:
        """Refuse a task without anchors; see `PostHoc.check`."""
        self.rows(task)

    def rows(self, task: Task) -> Split:
        """Return the rows that anchors are taken from.

        Args:
            task: The task.

        Returns:
            The split, labelled or not.

        Raises:
            InputError: If the task has no such rows.
        """
        splits = {"validation": task.validation, "train": task.train}
        for name in (self.anchors,) if self.anchors else splits:
            split = splits[name]
            if split is not None and len(split):
                return split
        wanted = self.anchors or "validation or training"
        raise InputError(f"the divergence is taken on {wanted} rows, and the task has none; give some, labelled or not")

    def _fit(self, adapter: TrainedAdapter) -> Posterior:
        """Return the posterior that was given, at the scale."""
        return self.scaled(adapter, adapter.start)

    def scaled(self, adapter: TrainedAdapter, posterior: P) -> P:
        """Return a posterior with its covariance multiplied by the square of the scale, which its origin notes.

        Args:
            adapter: Model, task and seed.
            posterior: The posterior; it need not be the adapter's ``start``.

        Returns:
            A posterior of the same family.

        Raises:
            InputError: If it has no noise that can be scaled, or no scale gives the divergence.
        """
        rows = anchored(self.rows(adapter.task), self.most_anchors, adapter.seed)
        scale, reached = _found(self, adapter, posterior, rows)
        logger.info("Scale by divergence: %.4g; %.4g nats a row on %d anchors.", scale, reached, len(rows))
        note = {"divergence": self.divergence, "scale": scale, "anchors": rows.name, "draws": self.draws}
        origin = posterior.origin or adapter.origin
        origin = replace(origin, settings={**origin.settings, NOTE: note})
        found = tempered(posterior, scale**2)
        return cast(P, replace(found, origin=origin))  # type: ignore[type-var]  # every family is a dataclass


def scalable(posterior: Posterior) -> bool:
    """Return whether a posterior has noise in its weights that can be scaled, and no temperature on its answers."""
    unscaled = posterior.unscaled is posterior
    return unscaled and posterior.distinct is None and posterior.rescaled(lambda name, p: 1.0) is not None


def check_scale(scale: object, divergence: float, name: str) -> None:
    """Refuse other words for a method's scale than ``divergence``, and a divergence that cannot be."""
    if scale not in (None, "divergence"):
        raise InputError(f"{name}'s scale is 'divergence' or None, and not {scale!r}")
    if not 0 < divergence < math.inf:
        raise InputError(f"{name}'s divergence must be finite and positive, and it is {divergence}")


@dataclass(frozen=True)
class _Visit:
    """The mean divergence at a scale, and what it is without each of the draws in turn."""

    divergence: float
    without: Float[Tensor, " S"]


def _found(
    method: ScaleByDivergence, adapter: TrainedAdapter, posterior: Posterior, rows: Split
) -> tuple[float, float]:
    """Return the scale, and the divergence there."""
    _check_noise(posterior)
    without_noise, answers = _answers(adapter, posterior, rows, method.draws)
    visits: dict[float, _Visit] = {}
    asked = method.divergence

    def within(scale: float) -> bool:
        """Return whether the divergence at a scale is at most what is asked for."""
        visits[scale] = visit = _visit(without_noise, answers(scale))
        before = visits.get(scale / 8)
        if before is not None and 0.01 * asked < visit.divergence <= 1.01 * before.divergence:  # it rises no more
            raise InputError(out_of_reach())
        return visit.divergence <= asked

    def out_of_reach() -> str:
        """Return why no scale gives the divergence."""
        most = max(visit.divergence for visit in visits.values())
        return (
            f"no scale of the noise moves the answers to {rows.name} by {asked:g} nats a row; the furthest is "
            f"{most:.2g}: ask for less, or take anchors whose answers depend on the parameters that have noise"
        )

    scale = largest(
        within, method.steps, 1.0, unbounded=out_of_reach,
        nowhere=lambda: f"no scale of the noise brings the divergence down to {asked:g} nats a row; ask for more",
    )  # fmt: skip
    _warn_unless_rising(visits, method.divergence)
    return scale, visits[scale].divergence


def _check_noise(posterior: Posterior) -> None:
    """Refuse a posterior whose noise cannot be scaled."""
    kind = type(posterior).__name__
    if posterior.unscaled is not posterior:
        raise InputError(
            "the posterior's log-probabilities are scaled, by numbers that were fitted to the noise that it has; scale "
            "its noise first, and fit a temperature to what comes of it"
        )
    if posterior.distinct is not None:
        raise InputError(
            f"a {kind} of {posterior.distinct} has no noise to scale; give a posterior with noise, or fit it to the "
            "adapter: Tfb(scale='divergence') or Isotropic(scale='divergence')"
        )


def _answers(
    adapter: TrainedAdapter, posterior: Posterior, rows: Split, draws: int
) -> tuple[Float[Tensor, "N C"], Callable[[float], Float[Tensor, "S N C"]]]:
    """Return the answers without noise, and those of the draws by scale, as log-probabilities."""
    if posterior.noise_in_logits:  # then one prediction has them all
        prediction = adapter.predict(posterior, rows, draws)
        assert prediction.mean_log_probs is not None
        mean = prediction.mean_log_probs
        noise = (prediction.log_probs - mean).masked_fill(torch.isneginf(mean), 0.0)
        return mean, lambda scale: (mean + scale * noise).log_softmax(-1)
    mean = adapter.predict(tempered(posterior, 0.0), rows, 1, mean=False).log_p
    return mean, lambda scale: adapter.predict(tempered(posterior, scale**2), rows, draws, mean=False).log_probs


def _visit(without_noise: Float[Tensor, "N C"], log_probs: Float[Tensor, "S N C"]) -> _Visit:
    """Return the mean divergence of the draws' average from the answers without noise; infinite if not finite."""
    log_p, probs = without_noise.double(), log_probs.double().exp()
    total, count = probs.sum(0), len(probs)
    value = float(divergences(log_p, (total / count).log()).mean())
    others = [torch.zeros((), dtype=torch.float64)]
    if count > 1:
        rest = ((total - each).clamp_min(_TINY) / (count - 1) for each in probs)
        others = [divergences(log_p, p.log()).mean() for p in rest]
    return _Visit(max(0.0, value) if math.isfinite(value) else math.inf, torch.stack(others))


def _warn_unless_rising(visits: dict[float, _Visit], divergence: float) -> None:
    """Warn if the divergence falls as the scale rises, by more than comes of having so few draws."""
    finite = [(s, v) for s, v in sorted(visits.items()) if math.isfinite(v.divergence)]
    for k, (scale, visit) in enumerate(finite):
        for larger, later in finite[k + 1 :]:
            fall = visit.divergence - later.divergence
            each = visit.without - later.without
            error = math.sqrt((len(each) - 1) / len(each) * float((each - each.mean()).square().sum()))  # jackknife
            if fall > max(_ERRORS * error, 0.01 * divergence):
                logger.warning(
                    "Scale by divergence: it falls from %.3g to %.3g nats a row where the scale rises from %.3g to "
                    "%.3g, and the smallest scale that was found to reach %.3g is taken; more draws or more anchors "
                    "may tell better.",
                    visit.divergence, later.divergence, scale, larger, divergence,
                )  # fmt: skip
                return
