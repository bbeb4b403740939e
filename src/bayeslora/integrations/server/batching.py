"""Continuous batching: rows join a running batch at the next token, and leave it when they end."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import LogitsProcessorList

from bayeslora._typing import Int
from bayeslora.errors import InputError
from bayeslora.integrations.server.decoding import Generation, Row, RowSampler, choose
from bayeslora.integrations.server.served import Served
from bayeslora.params import device_of, require_lora
from bayeslora.prediction.generation.averaging import Averager, answering
from bayeslora.prediction.generation.decoding import Decoder, Step, ends_of, left_padded, step_of
from bayeslora.prediction.generation.rows import Rows, joins
from bayeslora.prediction.memory import default_token_budget, in_halves, lacks_memory
from bayeslora.prediction.prefix_cache import Start

_PART = 4
"""Prompts are run in parts of a quarter of the token budget, so that those who have their prompt behind them go on."""


@final
@dataclass(frozen=True)
class Seat:
    """A row and the request that it belongs to."""

    row: Row
    job: Generation

    @property
    def over(self) -> bool:
        """Whether the row gets no more tokens."""
        return self.job.over(self.row)


class Group(ABC):
    """The rows of one model's same number of draws: those that wait for a place and those that run."""

    def __init__(self, served: Served, key: tuple[str, int]) -> None:
        self.served, self.key = served, key
        self.waiting: deque[Seat] = deque()
        self.joining: list[Seat] = []  # their prompts are being run
        self.running: list[Seat] = []
        self._base = require_lora(served.model).get_base_model()
        self._draws, self._before = served.draws_of(*key), served.before(*key)

    def __len__(self) -> int:
        return len(self.running) + len(self.joining) + len(self.waiting)

    @abstractmethod
    def turn(self, newcomers: Callable[[], list[Seat]], ends: Callable[[int], bool], alone: Callable[[], bool]) -> None:
        """Go on for some tokens.

        ``newcomers`` are those who have come since they were last asked for, ``ends`` says whether so many tokens are
        enough, and ``alone`` whether no other group has memory that it may give back.
        """

    def fail(self, error: Exception) -> None:
        """Tell all who wait for a row what went wrong."""
        for seat in (*self.running, *self.joining, *self.waiting):
            seat.job.fail(error)

    def _take(self, step: Step, seats: Sequence[Seat]) -> None:
        """Note the rows' tokens."""
        ends = ends_of(self._base, {})
        for number, seat in enumerate(seats):
            try:
                if not seat.over:
                    seat.row.take(self.served.tokenizer, step, number, ends)
            except Exception as error:  # it is this request's alone
                seat.job.fail(error)


@final
class StaticGroup(Group):
    """A batch that runs from its first token to its last: for models whose caches cannot be joined."""

    def turn(self, newcomers: Callable[[], list[Seat]], ends: Callable[[int], bool], alone: Callable[[], bool]) -> None:
        """Generate all the rows, by transformers' ``generate``."""

        def decode(seats: Sequence[Seat]) -> None:
            """Generate some rows."""

            def note(step: Step) -> bool:
                """Give each row its token; say whether all have ended."""
                self._take(step, seats)
                over = [seat.over for seat in seats]  # of all, for each ends here if it is late
                return ends(0) or all(over)

            rows = [seat.row for seat in seats]
            settings = {
                "max_new_tokens": max(row.max_tokens for row in rows), "do_sample": False,
                "logits_processor": LogitsProcessorList([RowSampler(rows)]),
            }  # fmt: skip
            decoder = Decoder(
                self.served.model, self._draws, True, self.served.tokenizer, settings, before=self._before
            )
            decoder.answers([row.ids for row in rows], lambda number, _: seats[number].over, note)

        self.running = newcomers()
        # a batch may start again as long as nobody has seen a token of it
        again = lambda seats: not any(seat.row.notes for seat in seats)  # noqa: E731
        for seat in in_halves(decode, [self.running] if self.running else [], again):
            seat.job.fail(InputError("the prompt does not fit into memory"))
        self.running = [seat for seat in self.running if not seat.over]


