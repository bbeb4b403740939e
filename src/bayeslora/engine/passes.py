"""Passes of examples through a model under a number of draws: what goes into one batch, and what if memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.engine.encode import Encoded
from bayeslora.engine.readouts import Batch, Readout, repeated
from bayeslora.engine.stacked import differing, stacked, stacks
from bayeslora.errors import InputError
from bayeslora.params import Params, device_of, require_lora

logger = logging.getLogger(__name__)

_PART = 4
"""The matrices of stacked draws take at most this part of the memory that the model takes: a quarter."""


@final
@dataclass(frozen=True)
class Passes:
    """Encoded examples and the model that answers them, its readout attached.

    Attributes:
        model: PEFT model.
        readout: How answers are read.
        rows: The N encoded examples.
        classes: Number C of choices of the example that has most.
        token_budget: Most tokens of a batch, over all draws in it.
        done: Told how many examples have passed, each counted once for every draw.
        stack: Whether several draws may share a pass, where the model allows it.
    """

    model: nn.Module
    readout: Readout
    rows: Sequence[Encoded]
    classes: int
    token_budget: int
    done: Callable[[int], object]
    stack: bool = True

    @torch.inference_mode()
    def run(
        self, draw: Callable[[int], Params], count: int, examples: Sequence[int] | None = None
    ) -> Float[Tensor, "S n C"]:
        """Return the log-probabilities of examples under a number of draws.

        Args:
            draw: Gives the parameters of a draw by its number, from 0, when they are needed.
            count: Number S of draws.
            examples: Numbers of the n examples; None for all.

        Returns:
            Float32 on the CPU; minus infinity for choices that an example does not have.

        Raises:
            InputError: If a single example under a single draw does not fit into memory.
        """
        chosen = list(range(len(self.rows)) if examples is None else examples)
        found = torch.full((count, len(chosen), self.classes), -torch.inf)
        lengths = [self.readout.length(self.rows[i]) for i in chosen]
        most = self._most(draw(0)) if self.stack else 1
        for start in range(0, count, most):
            drawn = [draw(k) for k in range(start, min(start + most, count))]
            names = differing(drawn)
            together = len(drawn) if names and self._stacks(names, share=False) else 1
            share = together > 1 and self._stacks(names, share=True)
            for width, batches in schedule(lengths, self.token_budget, together).items():
                for at in range(0, len(drawn), width):
                    part = drawn[at : at + width]
                    self._fill(found[start + at :][: len(part)], part, chosen, batches, share)
        return found

    def _stacks(self, names: frozenset[str], *, share: bool) -> bool:
        """Say whether draws that differ in some parameters can be stacked, by trying it on the first few tokens."""
        few = [
            Encoded(row.prompt[: 5 + 3 * k], tuple(a[:2] for a in row.answers), row.label)
            for k, row in enumerate(self.rows[:3])
        ]

        def answers(count: int, shared: bool) -> Tensor:
            """Return the model's answers as it is."""
            return self._log_probs(few, count, shared)

        return stacks(self.model, names, answers, (self.readout.name, self.readout.shared), share=share)

    def _most(self, drawn: Params) -> int:
        """Return how many draws may be stacked at once."""
        one = sum(p.numel() for p in drawn.values()) * 4
        return max(1, sum(p.numel() * p.element_size() for p in self.model.parameters()) // (_PART * one))

    def _fill(
        self, found: Tensor, drawn: list[Params], chosen: list[int], batches: list[list[int]], share: bool
    ) -> None:
        """Write the answers to batches of places into their columns; a batch too large for memory is halved."""
        short = []
        with stacked(self.model, drawn, share=share):
            for places in batches:
                try:
                    log_p = self._log_probs([self.rows[chosen[p]] for p in places], len(drawn), share)
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    short.append(places)
                    continue
                found[:, places, : log_p.shape[-1]] = log_p
                self.done(len(places) * len(drawn))
        for places in short:
            clear_device_cache(garbage_collection=True)
            size, count = len(places), len(drawn)
            if size == count == 1:
                length = self.readout.length(self.rows[chosen[places[0]]])
                raise InputError(f"example {chosen[places[0]]} has {length} tokens and does not fit into memory")
            logger.warning("a batch of %d examples under %d draws does not fit into memory; it is halved", size, count)
            if size > 1:
                self._fill(found, drawn, chosen, [places[: size // 2], places[size // 2 :]], share)
            else:
                for part in (slice(0, count // 2), slice(count // 2, count)):
                    self._fill(found[part], drawn[part], chosen, [places], share)

    def _log_probs(self, rows: list[Encoded], count: int, share: bool) -> Float[Tensor, "S B C"]:
        """Return the answers of one pass."""
        batch = self.readout.collate(rows)
        batch = repeated(on(batch, device_of(self.model)), count, inputs=not share)
        log_p: Tensor = require_lora(self.model)(**batch).logits.float().log_softmax(-1)
        return log_p.view(count, len(rows), -1).cpu()


def batched(
    model: nn.Module, readout: Readout, rows: Sequence[Encoded], token_budget: int
) -> list[tuple[list[int], Batch]]:
    """Return examples in batches on the model's device, ready for the model with the readout attached.

    Args:
        model: PEFT model.
        readout: How answers are read.
        rows: The encoded examples.
        token_budget: Most tokens of a batch, padding included.

    Returns:
        Batches with the numbers of their examples.
    """
    groups = grouped([readout.length(row) for row in rows], token_budget)
    return [(group, on(readout.collate([rows[i] for i in group]), device_of(model))) for group in groups]


def on(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device, without the labels."""
    return {key: value.to(device) for key, value in batch.items() if key not in ("labels", "shift_labels")}


def schedule(lengths: Sequence[int], token_budget: int, most: int) -> dict[int, list[list[int]]]:
    """Return how many draws share a pass, and which examples: all draws, or fewer where examples are long.

    Args:
        lengths: Tokens of each example.
        token_budget: Most tokens of a batch, padding included, over all draws in it; a single longer example under a
            single draw is its own batch.
        most: Largest number of draws in a pass.

    Returns:
        Batches of places in ``lengths`` by number of draws; every place is in one of them.
    """
    widths = sorted({-(-most // 2**k) for k in range(most.bit_length() + 1)}, reverse=True)
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        width = next((w for w in widths if w * length <= token_budget), 1)
        places.setdefault(width, []).append(place)
    return {
        width: [[own[i] for i in group] for group in grouped([lengths[p] for p in own], token_budget // width)]
        for width, own in places.items()
    }


def grouped(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Return places in batches of similar length under a token budget, the longest first.

    Args:
        lengths: Tokens of each example.
        token_budget: Most tokens of a batch, padding included; a single longer example is its own batch.

    Returns:
        Batches of places in ``lengths``.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > token_budget:
            groups.append([])
        groups[-1].append(i)
    return groups
