"""The average over draws at each token in vLLM: a logits processor for rows that are generated in step.

The same prompt runs once under each of S adapters, S rows of one batch. Before a token is chosen, each row's
log-probabilities are replaced by log p̄ = log (1/S) Σ_k p_k, so that all S rows take the same token: with temperature 0
it is the most probable one, and otherwise their seeds are the same. vLLM loads the processor by its own interface
(``logits_processors``); nothing in it is replaced.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, final

from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from bayeslora.integrations.openai.serving import GROUP


@final
class AverageDraws(LogitsProcessor):
    """Averages the distributions of rows that belong to one group; other rows stay as they are."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[tuple[int, int], list[int]]] = {}  # by place in the batch: group, tokens so far

    def is_argmax_invariant(self) -> bool:
        """Say that the most probable token may change."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows that have come, gone and moved, in the order that the interface states."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self.rows.pop(place, None)
        for place, params, _, tokens in batch_update.added:
            self.rows.pop(place, None)
            if group := (params.extra_args or {}).get(GROUP):
                self.rows[place] = (group[0], group[1]), tokens
        for start, end, direction in batch_update.moved:
            moved, met = self.rows.pop(start, None), self.rows.pop(end, None)
            if moved is not None:
                self.rows[end] = moved
            if met is not None and direction == MoveDirectionality.SWAP:
                self.rows[start] = met

    def apply(self, logits: Tensor) -> Tensor:
        """Replace the logits [B V] of each group's rows by the log of their mean probabilities."""
        groups = defaultdict(list)
        for place, (group, tokens) in self.rows.items():
            groups[group].append((place, len(tokens)))
        for (number, size), members in groups.items():
            if len(members) != size or len({length for _, length in members}) > 1:
                raise RuntimeError(
                    f"the draws of prompt {number} are not in step: {len(members)} of {size} rows are here"
                )
            places = [place for place, _ in members]
            logits[places] = logits[places].log_softmax(-1).logsumexp(0) - math.log(size)
        return logits