@final
class ContinuousGroup(Group):
    """Rows that join and leave between two tokens. All that a row needs to go on is its tokens.

    Where memory is short, rows give up their keys and values, and come back when others have left.
    """

    def __init__(self, served: Served, key: tuple[str, int], most: int) -> None:
        super().__init__(served, key)
        self._rows = Rows(self._base, len(self._draws))
        self._most = most  # rows that run at once: fewer once memory was short, one more for each that has left

    @torch.inference_mode()
    def turn(self, newcomers: Callable[[], list[Seat]], ends: Callable[[int], bool], alone: Callable[[], bool]) -> None:
        """Go on until ``ends`` says so or nobody is left; whoever comes joins before the next token."""
        with answering(self.served.model, self._draws, average=True, before=self._before) as averager:
            for tokens in itertools.count(1):
                self.waiting.extend(newcomers())
                self._admit(averager, alone)
                self._step(averager)
                if ends(tokens) or not self.running:
                    return

    def _admit(self, averager: Averager, alone: Callable[[], bool]) -> None:
        """Run the prompts of those who have waited longest; what does not fit waits for others to leave."""
        self.waiting = deque(seat for seat in self.waiting if not seat.over)
        budget = max(1, default_token_budget(self.served.model) // _PART // len(self._draws))
        prompts: set[tuple[int, ...]] = set()
        while self.waiting and len(self.running) + len(self.joining) < self._most:
            wanted = prompts | {tuple(self.waiting[0].row.so_far)}  # equal ones are run once
            if self.joining and len(wanted) > len(prompts) and max(map(len, wanted)) * len(wanted) > budget:
                break
            prompts = wanted
            self.joining.append(self.waiting.popleft())
        too_large = in_halves(partial(self._prefill, averager, budget), [self.joining] if self.joining else [])
        self.joining = []
        for seat in too_large:
            if self.running or not alone():
                self.waiting.appendleft(seat)
                self._most = max(1, len(self.running))
            else:
                seat.job.fail(InputError("the prompt does not fit into memory"))

    def _prefill(self, averager: Averager, budget: int, seats: Sequence[Seat]) -> None:
        """Run the tokens of some rows, equal ones once, and let the rows join those that run."""
        noisy_from = [len(seat.row.ids) - 1 if averager.start is not None else 0 for seat in seats]
        texts = [(tuple(s.row.so_far[:at]), tuple(s.row.so_far[at:])) for s, at in zip(seats, noisy_from, strict=True)]
        unique = list(dict.fromkeys(texts))
        rows, size = Rows(self._base, len(self._draws)), max(1, budget // len(unique))
        start: Start | None = None
        for number, (noisy, ids, mask) in enumerate(self._parts(unique, size)):
            if number:
                self._step(averager)
            if all(seat.over for seat in seats):
                return
            if noisy:
                if start is not None:
                    rows.begin(start)
                    start = None
                rows.extend(ids, mask)
            elif averager.start is not None:
                start = averager.start(ids, mask, start)
        places = [unique.index(text) for text in texts]
        averager.select(places)
        self._choose(averager, seats)
        stay = [number for number, seat in enumerate(seats) if not seat.over]
        if stay:
            rows.keep([places[number] for number in stay])
            self.running += [seats[number] for number in stay]
            self._guarded(lambda: self._rows.join(rows))

    def _parts(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], size: int
    ) -> Iterator[tuple[bool, Int[Tensor, "R T"], Int[Tensor, "R T"]]]:
        """Yield parts of texts' tokens without noise and then with it, with their mask: so many columns of the latter.

        What has no noise passes for one draw, and so in parts that are wider.
        """
        for noisy, width in ((False, size * len(self._draws)), (True, size)):
            ids, mask = left_padded([text[noisy] for text in texts], 0, device_of(self.served.model))
            for at in range(0, ids.shape[1], width):
                yield noisy, ids[:, at : at + width], mask[:, at : at + width]

    def _step(self, averager: Averager) -> None:
        """Give each running row a token."""

        def step() -> None:
            """Run the last tokens."""
            last = [[seat.row.notes[-1].id] for seat in self.running]
            self._rows.extend(torch.tensor(last, device=device_of(self.served.model)))
            self._choose(averager, self.running)

        self._leave()
        if self.running:
            self._guarded(step)
        self._leave()

    def _choose(self, averager: Averager, seats: Sequence[Seat]) -> None:
        """Choose and note the rows' tokens."""
        self._take(step_of(averager, choose([seat.row for seat in seats], averager.average)), seats)

    def _leave(self) -> None:
        """Let the rows go that get no more tokens."""
        stay = [number for number, seat in enumerate(self.running) if not seat.over]
        left = len(self.running) - len(stay)
        if left:
            self._most += left
            self.running = [self.running[number] for number in stay]
            self._guarded(lambda: self._rows.keep(stay))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Change the cache; where memory is short, all rows give up theirs, and half as many run at once."""
        try:
            work()
            return
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
        self._rows = Rows(self._base, len(self._draws))
        self._most = max(1, len(self.running) // 2)
        self.waiting.extendleft(reversed(self.running))
        self.running = []
        clear_device_cache(garbage_collection=True)


def make_group(served: Served, key: tuple[str, int], most: int) -> Group:
    """Return a group of at most so many rows, whose batches are continuous if the model allows that."""
    return ContinuousGroup(served, key, most) if joins(served.model) else StaticGroup(served, key)
