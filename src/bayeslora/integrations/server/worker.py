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

from bayeslora.integrations.server.batching import Group, Seat, make_group
from bayeslora.integrations.server.decoding import Generation
from bayeslora.integrations.server.errors import busy, late, stopping
from bayeslora.integrations.server.served import Limits, Served

Result = TypeVar("Result")


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
TURN = 8
"""Tokens after which others who wait have the model."""


@final
class Worker:
    """The thread, its queue, and how many rows each of the last steps had."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.queue: deque[Job] = deque()
        self.batches: deque[int] = deque(maxlen=100)
        self._groups: deque[Group] = deque()  # whose turn is next comes first
        self._changed = threading.Condition()
        self._closed = False
        self.thread = threading.Thread(target=self._work, name="bayeslora-model", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether somebody takes jobs out of the queue."""
        return self.thread.is_alive() and not self._closed

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
        """Refuse what waits, and what runs and has not ended with its next token."""
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
        """Let calls and groups have their turns until the end."""
        try:
            while self._wait():
                self._call()
                self._generate()
        finally:  # nobody waits for a thread that has ended, whatever has ended it
            self.stop()
            for group in self._groups:
                group.fail(stopping())

    def _wait(self) -> bool:
        """Wait for something to do; say whether the thread goes on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.queue or self._groups)
            return not self._closed

    def _attempt(self, whose: Job | Group, work: Callable[[], object]) -> bool:
        """Do something; what goes wrong is told to those whose it is, and the thread lives on."""
        try:
            work()
        except Exception as error:
            whose.fail(error)
            return False
        return True

    def _call(self) -> None:
        """Do a part of the call that has waited longest; it goes behind the others for the rest."""
        with self._changed:
            call = next((job for job in self.queue if isinstance(job, Call)), None)
            if call is None:
                return
            self.queue.remove(call)

        def step() -> None:
            """Do it, and queue again."""
            if not call.step():
                with self._changed:
                    self.queue.append(call)

        self._attempt(call, step)

    def _generate(self) -> None:
        """Let the next group of rows go on."""
        head = self._head()
        if head is not None and self._opens(head):
            self._attempt(head, lambda: self._groups.append(make_group(self.served, head.key, self.limits.rows)))
        if not self._groups:
            return
        group = self._groups[0]

        def ends(tokens: int) -> bool:
            """Note a step, and say whether the turn ends with so many."""
            self.batches.append(len(group.running))
            return self._closed or (tokens >= TURN and self._others_wait(group))

        def turn() -> None:
            """Go on for some tokens."""
            group.turn(lambda: self._newcomers(group), ends, lambda: len(self._groups) == 1)

        done = self._attempt(group, turn)
        self._groups.rotate(-1)
        if not done or not len(group):
            self._groups.remove(group)

    def _head(self) -> Generation | None:
        """Return the request that has waited longest for its rows; those that nobody waits for leave the queue."""
        with self._changed:
            waiting = [job for job in self.queue if isinstance(job, Generation)]
            for job in waiting:
                over = [job.over(row) for row in job.rows]  # of all, for each ends here if it is late
                if all(over):
                    self.queue.remove(job)
            return next((job for job in waiting if job in self.queue), None)

    def _opens(self, head: Generation) -> bool:
        """Say whether a request starts a new group."""
        return self._free() > 0 and all(group.key != head.key for group in self._groups)

    def _free(self) -> int:
        """Return how many more rows may run."""
        return self.limits.rows - sum(map(len, self._groups))

    def _others_wait(self, group: Group) -> bool:
        """Say whether anybody waits for the model besides a group and those who will join it."""
        head = self._head()
        with self._changed:
            calls = any(isinstance(job, Call) for job in self.queue)
        return calls or len(self._groups) > 1 or (head is not None and self._opens(head))

    def _newcomers(self, group: Group) -> list[Seat]:
        """Take rows out of the queue for a group, in the order in which they came, as many as may run."""
        seats: list[Seat] = []
        while (head := self._head()) is not None and head.key == group.key and len(seats) < self._free():
            with self._changed:
                row = head.rows[head.seated]
                head.seated += 1
                if head.seated == len(head.rows):
                    self.queue.remove(head)
            seats.append(Seat(row, head))
        return seats
