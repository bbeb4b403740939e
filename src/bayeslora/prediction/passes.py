"""Passes of examples through a model under a number of draws: the one engine behind every readout of a model.

What goes into a batch, how many draws share a pass, a prefix that all prompts have in common, and what happens where
memory is short are decided here. What is read from a pass is a `Reading`. Where only the answers' tokens have noise,
a batch's prompts, but for their last tokens, pass once without it, and all draws go on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.params import Params, device_of, require_lora
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.provenance import check_base
from bayeslora.prediction.batching import Batch, grouped, on, schedule
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.memory import in_halves, max_padding, max_stacked
from bayeslora.prediction.prefix_cache import (
    REFUSED,
    WORTHWHILE,
    Start,
    answers_alone,
    common_prefix,
    prefix_start,
    prompts_start,
    without_prefix,
)
from bayeslora.prediction.probes import tried
from bayeslora.prediction.readings import LOG_PROBS, SCORES, Reading
from bayeslora.prediction.readouts import Readout
from bayeslora.prediction.stacking import differing, stacked, stacks

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Choices that share a pass over their neutral prompt."""
_KEYS = 16
"""Tokens before the answer whose keys and values take about as much memory as a token that passes."""
_CLOSE = 0.05
"""Largest difference of a log-probability, in deviations of them all, that is taken for rounding."""


@final
@dataclass(frozen=True)
class PassOptions:
    """How the passes over the data are run; none of it changes a number by more than rounding.

    Attributes:
        stack: Whether several draws may share a pass over the base, where the model allows it.
        share_prefix: Whether a prefix that all prompts have in common may be run once for each draw, where the model
            allows it.
        compile: Whether to compile the model's layers with `torch.compile`: sooner where there are many rows, for
            compiling takes about a minute. It does not apply to linearised posteriors.
        progress: Whether to show a bar with the time left.
    """

    stack: bool = True
    share_prefix: bool = True
    compile: bool = False
    progress: bool = False


