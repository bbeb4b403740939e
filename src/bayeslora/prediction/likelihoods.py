"""Log-likelihoods of texts after their contexts under each of several draws, which share passes over the base.

Texts that follow the same context share the pass over it, as the choices of a question do in `bayeslora.predict`, after
the same trial on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from bayeslora._typing import Bool, Float
from bayeslora.errors import InputError
from bayeslora.params import Params, device_of, evaluating, generator, require_lora
from bayeslora.prediction.batching import READ, Batch, repeated
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.passes import on, schedule
from bayeslora.prediction.readouts import Readout, kept_states
from bayeslora.prediction.stacking import differing, stacked, stacks

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of the text that follows it."""
_BLOCK = 2**24
"""Log-probabilities that are held in float32 at once: 64 MiB."""


@final
@dataclass(frozen=True)
class Likelihoods:
    """A model and the draws under which it scores texts.

    Attributes:
        model: PEFT model, a causal language model.
        draws: The S draws.
        readout: How the model reads the likelihood of texts.
        token_budget: Most tokens of a batch, padding included, over all draws in it.
    """

    model: nn.Module
    draws: Sequence[Params]
    readout: Readout
    token_budget: int

    @torch.inference_mode()
    def of(
        self, pairs: Sequence[Pair], done: Callable[[int], object]
    ) -> tuple[Float[Tensor, "S N"], Bool[Tensor, " N"]]:
        """Return how likely texts are after their contexts.

        Args:
            pairs: N contexts and texts, at least one token each.
            done: Told how many texts have passed under all draws.

        Returns:
            Log p_k(text | context) of each draw, float64 on the CPU; and whether each token of a text is the one that
            the draws find most probable on average, given the tokens before it.

        Raises:
            InputError: If a single text under a single draw does not fit into memory.
        """
        found = torch.zeros(len(self.draws), len(pairs), dtype=torch.float64)
        greedy = torch.zeros(len(pairs), dtype=torch.bool)
        rows, numbers = gathered(pairs, self.token_budget // len(self.draws))
        lengths = [self.readout.length(row) for row in rows]
        with evaluating(self.model):
            names = differing(self.draws)
            together = len(self.draws) if names and self._stacks(names, share=False) else 1
            share = together > 1 and self._stacks(names, share=True)
            for width, groups in schedule(lengths, self.token_budget, together).items():
                for group in groups:
                    places = [(b, c) for b, i in enumerate(group) for c in range(len(numbers[i]))]
                    values, best = self._batch([rows[i] for i in group], width, share)
                    columns = [number for i in group for number in numbers[i]]
                    b, c = torch.tensor(places).unbind(1)
                    found[:, columns], greedy[columns] = values[:, b, c], best[b, c]
                    done(len(columns))
        return found, greedy

    def _stacks(self, names: frozenset[str], *, share: bool) -> bool:
        """Say whether the draws can be stacked; see `bayeslora.prediction.stacking.stacks`."""
        size = min(len(require_lora(self.model).get_base_model().get_input_embeddings().weight), 1000)
        ids = torch.randint(0, size, (14,), generator=generator("likelihoods")).tolist()
        first = Encoded(tuple(ids[:3]), (tuple(ids[3:5]), tuple(ids[5:8])), -1)
        few = [first, Encoded(tuple(ids[8:12]), (tuple(ids[12:]),), -1)]

        def answers(count: int, shared: bool) -> Tensor:
            """Return the log-likelihoods by the model as it is."""
            logits, batch = self._logits(few, count, shared)
            return _summed(_read(logits, batch, None)[0], batch)

        return stacks(self.model, names, answers, ("likelihoods", self.readout.shared), share=share)

    def _batch(
        self, rows: list[Encoded], width: int, share: bool
    ) -> tuple[Float[Tensor, "S B C"], Bool[Tensor, "B C"]]:
        """Return the answers to one batch, so many draws at a time; one that is too large for memory is halved."""
        try:
            values: list[Tensor] = []
            total: Tensor | None = None
            for at in range(0, len(self.draws), width):
                part = self.draws[at : at + width]
                with stacked(self.model, part, share=share):
                    logits, batch = self._logits(rows, len(part), share)
                of_tokens, total = _read(logits, batch, total)
                values.append(_summed(of_tokens, batch))
            assert total is not None
            row, token = (batch[f"readout_{key}"].to(total.device) for key in ("row", "token"))
            hit = total.argmax(-1)[row] == token
            return torch.cat(values), _summed((~hit)[None], batch)[0] == 0
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        if len(rows) == width == 1:
            raise InputError(f"a text of {self.readout.length(rows[0])} tokens does not fit into memory")
        if len(rows) == 1:
            return self._batch(rows, -(-width // 2), share)
        parts = [self._batch(half, width, share) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
        most = max(best.shape[-1] for _, best in parts)
        wide = [[nn.functional.pad(found, (0, most - found.shape[-1])) for found in part] for part in parts]
        return torch.cat([wide[0][0], wide[1][0]], 1), torch.cat([wide[0][1], wide[1][1]])

    def _logits(self, rows: list[Encoded], count: int, share: bool) -> tuple[Float[Tensor, "S P V"], Batch]:
        """Return the logits of the P positions that predict a text's token, and what is read from them."""
        peft = require_lora(self.model)
        batch = on(self.readout.collate(rows), device_of(self.model))
        inputs: dict[str, Any] = repeated(batch, count, inputs=not share)
        places = inputs["readout_keep"]

        def narrow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            """Give the head the positions that are asked for."""
            return (kept_states(args[0], places), *args[1:])

        hook = peft.get_base_model().get_output_embeddings().register_forward_pre_hook(narrow)
        try:
            given = {key: value for key, value in inputs.items() if key not in READ}
            logits: Tensor = peft(**given, use_cache=False).logits
        finally:
            hook.remove()
        return logits.view(count, -1, logits.shape[-1]), batch


def gathered(pairs: Sequence[Pair], room: int) -> tuple[list[Encoded], list[list[int]]]:
    """Return contexts with the texts that follow them.

    Args:
        pairs: Contexts and texts.
        room: Tokens that the texts after one context may have together, or as many as the context has if that is more;
            those beyond get the context once more.

    Returns:
        The rows, and the numbers of the pairs that are each row's answers.
    """
    contexts: list[tuple[int, ...]] = []
    texts: list[list[tuple[int, ...]]] = []
    numbers: list[list[int]] = []
    left: list[int] = []
    last: dict[tuple[int, ...], int] = {}
    for number, (before, after) in enumerate(pairs):
        context, text = tuple(before), tuple(after)
        place = last.get(context)
        if place is None or left[place] < len(text):
            place = last[context] = len(contexts)
            contexts.append(context)
            texts.append([])
            numbers.append([])
            left.append(max(room, len(context)))
        texts[place].append(text)
        numbers[place].append(number)
        left[place] -= len(text)
    return [Encoded(c, tuple(t), -1) for c, t in zip(contexts, texts, strict=True)], numbers


def _read(
    logits: Float[Tensor, "S P V"], batch: Batch, total: Float[Tensor, "P V"] | None
) -> tuple[Float[Tensor, "S Q"], Float[Tensor, "P V"]]:
    """Return the log-probability of each token under each draw, and log Σ_k p_k over the draws so far."""
    row, token = (batch[f"readout_{key}"].to(logits.device) for key in ("row", "token"))
    count, positions, vocabulary = logits.shape
    values = torch.empty(count, len(row), device=logits.device)
    if total is None:
        total = torch.full((positions, vocabulary), -torch.inf, device=logits.device)
    size = max(1, _BLOCK // (count * vocabulary))
    for at in range(0, positions, size):
        log_p = logits[:, at : at + size].float().log_softmax(-1)
        here = (row >= at) & (row < at + size)
        values[:, here] = log_p[:, row[here] - at, token[here]]
        total[at : at + size] = torch.logaddexp(total[at : at + size], log_p.logsumexp(0))
    return values, total


def _summed(values: Tensor, batch: Batch) -> Float[Tensor, "S B C"]:
    """Return the sums over the tokens of each text, float64 on the CPU; 0 where a context has fewer texts."""
    rows, texts = batch["readout_shape"].tolist()
    sums = torch.zeros(len(values), rows * texts, dtype=torch.float64)
    return sums.index_add(1, batch["readout_slot"].cpu(), values.cpu().double()).view(-1, rows, texts)
