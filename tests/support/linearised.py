"""What the linearised prediction's batches come to, put together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.prediction.linearised import logit_moments


def moments_of(
    model: nn.Module, posteriors: Sequence[Any], batches: Sequence[Any], examples: int, budget: int = 10**6
) -> tuple[Tensor, Tensor]:
    """Return the logits [N C] of all examples, and their covariances [K N C C] under each posterior."""
    parts: list[Any] = []
    logit_moments(model, posteriors, batches, budget, lambda *part: parts.append(part))
    classes = max(logits.shape[1] for _, logits, _ in parts)
    whole = torch.full((examples, classes), -torch.inf)
    covariances = torch.zeros(len(posteriors), examples, classes, classes)
    for rows, logits, covariance in parts:
        size = logits.shape[1]
        whole[rows, :size] = logits
        covariances[:, rows, :size, :size] = covariance
    return whole, covariances
