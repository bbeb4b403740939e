"""Rows over several processes: each passes its share of them, and all get the answers of all, in order, or the sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayeslora._typing import Float
from bayeslora.processes import everywhere, own, share, summed

Answers = tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"] | None, Float[Tensor, "N C"] | None]
"""The log-probabilities of the draws, and those at the mean and of the base if they are asked for."""


def over_processes(answers: Callable[[Sequence[int]], Answers], lengths: Sequence[int]) -> Answers:
    """Return the answers to N rows of these lengths, each process asking for its share of them inside `sharded`.

    ``answers`` returns [S n C], and [n C] at the mean and of the base, for the numbers of n rows. Processes that took
    fewer draws, under a tolerance, count as having left the others out.
    """
    parts = share(lengths)
    if parts is None:
        return answers(range(len(lengths)))
    found = everywhere(lambda: answers(own(parts)))
    draws, classes = max(len(log_probs) for log_probs, *_ in found), found[0][0].shape[-1]
    whole = torch.full((draws, len(lengths), classes), -math.inf)
    for numbers, (log_probs, *_) in zip(parts, found, strict=True):
        whole[: len(log_probs), numbers] = log_probs

    def joined(of: Sequence[Float[Tensor, "n C"] | None]) -> Float[Tensor, "N C"] | None:
        """Return the answers of one pass over all rows, if it was made."""
        every = torch.empty(len(lengths), classes)
        for numbers, log_p in zip(parts, of, strict=True):
            if log_p is None:
                return None
            every[numbers] = log_p
        return every

    return whole, joined([at_mean for _, at_mean, _ in found]), joined([at_base for *_, at_base in found])


def added_over_processes(
    work: Callable[[Sequence[int]], None], lengths: Sequence[int], totals: Callable[[], Sequence[Tensor]]
) -> None:
    """Add something up over N rows of these lengths, each process over its share of them inside `sharded`.

    ``work`` adds some of the rows, by their numbers, to ``totals``, which are asked for afterwards and changed in
    place.
    """
    parts = share(lengths)
    if parts is None:
        work(range(len(lengths)))
        return
    everywhere(lambda: work(own(parts)))
    local = totals()
    for total, overall in zip(local, summed(local), strict=True):
        total.copy_(overall)
