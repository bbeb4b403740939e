"""Prediction from the model linearised in its parameters: the choices' logits are normal, in closed form.

f ~ N(f(θ̂), J Σ Jᵀ) for each example by itself, with J [C P] the Jacobian of its C logits. One forward pass and C
backward passes serve any number of posteriors around the same mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.posteriors.linearised import Linearisable
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.jacobians import differentiated, linear_sites
from bayeslora.prediction.memory import default_token_budget
from bayeslora.tasks.types import Split


def gradient_budget(model: nn.Module, token_budget: int | None, split: Split) -> int:
    """Return the most tokens of a batch that is differentiated: the gradients of all choices are held at once."""
    most = token_budget or default_token_budget(model, gradients=True)
    return max(1, most // max(len(example.choices) for example in split))


def logit_moments(
    model: nn.Module,
    posteriors: Sequence[Linearisable],
    batches: Sequence[tuple[list[int], Batch]],
    examples: int,
    done: Callable[[int], object] = lambda _: None,
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "K N C C"]]:
    """Return mean and covariance of the logits, float32 on the CPU, under each of several posteriors of one mean.

    The readout is attached and the mean applied. ``batches`` have the numbers of their examples; ``done`` is told how
    many have passed. Logits are minus infinity for choices that an example does not have.
    """
    noisy = posteriors[0].noisy
    sites = linear_sites(model, lambda name: name in noisy)
    logits = torch.full((examples, 0), -torch.inf)
    covariances = torch.zeros(len(posteriors), examples, 0, 0)
    with differentiated(model, sites) as gradients_of:
        for order, batch in batches:
            gradients = gradients_of(batch)
            classes = gradients.logits.shape[1]
            if (more := classes - logits.shape[1]) > 0:
                logits = nn.functional.pad(logits, (0, more), value=-torch.inf)
                covariances = nn.functional.pad(covariances, (0, more, 0, more))
            covariance = gradients.logits.new_zeros(len(posteriors), len(order), classes, classes)
            for site in sites:
                covariance += _covariances(gradients.jacobian(site), posteriors, site.name).to(covariance.device)
            logits[order, :classes] = gradients.logits.cpu()
            covariances[:, order, :classes, :classes] = covariance.cpu()
            done(len(order))
    return logits, covariances


def _covariances(
    jacobian: Float[Tensor, "C N O I"], posteriors: Sequence[Linearisable], name: str
) -> Float[Tensor, "K N C C"]:
    """Return J Σ Jᵀ of one parameter under each posterior; those that have a projection of J in common share it."""
    first = {posterior.projection(name): posterior for posterior in reversed(posteriors)}
    projected = {key: posterior.projected(name, jacobian) for key, posterior in first.items()}
    return torch.stack([p.covariance(name, projected[p.projection(name)]) for p in posteriors])
