"""Prediction from the model linearised in its parameters: the choices' logits are normal, in closed form.

f ~ N(f(θ̂), J Σ Jᵀ) for each example by itself, with J [C P] the Jacobian of its C logits. One forward pass and C
backward passes serve any number of posteriors around the same mean. The passes are batch by batch, and where even one
example's classes are too many to be held at once, pair by pair of parts of them: memory grows neither with the examples
nor with the square of the classes beyond what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Int
from bayeslora.params import device_of
from bayeslora.posteriors.base import Take
from bayeslora.posteriors.linearised import Linearisable
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.jacobians import Pass, Site, differentiated, each_class, linear_sites
from bayeslora.prediction.memory import CPU_BUDGET, default_token_budget
from bayeslora.prediction.passes import batched
from bayeslora.prediction.readouts import Readout

GRADIENT_BYTES = 2**28
"""What the gradients of a batch at the layers' outputs may take on a CPU: 256 MiB."""
COARSE = 16
"""Classes of an example that a coarse look tells apart; the others are one class together."""

Coarsen = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]
"""Makes K logits [N K] of the C of some examples, by their numbers, and gives their directions [N C K]."""


def gradient_budget(model: nn.Module, sites: Sequence[Site], token_budget: int | None, directions: int) -> int:
    """Return the most tokens of a batch times the directions, of so many, that it is differentiated along at once."""
    if token_budget is not None:
        return token_budget
    if device_of(model).type == "cuda":
        return default_token_budget(model, gradients=True)
    outputs = {site.module: site.module.weight.shape[0] for site in sites if isinstance(site.module, nn.Linear)}
    room = max(CPU_BUDGET, GRADIENT_BYTES // (4 * max(1, sum(outputs.values()))))
    return min(room, CPU_BUDGET * directions)


def gradient_batches(
    model: nn.Module, readout: Readout, rows: Sequence[Encoded], budget: int, directions: int
) -> list[tuple[list[int], Batch]]:
    """Return examples in batches to be differentiated along so many directions; see `gradient_budget`."""
    return batched(model, readout, rows, max(1, budget // directions))


def logit_moments(
    model: nn.Module,
    posteriors: Sequence[Linearisable],
    batches: Sequence[tuple[list[int], Batch]],
    budget: int,
    take: Take,
    coarsen: Coarsen | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Give mean and covariance of the logits, float32 on the CPU, under each of several posteriors of one mean.

    The readout is attached and the mean applied. ``batches`` have the numbers of their examples; ``done`` is told how
    many have passed. Logits are minus infinity for choices that an example does not have. ``budget`` is the most tokens
    of a batch times classes whose gradients are held at once. ``coarsen`` may join classes.
    """
    noisy = posteriors[0].noisy
    sites = linear_sites(model, lambda name: name in noisy)
    with differentiated(model, sites) as passed:
        for order, batch in batches:
            at_once = max(2, budget // batch["input_ids"].numel())
            take(order, *_moments(passed(batch), posteriors, sites, order, at_once, coarsen))
            done(len(order))


def _moments(
    one: Pass,
    posteriors: Sequence[Linearisable],
    sites: Sequence[Site],
    order: Sequence[int],
    at_once: int,
    coarsen: Coarsen | None,
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "K B C C"]]:
    """Return the moments of one batch; the gradients of so many classes are held at once."""
    logits, along = (one.logits, each_class(one.logits)) if coarsen is None else coarsen(one.logits, order)
    classes = logits.shape[1]
    covariance = logits.new_zeros(len(posteriors), len(order), classes, classes)
    for part in _parts(classes, at_once):
        gradients, places = one.along(along[..., part]), torch.tensor(part, device=logits.device)
        found = covariance.new_zeros(*covariance.shape[:2], len(part), len(part))
        for site in sites:
            found += _covariances(gradients.jacobian(site), posteriors, site.name).to(found.device)
        covariance[:, :, places[:, None], places] = found
    return logits.cpu(), covariance.cpu()


def _parts(classes: int, at_once: int) -> list[list[int]]:
    """Return sets of at most so many classes in which every two of them meet: all, or pairs of halves of a set."""
    if classes <= at_once:
        return [list(range(classes))]
    size = at_once // 2
    blocks = [list(range(start, min(start + size, classes))) for start in range(0, classes, size)]
    return [[*one, *other] for one, other in combinations(blocks, 2)]


def coarse(labels: Int[Tensor, " N"], classes: int = COARSE) -> Coarsen:
    """Return what keeps an example's most probable classes and its label apart, and joins the others.

    The joint class has the log of their summed probabilities, and its derivative: what an example says about its label
    is as before, and what the others do to each other is left out.
    """

    def join(logits: Float[Tensor, "N C"], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the classes' logits with the others' last, and their directions."""
        if logits.shape[1] <= classes + 1:
            return logits, each_class(logits)
        first = logits.scatter(1, labels[rows].to(logits.device)[:, None], math.inf).topk(classes).indices
        others = logits.scatter(1, first, -math.inf)
        shares = others.softmax(1).nan_to_num(0.0)  # an example may have no others
        along = torch.cat([nn.functional.one_hot(first, logits.shape[1]).mT.to(shares), shares[..., None]], 2)
        return torch.cat([logits.gather(1, first), others.logsumexp(1, keepdim=True)], 1), along

    return join


def _covariances(
    jacobian: Float[Tensor, "C N O I"], posteriors: Sequence[Linearisable], name: str
) -> Float[Tensor, "K N C C"]:
    """Return J Σ Jᵀ of one parameter under each posterior; those that have a projection of J in common share it."""
    first = {posterior.projection(name): posterior for posterior in reversed(posteriors)}
    projected = {key: posterior.projected(name, jacobian) for key, posterior in first.items()}
    return torch.stack([p.covariance(name, projected[p.projection(name)]) for p in posteriors])
