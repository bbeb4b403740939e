"""Prediction from the model linearised in its parameters: the choices' logits are normal, in closed form.

f ~ N(f(θ̂), J Σ Jᵀ) for each example by itself, with J [C P] the Jacobian of its C logits. One forward pass and C
backward passes serve any number of posteriors around the same mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.params import generator
from bayeslora.posteriors import DiagonalGaussian, KroneckerGaussian
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.jacobians import differentiated, linear_sites
from bayeslora.prediction.memory import default_token_budget
from bayeslora.tasks.types import Split

LOGIT_DRAWS = 256
"""Least draws of a linearised posterior's logits: they cost next to nothing, and a few would decide by their noise."""
Gaussian = DiagonalGaussian | KroneckerGaussian


def gradient_budget(model: nn.Module, token_budget: int | None, split: Split) -> int:
    """Return the most tokens of a batch that is differentiated: the gradients of all choices are held at once.

    Args:
        model: PEFT model.
        token_budget: Most tokens of a batch that is only predicted; None for what the model's device has memory for,
            2048 on a CPU.
        split: The examples.

    Returns:
        The budget divided by the number of choices, at least 1.
    """
    most = token_budget or default_token_budget(model, gradients=True)
    return max(1, most // max(len(example.choices) for example in split))


def logit_moments(
    model: nn.Module,
    posteriors: Sequence[Gaussian],
    batches: Sequence[tuple[list[int], Batch]],
    examples: int,
    done: Callable[[int], object] = lambda _: None,
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "K N C C"]]:
    """Return mean and covariance of the logits under each of several posteriors with the same mean.

    Args:
        model: PEFT model with the readout attached and the posteriors' mean applied.
        posteriors: K Gaussians over the same parameters.
        batches: Indices of the examples, and the batch.
        examples: Number N of examples.
        done: Told how many examples have passed.

    Returns:
        Logits, minus infinity for choices that an example does not have, and their covariances, float32 on the CPU.
    """
    first = posteriors[0]
    noisy = first.variance if isinstance(first, DiagonalGaussian) else first.strength
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
            found = gradients.logits.new_zeros(len(posteriors), len(order), classes, classes)
            for site in sites:
                found += _quadratics(gradients.jacobian(site), posteriors, site.name).to(found.device)
            logits[order, :classes] = gradients.logits.cpu()
            covariances[:, order, :classes, :classes] = found.cpu()
            done(len(order))
    return logits, covariances


def _quadratics(
    jacobian: Float[Tensor, "C N O I"], posteriors: Sequence[Gaussian], name: str
) -> Float[Tensor, "K N C C"]:
    """Return J Σ Jᵀ of one parameter under each posterior; those that differ in λ alone share the projection of J."""
    found, shared = [], dict[tuple[object, ...], Tensor]()
    for posterior in posteriors:
        if isinstance(posterior, DiagonalGaussian):
            own = posterior.variance[name].to(jacobian).view(jacobian.shape[2:])
            found.append(torch.einsum("cnoi,dnoi->ncd", jacobian * own, jacobian))
            continue
        strength = posterior.strength[name]
        sides = id(posterior.left_vectors[name]), id(posterior.right_vectors[name])
        key = (*sides, id(strength) if strength.ndim else float(strength))
        if key not in shared:
            shared[key] = posterior.projected(name, jacobian)
        found.append(posterior.covariance(name, shared[key]))
    return torch.stack(found)


def logit_draws(
    logits: Float[Tensor, "N C"], covariances: Float[Tensor, "N C C"], draws: int, seed: int
) -> Float[Tensor, "S N C"]:
    """Return draws of normal logits.

    Args:
        logits: Means; minus infinity for choices that an example does not have.
        covariances: Covariances.
        draws: Number S of draws.
        seed: Which stream of draws.

    Returns:
        Draw k of example n depends on seed, k and n only.
    """
    values, vectors = torch.linalg.eigh(covariances.double())
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    noise = torch.stack([torch.randn(logits.shape, generator=generator(seed, k, "logits")) for k in range(draws)])
    return logits + torch.einsum("ncd,snd->snc", root, noise.double()).float()
