"""How many tokens stand for an example in the Trainer's loss, where that is a mean over tokens, as TRL's SFT loss is.

With K trained tokens in N examples it is N/K times the mean over examples of their whole loss, so that what is weighed
against the loss of examples, as KL is, would be K/N times too heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayeslora.processes import sums


@final
class TokenCount:
    """Counts trained tokens in the labels that the model is given while it trains, unless ``tokens_per_row`` is known.

    The data set's tokens are the mean over the batches so far, times the batches of an epoch, so that packed rows are
    counted right; without a known number of batches the examples are the rows. A loss outside the model gives it no
    labels, and labels of one dimension are those of whole examples: then an example counts once.
    """

    def __init__(self, num_data: int, tokens_per_row: float | None) -> None:
        self.num_data, self.tokens_per_row = num_data, tokens_per_row
        self.batches: int | None = None
        self.noted = torch.zeros(3, dtype=torch.float64)  # batches, rows, tokens
        self.fresh: list[tuple[int, Tensor]] = []  # rows and tokens of the batches since the last step
        self._handle: RemovableHandle | None = None

    def begin(self, model: nn.Module, loader: object, world: int) -> None:
        """Look at what the model is given; ``loader`` has the batches of one of ``world`` processes."""
        try:
            self.batches = len(cast(Sized, loader)) * world
        except TypeError:  # a stream of rows
            self.batches = None
        if self.tokens_per_row is None:
            self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def end(self) -> None:
        """Look no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _look(self, model: nn.Module, inputs: object, kwargs: Mapping[str, object]) -> None:
        """Count a batch; a causal model predicts each token but the first."""
        labels = kwargs.get("labels")
        if not (model.training and isinstance(labels, Tensor)) or labels.ndim != 2 or labels.is_floating_point():
            return
        self.fresh.append((len(labels), (labels[:, 1:] != -100).sum()))

    def note(self) -> None:
        """Take in what was counted since the last step, over all processes."""
        seen, self.fresh = self.fresh, []
        counts = [len(seen), sum(rows for rows, _ in seen), sum(int(tokens) for _, tokens in seen)]
        self.noted += torch.tensor(sums(torch.tensor(counts, dtype=torch.float64)), dtype=torch.float64)

    @property
    def per_row(self) -> float:
        """Tokens that stand for an example; 1 where the loss is not a mean over tokens."""
        if self.tokens_per_row is not None:
            return self.tokens_per_row
        batches, rows, tokens = self.noted.tolist()
        if not batches or not tokens:
            return 1.0
        return float(tokens / rows if self.batches is None else tokens / batches * self.batches / self.num_data)
