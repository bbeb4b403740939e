"""Log-likelihoods of texts after their contexts under each of several draws, which share passes over the base.

Texts that follow the same context share the pass over it, as the choices of a question do in `bayeslora.predict`, after
the same trial on the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Bool, Float, Int
from bayeslora.params import Params, evaluating, require_lora
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.passes import Passes, Reading
from bayeslora.prediction.readouts import Readout

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of the text that follows it."""
_BLOCK = 2**24
"""Log-probabilities that are held in float32 at once: 64 MiB."""


@final
@dataclass(frozen=True)
class Likelihoods:
    """A causal language model and the S draws under which it scores texts; the token budget is over all of them."""

    model: nn.Module
    draws: Sequence[Params]
    readout: Readout
    token_budget: int

    def of(
        self, pairs: Sequence[Pair], done: Callable[[int], object]
    ) -> tuple[Float[Tensor, "S N"], Bool[Tensor, " N"]]:
        """Return log p_k(text | context) of each draw, float64 on the CPU, and whether each text is greedy.

        A context and a text have at least one token each. A text is greedy if each of its tokens is the one that the
        draws find most probable on average, given the tokens before it. ``done`` is told how many texts have passed
        under all draws. `InputError` if a single text under a single draw does not fit into memory.
        """
        rows, numbers = gathered(pairs, self.token_budget // len(self.draws))
        log_likelihoods = torch.empty(len(self.draws), len(pairs), dtype=torch.float64)
        greedy = torch.zeros(len(pairs), dtype=torch.bool)

        def complete(row: int, total: Total) -> None:
            """Say which of a context's texts are greedy."""
            wrong = total.log_sums.argmax(-1).cpu()[total.position] != total.token
            greedy[numbers[row]] = torch.bincount(total.text, weights=wrong) == 0
            done(len(numbers[row]))

        sums = self._sums(rows, complete)
        for row, columns in enumerate(numbers):
            log_likelihoods[:, columns] = sums[:, row, : len(columns)]
        return log_likelihoods, greedy

    def average(self, ids: Sequence[int]) -> Float[Tensor, "T V"]:
        """Return log p̄ of what follows each of T + 1 tokens but the last, averaged over the draws, on the CPU."""
        averages = [torch.empty(0, len(require_lora(self.model).get_base_model().get_input_embeddings().weight))]
        if len(ids) > 1:
            row = Encoded(tuple(ids[:1]), (tuple(ids[1:]),), -1)
            self._sums([row], lambda _, total: averages.append(total.log_sums.cpu() - math.log(len(self.draws))))
        return averages[-1]

    def _sums(self, rows: Sequence[Encoded], complete: Complete) -> Float[Tensor, "S B C"]:
        """Return the log-likelihoods of the texts after each context."""
        reading = Reading(_Texts(len(self.draws), complete).read, torch.float64, across_draws=True, item="text")
        most = max(len(row.answers) for row in rows)
        passes = Passes(self.model, self.readout, rows, most, self.token_budget, reading=reading)
        with evaluating(self.model), self.readout.attached(self.model, lambda logits, _: logits):
            return passes.run(self.draws.__getitem__, len(self.draws))


@final
@dataclass(frozen=True)
class Total:
    """The sum of the draws' distributions at the P positions of a context and the Q tokens of its texts."""

    log_sums: Float[Tensor, "P V"]  # log Σ_k p_k
    position: Int[Tensor, " Q"]  # at which each token is predicted
    token: Int[Tensor, " Q"]
    text: Int[Tensor, " Q"]  # to which each token belongs


Complete = Callable[[int, Total], None]
"""Told of each context by its number when it has passed under all draws."""


@final
class _Texts:
    """Reads the likelihoods of texts, and sums the distributions of each context over S draws."""

    def __init__(self, draws: int, complete: Complete) -> None:
        self.draws, self.complete = draws, complete
        self._partial: dict[int, tuple[int, Float[Tensor, "P V"]]] = {}

    def read(self, logits: Tensor, batch: Batch, count: int, examples: Sequence[int]) -> Float[Tensor, "S B C"]:
        """Return the log-likelihoods of the texts after each context; see `Reading`."""
        values, total = _read(logits.view(count, -1, logits.shape[-1]), batch)
        row, token, slot = (batch[f"readout_{key}"].cpu() for key in ("row", "token", "slot"))
        texts = int(batch["readout_shape"][1])
        owner = torch.zeros(len(total), dtype=torch.long).index_put_((row,), slot // texts)
        sizes = owner.bincount().tolist()  # the positions of an example lie together
        for b, (example, part) in enumerate(zip(examples, torch.split(total, sizes), strict=False)):
            before, sums = self._partial.pop(example, (0, None))
            part = part if sums is None else torch.logaddexp(sums, part)
            if before + count < self.draws:
                self._partial[example] = before + count, part
                continue
            here = slot // texts == b
            self.complete(example, Total(part, row[here] - sum(sizes[:b]), token[here], slot[here] % texts))
        return _summed(values, batch)


def gathered(pairs: Sequence[Pair], room: int) -> tuple[list[Encoded], list[list[int]]]:
    """Return contexts with the texts that follow them, and the numbers of the pairs that are each row's answers.

    The texts after one context have at most ``room`` tokens together, or as many as the context has if that is more;
    those beyond get the context once more.
    """
    contexts: list[tuple[int, ...]] = []
    texts: list[list[tuple[int, ...]]] = []
    numbers: list[list[int]] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # a context's row, and how many tokens it has room for
    for number, (before, after) in enumerate(pairs):
        context, text = tuple(before), tuple(after)
        row, left = last.get(context, (0, 0))
        if left < len(text):
            row, left = len(contexts), max(room, len(context))
            contexts.append(context)
            texts.append([])
            numbers.append([])
        texts[row].append(text)
        numbers[row].append(number)
        last[context] = row, left - len(text)
    return [Encoded(c, tuple(t), -1) for c, t in zip(contexts, texts, strict=True)], numbers


def _read(logits: Float[Tensor, "S P V"], batch: Batch) -> tuple[Float[Tensor, "S Q"], Float[Tensor, "P V"]]:
    """Return the log-probability of each token under each draw, and log Σ_k p_k, in blocks of positions."""
    row, token = (batch[f"readout_{key}"].to(logits.device) for key in ("row", "token"))
    count, positions, vocabulary = logits.shape
    values = torch.empty(count, len(row), device=logits.device)
    total = torch.empty(positions, vocabulary, device=logits.device)
    size = max(1, _BLOCK // (count * vocabulary))
    for at in range(0, positions, size):
        log_p = logits[:, at : at + size].float().log_softmax(-1)
        here = (row >= at) & (row < at + size)
        values[:, here] = log_p[:, row[here] - at, token[here]]
        total[at : at + size] = log_p.logsumexp(0)
    return values, total


def _summed(values: Float[Tensor, "S Q"], batch: Batch) -> Float[Tensor, "S B C"]:
    """Return the sums over the tokens of each text, float64 on the CPU; 0 where a context has fewer texts."""
    rows, texts = batch["readout_shape"].tolist()
    sums = torch.zeros(len(values), rows * texts, dtype=torch.float64)
    return sums.index_add(1, batch["readout_slot"].cpu(), values.cpu().double()).view(-1, rows, texts)
