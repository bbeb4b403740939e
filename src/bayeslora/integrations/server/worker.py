"""One thread that has the model: requests wait in a bounded queue, and rows that fit together share a batch."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, final

from transformers import LogitsProcessorList

from bayeslora.errors import InputError
from bayeslora.integrations.server.decoding import Row, RowSampler
from bayeslora.integrations.server.errors import busy, late, stopping
from bayeslora.integrations.server.served import Limits, Served
from bayeslora.params import Params, require_lora
from bayeslora.prediction.generation.decoding import Decoder, Step, ends_of
from bayeslora.prediction.memory import in_halves

Result = TypeVar("Result")


@final
@dataclass
class Generation:
    """The rows of one request; only requests for the same model's same number of draws share a batch."""

    model: str
    draws: int
    rows: list[Row]
    deadline: float = math.inf  # of `time.monotonic`
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Note what went wrong, and tell whoever waits."""
        self.error = error
        for row in self.rows:
            row.on_token(None)


@final
@dataclass
class Call(Generic[Result]):
    """Anything else that needs the model: parts, between which other requests have their turn; its result is theirs."""

    parts: Sequence[Callable[[], Result]]
    deadline: float = math.inf  # of `time.monotonic`
    result: Future[list[Result]] = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)  # set when nobody waits for it any more
    _found: list[Result] = field(default_factory=list)

    def step(self) -> bool:
        """Do the next part, if somebody still waits; say whether that was all."""
        if not self._found and not self.result.set_running_or_notify_cancel():
            return True
        if self.cancelled.is_set() or time.monotonic() > self.deadline:
            raise late()
        self._found.append(self.parts[len(self._found)]())
        if len(self._found) < len(self.parts):
            return False
        self.result.set_result(self._found)
        return True

    def fail(self, error: Exception) -> None:
        """Tell whoever waits what went wrong."""
        if not self.result.done():
            self.result.set_exception(error)


Job = Generation | Call[Any]


@final
class Worker:
    """The thread, its queue, and the sizes of its last batches."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.queue: deque[Job] = deque()
        self.batches: deque[int] = deque(maxlen=100)
        self._changed = threading.Condition()
        self._closed = False
        self.thread = threading.Thread(target=self._work, name="bayeslora-model", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue; a full queue is busy."""
        with self._changed:
            if self._closed:
                raise stopping()
            if len(self.queue) >= self.limits.waiting:
                raise busy()
            self.queue.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Refuse what waits, and end what runs at its next token."""
        with self._changed:
            self._closed = True
            left, self.queue = self.queue, deque()
            self._changed.notify()
        for job in left:
            job.fail(stopping())

    def close(self) -> None:
        """End the thread."""
        self.stop()
        self.thread.join(timeout=10)

    def _work(self) -> None:
        """Do jobs until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.queue)
                if self._closed:
                    return
                first = self.queue.popleft()
                batch = self._batch(first) if isinstance(first, Generation) else []
            try:
                if isinstance(first, Call):
                    if not first.step():
                        with self._changed:
                            self.queue.append(first)
                else:
                    self._generate(batch)
            except Exception as error:  # the thread lives on; whoever waits gets the error
                failed: Sequence[Job] = batch or (first,)
                for job in failed:
                    job.fail(error)

    def _batch(self, first: Generation) -> list[Generation]:
        """Take out of the queue what fits into a batch with the first."""
        batch, count = [first], len(first.rows)
        for job in [job for job in self.queue if isinstance(job, Generation)]:
            same = (job.model, job.draws) == (first.model, first.draws)
            if same and count + len(job.rows) <= self.limits.rows:
                self.queue.remove(job)
                batch.append(job)
                count += len(job.rows)
        return batch

    def _generate(self, jobs: list[Generation]) -> None:
        """Generate the rows of some requests in one batch, in halves where memory does not suffice."""
        rows = [row for job in jobs for row in job.rows]
        self.batches.append(len(rows))
        draws = self.served.draws_of(jobs[0].model, jobs[0].draws)
        # a batch may start again as long as nobody has seen a token of it
        if in_halves(
            lambda batch: self._decode(batch, draws), [rows], lambda batch: not any(row.notes for row in batch)
        ):
            raise InputError("the prompt does not fit into memory")
        for row in rows:
            row.on_token(None)

    def _decode(self, rows: Sequence[Row], draws: list[Params]) -> None:
        """Generate rows in one batch."""
        tokenizer = self.served.tokenizer
        ends = ends_of(require_lora(self.served.model).get_base_model(), {})

        def note(step: Step) -> bool:
            """Give each row its token; say whether all have ended."""
            for number, row in enumerate(rows):
                if self._closed:
                    row.cancelled.set()
                if row.finish is None:
                    row.take(tokenizer, step, number, ends)
            return all(row.finish is not None for row in rows)

        settings = {
            "max_new_tokens": max(row.max_tokens for row in rows), "do_sample": False,
            "logits_processor": LogitsProcessorList([RowSampler(rows)]),
        }  # fmt: skip
        decoder = Decoder(self.served.model, draws, True, tokenizer, settings)
        decoder.answers([row.ids for row in rows], lambda number, _: rows[number].finish is not None, note)