@final
@dataclass(frozen=True)
class Passes:
    """N encoded examples and the PEFT model that answers them, its readout attached."""

    model: nn.Module
    readout: Readout
    rows: Sequence[Encoded]
    classes: int  # C, the answers of the example that has most
    token_budget: int  # most tokens of a batch, padding included, over all draws in it
    done: Callable[[int], object] = lambda count: None  # told of each example that has passed, once for every draw
    options: PassOptions = PassOptions()
    reading: Reading = LOG_PROBS
    before: Params | None = None  # the weights for all tokens before the answer; None: those of each draw

    def run(
        self, draw: Callable[[int], Params], count: int, examples: Sequence[int] | None = None
    ) -> Float[Tensor, "S n C"]:
        """Return the answers to n examples (None: all) under S draws, which ``draw`` gives by number when needed.

        They are on the CPU, minus infinity for choices that an example does not have. `InputError` if a single example
        under a single draw does not fit into memory.
        """
        numbers = list(range(len(self.rows)) if examples is None else examples)
        if any(self.rows[i].neutral for i in numbers):
            return self._against_neutral(draw, count, numbers)
        answers = torch.full((count, len(numbers), self.classes), -torch.inf, dtype=self.reading.dtype)
        prefix = self._prefix([self.rows[i] for i in numbers])
        start = 0
        while start < count:
            first = draw(start)
            most = max_stacked(self.model, first) if self.options.stack else 1
            stop = count if self.reading.across_draws else min(start + most, count)
            draws = [first, *(draw(k) for k in range(start + 1, stop))]
            self._run_draws(_Stack(draws, prefix, False, numbers, answers[start:stop]), most)
            start = stop
        return answers

    @torch.inference_mode()
    def _run_draws(self, stack: _Stack, most: int) -> None:
        """Fill in the answers under draws of which at most so many share a pass."""
        names = differing(stack.draws if self.before is None else [self.before, *stack.draws])
        stacks = bool(names) and self.stacks(names, share=False)
        if self.before is not None and ((names and not stacks) or not self._goes_on_from_prompts()):
            raise InputError(REFUSED)
        together = min(most, len(stack.draws)) if stacks else 1
        stack = replace(stack, share=together > 1 and self.before is None and self.stacks(names, share=True))
        lengths = [self._length(self.rows[i], len(stack.prefix), together) for i in stack.numbers]
        for width, batches in schedule(lengths, self.token_budget, together, max_padding(self.model)).items():
            parts = [slice(at, at + width) for at in range(0, len(stack.draws), width)]
            one_by_one = self.reading.across_draws and len(parts) > 1
            for group in [[batch] for batch in batches] if one_by_one else [batches]:
                for part in parts:
                    self._fill(stack.of(part), group)

    def _length(self, row: Encoded, prefix: int, draws: int) -> int:
        """Return how many tokens of the budget an example takes in a pass of some draws, for each of them."""
        length = self.readout.length(row) - (prefix - prefix // 2)  # a token of the prefix costs memory, but no pass
        if self.before is None:
            return length
        prompt = len(row.prompt) - prefix
        return max(self.readout.length(answers_alone([row])[0]) + prompt // _KEYS, -(-prompt // draws))

    def _against_neutral(
        self, draw: Callable[[int], Params], count: int, numbers: Sequence[int]
    ) -> Float[Tensor, "S n C"]:
        """Return the log-probabilities against a neutral prompt, after which each different choice is passed once."""
        bare = [replace(row, neutral=(), neutral_answers=()) for row in self.rows]
        log_probs = replace(self, rows=bare).run(draw, count, numbers)
        choices = [self.rows[i].neutral_answers for i in numbers]
        places = {answer: place for place, answer in enumerate(dict.fromkeys(chain.from_iterable(choices)))}
        groups = [tuple(places)[at : at + AT_ONCE] for at in range(0, len(places), AT_ONCE)]
        prompt = self.rows[numbers[0]].neutral
        rows = [Encoded(prompt, group, -1, (1.0,) * len(group)) for group in groups]
        options = replace(self.options, share_prefix=False)
        once = replace(self, rows=rows, classes=AT_ONCE, done=lambda count: None, options=options, reading=SCORES)
        index = torch.tensor([[places[a] for a in row] + [0] * (self.classes - len(row)) for row in choices])
        return (log_probs - once.run(draw, count).flatten(1)[:, index]).log_softmax(-1)

    def _few(self) -> list[Encoded]:
        """Return the starts of a few examples, to try things on."""
        return [
            replace(row, prompt=row.prompt[: 6 + 3 * k], answers=tuple(a[:2] for a in row.answers))
            for k, row in enumerate(self.rows[:3])
        ]

    def stacks(self, names: frozenset[str], *, share: bool, needed: bool = False) -> bool:
        """Say whether draws that differ in some parameters can be stacked; see `stacking.stacks`."""
        few = self._few()
        key = (self.readout.name, self.readout.shared)
        return stacks(self.model, names, lambda count: self._pass(few, count), key, share=share, needed=needed)

    @torch.inference_mode()
    def _prefix(self, rows: Sequence[Encoded]) -> tuple[int, ...]:
        """Return the tokens that all prompts begin with, if they are many and the model can go on from them."""
        tokens = () if self.readout.name == "head" or not self.options.share_prefix else common_prefix(rows)

        def goes_on() -> bool:
            """Compare going on from four tokens with whole prompts."""
            few = [replace(row, prompt=tokens[: len(row.prompt)]) for row in self._few()]
            return self._same(few, without_prefix(few, 4), prefix_start(self.model, tokens[:4], 1))

        key = ("prefix", self.readout.name, self.readout.shared)
        return tokens if len(tokens) >= WORTHWHILE and tried(self.model, key, goes_on) else ()

    def _goes_on_from_prompts(self) -> bool:
        """Say whether answers may go on from the keys and values of prompts of different lengths."""

        def goes_on() -> bool:
            """Compare going on from prompts with whole rows."""
            few = self._few()
            return self._same(few, answers_alone(few), prompts_start(self.model, few, None))

        return tried(self.model, ("prompts", self.readout.name, self.readout.shared), goes_on)

    def _same(self, whole: Sequence[Encoded], rest: Sequence[Encoded], start: Start | None) -> bool:
        """Say whether what comes after a start gives what whole rows give."""
        if start is None:
            return False
        answers, wanted = self._pass(rest, 1, start), self._pass(whole, 1)
        finite = torch.isfinite(wanted)
        return bool((answers - wanted)[finite].abs().max() <= _CLOSE * wanted[finite].std())

    def _fill(self, stack: _Stack, batches: Sequence[Sequence[int]]) -> None:
        """Fill in the answers to batches of places; what is too large for memory is halved, examples before draws."""
        count = len(stack.draws)
        layers = compiled(self.model) if self.options.compile else nullcontext()
        with stacked(self.model, stack.draws, single=self.before, share=stack.share) as stacking, layers:
            prefix: Start | None = None
            if stack.prefix:
                with stacking.single() if self.before is not None else nullcontext():
                    prefix = prefix_start(self.model, stack.prefix, stacking.draws if not stack.share else 1)

            def answer(places: Sequence[int]) -> None:
                """Pass one batch."""
                examples = [stack.numbers[p] for p in places]
                rows, start = without_prefix([self.rows[i] for i in examples], len(stack.prefix)), prefix
                if self.before is not None:
                    with stacking.single():
                        start = prompts_start(self.model, rows, prefix)
                    rows = answers_alone(rows)
                answers = self._pass(rows, count, start, examples)
                stack.answers[:, places, : answers.shape[-1]] = answers
                self.done(len(places) * count)

            too_large = in_halves(answer, batches)
        for place in too_large:
            if count == 1:
                number = stack.numbers[place]
                length = self.readout.length(self.rows[number])
                raise InputError(f"{self.reading.item} {number} has {length} tokens and does not fit into memory")
            logger.warning("an example under %d draws does not fit into memory; the draws are halved", count)
            for half in (slice(0, count // 2), slice(count // 2, count)):
                self._fill(stack.of(half), [[place]])

    def _pass(
        self, rows: Sequence[Encoded], count: int, start: Start | None = None, examples: Sequence[int] = ()
    ) -> Float[Tensor, "S B C"]:
        """Return the answers of one pass, which goes on from the keys and values of first tokens if they are given.

        Those are of a prefix under one set of weights or each draw's, or of each row's prompt under one.
        """
        batch = on(self.readout.collate(rows), device_of(self.model))
        inputs: Mapping[str, object] = batch
        if start is not None:
            owners = [b for b, row in enumerate(rows) for _ in range(self.readout.sequences(row))]
            inputs = start.continued(self.model, batch, owners)
        logits: Tensor = require_lora(self.model)(**inputs).logits
        return self.reading.read(logits, batch, count, examples).cpu()


@final
@dataclass(frozen=True)
class _Stack:
    """S draws that are stacked, and where the answers under them go."""

    draws: Sequence[Params]
    prefix: tuple[int, ...]  # tokens that all prompts begin with and that are run by themselves
    share: bool  # whether the draws share the layers before the first that differs
    numbers: Sequence[int]  # of the n examples
    answers: Float[Tensor, "S n C"]  # filled in

    def of(self, draws: slice) -> _Stack:
        """Return the same for some of the draws."""
        return replace(self, draws=self.draws[draws], answers=self.answers[draws])


def batched(
    model: nn.Module, readout: Readout, rows: Sequence[Encoded], token_budget: int
) -> list[tuple[list[int], Batch]]:
    """Return examples in batches on the model's device, with the examples' numbers; the readout is to be attached."""
    groups = grouped([readout.length(row) for row in rows], token_budget, token_budget)
    return [(group, on(readout.collate([rows[i] for i in group]), device_of(model))) for group in groups]


def weight_draws(model: nn.Module, posterior: Posterior, draws: int | Draws) -> Draws:
    """Return a request for draws that stay the same weights in every pass, with the count that serves it."""
    draws = Draws.of(draws)
    if posterior.unscaled is not posterior:
        raise InputError(
            "a temperature was fitted to the choices of a task and says nothing about anything else; use what is "
            "scaled, posterior.posterior"
        )
    if not posterior.draws_are_weights:
        raise InputError(
            f"the draws of a {type(posterior).__name__} are not weights that stay the same from text to text; use "
            "its mean, Point(posterior.mean) or `bayeslora export --mean`, or another posterior"
        )
    if posterior.origin is not None:
        check_base(posterior.origin, model)
    return replace(draws, count=posterior.count(draws))
