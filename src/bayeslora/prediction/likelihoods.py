"""Log-likelihoods of texts after their contexts, which they share a pass over, under each of several draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Bool, Float
from bayeslora.params import Params, evaluating
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.passes import Passes
from bayeslora.prediction.readings import Reading
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
    before: Params | None = None  # the weights for a context but its last token; None: those of each draw

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

        def complete(row: int, _: Tensor, right: Bool[Tensor, " texts"]) -> None:
            """Note which of a context's texts are greedy."""
            greedy[numbers[row]] = right
            done(len(numbers[row]))

        sums = self._sums(rows, complete)
        for row, columns in enumerate(numbers):
            log_likelihoods[:, columns] = sums[:, row, : len(columns)]
        return log_likelihoods, greedy

    def average(self, context: Sequence[int], text: Sequence[int]) -> Float[Tensor, "T V"]:
        """Return log p̄ in the place of each of a text's T tokens after a context, both of a token at least."""
        averages: list[Tensor] = []
        row = Encoded(tuple(context), (tuple(text),), -1)
        self._sums([row], lambda _, sums, __: averages.append(sums.cpu() - math.log(len(self.draws))))
        return averages[-1]

    def _sums(self, rows: Sequence[Encoded], complete: Callable[[int, Tensor, Tensor], None]) -> Float[Tensor, "S B C"]:
        """Return the log-likelihoods of the texts after each context.

        After all draws ``complete`` is told a context's number, log Σ_k p_k [P V], and which of its texts are greedy.
        """
        partial: dict[int, tuple[int, Float[Tensor, "P V"]]] = {}

        def read(logits: Tensor, batch: Batch, count: int, examples: Sequence[int]) -> Float[Tensor, "S B C"]:
            """Return the log-likelihoods of the texts after each context; see `Reading`."""
            values, total = _read(logits.view(count, -1, logits.shape[-1]), batch)
            row, token, slot = (batch[f"readout_{key}"].cpu() for key in ("row", "token", "slot"))
            contexts, texts = batch["readout_shape"].tolist()
            owner = torch.zeros(len(total), dtype=torch.long).index_put_((row,), slot // texts)
            sizes = owner.bincount().tolist()  # the positions of an example lie together
            for b, (example, part) in enumerate(zip(examples, torch.split(total, sizes), strict=False)):
                before, sums = partial.pop(example, (0, None))
                part = part if sums is None else torch.logaddexp(sums, part)
                if before + count < len(self.draws):
                    partial[example] = before + count, part
                    continue
                here = slot // texts == b
                wrong = part.argmax(-1).cpu()[row[here] - sum(sizes[:b])] != token[here]
                complete(example, part, torch.bincount(slot[here] % texts, weights=wrong) == 0)
            likelihoods = torch.zeros(count, contexts * texts, dtype=torch.float64)
            return likelihoods.index_add(1, slot, values.cpu().double()).view(-1, contexts, texts)

        reading = Reading(read, torch.float64, across_draws=True, item="text")
        most = max(len(row.answers) for row in rows)
        passes = Passes(self.model, self.readout, rows, most, self.token_budget, reading=reading, before=self.before)
        with evaluating(self.model), self.readout.attached(self.model, lambda logits, _: logits):
            return passes.run(self.draws.__getitem__, len(self.draws))


def gathered(pairs: Sequence[Pair], room: int) -> tuple[list[Encoded], list[list[int]]]:
    """Return contexts with the texts that follow them, and the numbers of the pairs that are each row's answers."""
    # The texts after one context have at most ``room`` tokens together, or as many as the context has if that is more;
    # those beyond get the context once more.
    numbers: list[list[int]] = []
    last: dict[tuple[int, ...], tuple[int, int]] = {}  # a context's row, and how many tokens it has room for
    for number, (context, text) in enumerate(pairs):
        row, left = last.get(tuple(context), (0, 0))
        if left < len(text):
            row, left = len(numbers), max(room, len(context))
            numbers.append([])
        numbers[row].append(number)
        last[tuple(context)] = row, left - len(text)
    return [Encoded(tuple(pairs[row[0]][0]), tuple(tuple(pairs[n][1]) for n in row), -1) for row in numbers], numbers


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
