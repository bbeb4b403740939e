"""Prediction from the model linearised in its parameters: the choices' logits are normal, in closed form.

f ~ N(f(θ̂), J Σ Jᵀ) for each example by itself, with J [C P] the Jacobian of its C logits. One forward pass and C
backward passes serve any number of posteriors around the same mean. The passes are batch by batch, and where even one
example's classes are too many to be held at once, pair by pair of parts of them: memory grows neither with the examples
nor with the square of the classes beyond what is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.params import device_of
from bayeslora.posteriors.engine import Take
from bayeslora.posteriors.linearised import Linearisable
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.jacobians import Pass, Site, differentiated, each_class, linear_sites
from bayeslora.prediction.memory import CPU_BUDGET, default_token_budget
from bayeslora.prediction.passes import batched
from bayeslora.prediction.readouts import Readout

GRADIENT_BYTES = 2**28
"""What the gradients of a batch at the layers' outputs may take on a CPU: 256 MiB."""


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
    done: Callable[[int], object] = lambda _: None,
) -> None:
    """Give mean and covariance of the logits, float32 on the CPU, under each of several posteriors of one mean.

    The readout is attached and the mean applied. ``batches`` have the numbers of their examples; ``done`` is told how
    many have passed. Logits are minus infinity for choices that an example does not have. ``budget`` is the most tokens
    of a batch times classes whose gradients are held at once.
    """
    noisy = posteriors[0].noisy
    sites = linear_sites(model, lambda name: name in noisy)
    with differentiated(model, sites) as passed:
        for order, batch in batches:
            at_once = max(2, budget // batch["input_ids"].numel())
            take(order, *_moments(passed(batch), posteriors, sites, at_once))
            done(len(order))


def _moments(
    one: Pass, posteriors: Sequence[Linearisable], sites: Sequence[Site], at_once: int
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "K B C C"]]:
    """Return the moments of one batch; the gradients of so many classes are held at once."""
    logits, along = one.logits, each_class(one.logits)
    classes = logits.shape[1]
    covariance = logits.new_zeros(len(posteriors), len(logits), classes, classes)
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


def _covariances(
    jacobian: Float[Tensor, "C N O I"], posteriors: Sequence[Linearisable], name: str
) -> Float[Tensor, "K N C C"]:
    """Return J Σ Jᵀ of one parameter under each posterior; those that have a projection of J in common share it."""
    groups: dict[Hashable, list[int]] = {}
    for k, posterior in enumerate(posteriors):
        groups.setdefault(posterior.projection(name), []).append(k)
    found: list[Tensor] = [jacobian] * len(posteriors)
    for numbers in groups.values():
        group = [posteriors[k] for k in numbers]
        covariances = group[0].covariances(name, group[0].projected(name, jacobian), group)
        for k, covariance in zip(numbers, covariances, strict=True):
            found[k] = covariance
    return torch.stack(found)
