"""What is made of the logits of one pass under several draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.prediction.batching import Batch


@final
@dataclass(frozen=True)
class Reading:
    """What is made of the logits of one pass.

    ``read`` is given the logits of S stacked draws, the batch as it is for one draw, S, and the numbers of the batch's
    B examples (none in a trial), and returns the answers [S B C].
    """

    read: Callable[[Tensor, Batch, int, Sequence[int]], Tensor]
    dtype: torch.dtype = torch.float32
    across_draws: bool = False  # it looks at all draws of a batch together, so they come before the next batch
    item: str = "example"  # what one is called in an error


def _scores(logits: Tensor, batch: Batch, count: int, examples: Sequence[int]) -> Float[Tensor, "S B C"]:
    """Return each draw's logits in float32."""
    return logits.float().view(count, -1, logits.shape[-1])


def _log_probs(logits: Tensor, batch: Batch, count: int, examples: Sequence[int]) -> Float[Tensor, "S B C"]:
    """Return each draw's log-probabilities of the choices."""
    return _scores(logits, batch, count, examples).log_softmax(-1)


LOG_PROBS = Reading(_log_probs)
SCORES = Reading(_scores)
"""The model's outputs as they are: of choices before their softmax."""
REWARDS = Reading(_scores, item="text")
