"""Passes of examples through a model under a number of draws: what goes into one batch, and what if memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params, device_of, require_lora
from bayeslora.prediction import prefix_cache as prefix
from bayeslora.prediction.batching import Batch, repeated
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.memory import max_stacked
from bayeslora.prediction.neutral import AT_ONCE, neutral_rows
from bayeslora.prediction.probes import tried
from bayeslora.prediction.readouts import Readout
from bayeslora.prediction.stacking import differing, stacked, stacks

logger = logging.getLogger(__name__)

_CLOSE = 0.05
"""Largest difference of a log-probability, in deviations of them all, that is taken for rounding."""


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
        share_prefix: Whether a beginning that all prompts have in common may be run by itself, where the model allows
            it.
        compile: Whether the model's layers are compiled.
        as_scores: Whether what is returned are the choices' scores as they are, not normalised over the choices.
    """

    model: nn.Module
    readout: Readout
    rows: Sequence[Encoded]
    classes: int
    token_budget: int
    done: Callable[[int], object]
    stack: bool = True
    share_prefix: bool = True
    compile: bool = False
    as_scores: bool = False

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
        numbers = list(range(len(self.rows)) if examples is None else examples)
        if any(self.rows[i].neutral for i in numbers):
            return self._against_neutral(draw, count, numbers)
        found = torch.full((count, len(numbers), self.classes), -torch.inf)
        beginning = self._beginning([self.rows[i] for i in numbers])
        lengths = [self.readout.length(self.rows[i]) - len(beginning) + len(beginning) // 2 for i in numbers]
        start = 0
        while start < count:
            drawn = [draw(start)]
            most = max_stacked(self.model, drawn[0]) if self.stack else 1
            drawn += [draw(k) for k in range(start + 1, min(start + most, count))]
            names = differing(drawn)
            together = len(drawn) if names and self.stacks(names, share=False) else 1
            share = together > 1 and self.stacks(names, share=True)
            for width, batches in schedule(lengths, self.token_budget, together).items():
                for at in range(0, len(drawn), width):
                    part = drawn[at : at + width]
                    places = [[numbers[p] for p in group] for group in batches]
                    job = _Job(part, beginning, share, dict(zip(numbers, range(len(numbers)), strict=True)))
                    self._fill(job, found[start + at :][: len(part)], places)
            start += len(drawn)
        return found

    def _against_neutral(
        self, draw: Callable[[int], Params], count: int, numbers: Sequence[int]
    ) -> Float[Tensor, "S n C"]:
        """Return the log-probabilities where scores are set against a neutral prompt: one more pass of each choice."""
        bare = [replace(row, neutral=(), neutral_answers=()) for row in self.rows]
        found = replace(self, rows=bare).run(draw, count, numbers)
        rows, places = neutral_rows([self.rows[i] for i in numbers])
        once = replace(self, rows=rows, classes=AT_ONCE, done=lambda _: None, share_prefix=False, as_scores=True).run(
            draw, count
        )
        index = torch.tensor([own + [0] * (self.classes - len(own)) for own in places])
        return (found - once.flatten(1)[:, index]).log_softmax(-1)

    def _few(self) -> list[Encoded]:
        """Return beginnings of a few examples, to try things on."""
        return [
            replace(row, prompt=row.prompt[: 6 + 3 * k], answers=tuple(a[:2] for a in row.answers))
            for k, row in enumerate(self.rows[:3])
        ]

    def stacks(self, names: frozenset[str], *, share: bool, needed: bool = False) -> bool:
        """Say whether draws that differ in some parameters can be stacked; see `stacking.stacks`."""
        few = self._few()

        def answers(count: int, shared: bool) -> Tensor:
            """Return the model's answers as it is."""
            return self._log_probs(few, count, shared)

        key = (self.readout.name, self.readout.shared)
        return stacks(self.model, names, answers, key, share=share, needed=needed)

    def _beginning(self, rows: Sequence[Encoded]) -> tuple[int, ...]:
        """Return what all prompts begin with, if it is long and the model can go on from it."""
        tokens = () if self.readout.name == "head" or not self.share_prefix else prefix.common(rows)

        def goes_on() -> bool:
            """Compare going on from four tokens with whole prompts."""
            few = [replace(row, prompt=tokens[: len(row.prompt)]) for row in self._few()]
            kept = prefix.run(self.model, tokens[:4], 1)
            whole = self._log_probs(few, 1, False)
            there = torch.isfinite(whole)
            gap = (self._log_probs(prefix.without(few, 4), 1, False, kept) - whole)[there].abs().max()
            return kept is not None and bool(gap <= _CLOSE * whole[there].std())

        key = ("prefix", self.readout.name, self.readout.shared)
        worthwhile = len(tokens) >= prefix.WORTHWHILE
        return tokens if worthwhile and tried(self.model, key, goes_on) else ()

    def _fill(self, job: _Job, found: Tensor, batches: list[list[int]]) -> None:
        """Write the answers to batches of examples into their columns; a batch too large for memory is halved."""
        short, count = [], len(job.drawn)
        layers = compiled(self.model) if self.compile else nullcontext()
        with stacked(self.model, job.drawn, share=job.share), layers:
            kept = prefix.run(self.model, job.beginning, 1 if job.share else count) if job.beginning else None
            for examples in batches:
                rows = prefix.without([self.rows[i] for i in examples], len(job.beginning))
                try:
                    log_p = self._log_probs(rows, count, job.share, kept)
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    short.append(examples)
                    continue
                found[:, [job.column[i] for i in examples], : log_p.shape[-1]] = log_p
                self.done(len(examples) * count)
        for examples in short:
            clear_device_cache(garbage_collection=True)
            size = len(examples)
            if size == count == 1:
                length = self.readout.length(self.rows[examples[0]])
                raise InputError(f"example {examples[0]} has {length} tokens and does not fit into memory")
            logger.warning("a batch of %d examples under %d draws does not fit into memory; it is halved", size, count)
            if size > 1:
                self._fill(job, found, [examples[: size // 2], examples[size // 2 :]])
            else:
                for part in (slice(0, count // 2), slice(count // 2, count)):
                    self._fill(replace(job, drawn=job.drawn[part]), found[part], [examples])

    def _log_probs(self, rows: list[Encoded], count: int, share: bool, kept: Any = None) -> Float[Tensor, "S B C"]:
        """Return the answers of one pass, which goes on from the prompts' common beginning if that is given."""
        batch = self.readout.collate(rows)
        inputs: dict[str, Any] = repeated(on(batch, device_of(self.model)), count, inputs=not share)
        if kept is not None:
            inputs = prefix.go_on(inputs, kept, len(inputs["input_ids"]) // (1 if share else count))
        scores: Tensor = require_lora(self.model)(**inputs).logits.float()
        return (scores if self.as_scores else scores.log_softmax(-1)).view(count, len(rows), -1).cpu()


@final
@dataclass(frozen=True)
class _Job:
    """What a number of batches have in common.

    Attributes:
        drawn: The draws that are stacked.
        beginning: Tokens that all prompts begin with.
        share: Whether the draws share the layers before the first that differs.
        column: Column of each example.
    """

    drawn: list[Params]
    beginning: tuple[int, ...]
    share: bool
    column: dict[int, int]


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
