"""Who waits for an answer: until when, and whether the client is still there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, final

from fastapi import Request

from bayeslora.integrations.server.decoding import Generation, TokenNote
from bayeslora.integrations.server.errors import late, stopping
from bayeslora.integrations.server.worker import Call, Worker

Result = TypeVar("Result")
POLL = 0.5
"""Seconds between two checks whether the client is still there."""


@final
@dataclass(frozen=True)
class Client:
    """A request's client, who waits until a deadline of `time.monotonic`; nobody works for one that has gone."""

    worker: Worker
    request: Request
    deadline: float

    async def check(self) -> None:
        """Refuse to wait longer for what is late, or for nobody."""
        if time.monotonic() > self.deadline or await self.request.is_disconnected():
            raise late()

    async def results(self, parts: Sequence[Callable[[], Result]]) -> list[Result]:
        """Do something in the model's thread; other requests have their turn between the parts."""
        job = Call(parts, self.deadline)
        self.worker.submit(job)
        future = asyncio.wrap_future(job.result)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asked may have gone
        try:
            while not (await asyncio.wait([future], timeout=POLL))[0]:
                await self.check()
            return future.result()
        finally:
            job.cancelled.set()

    def tokens(self, job: Generation) -> AsyncIterator[tuple[int, TokenNote]]:
        """Put a generation into the queue, and return its tokens, each with the number of its row."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, TokenNote | None]] = asyncio.Queue()

        def pass_on(number: int, note: TokenNote | None) -> None:
            """Take a token from the model's thread to this one, if there is still somebody to read it."""
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, (number, note))

        for number, row in enumerate(job.rows):
            row.on_token = partial(pass_on, number)
        if job.rows[0].max_tokens:
            self.worker.submit(job)
        else:
            for row in job.rows:
                row.finish = "length"
                row.on_token(None)
        return self._arriving(job, arrived)

    async def _arriving(
        self, job: Generation, arrived: asyncio.Queue[tuple[int, TokenNote | None]]
    ) -> AsyncIterator[tuple[int, TokenNote]]:
        """Yield tokens until all rows have ended; whoever stops listening ends the rows."""
        left = len(job.rows)
        try:
            while left:
                await self.check()
                try:
                    number, note = await asyncio.wait_for(arrived.get(), POLL)
                except TimeoutError:
                    continue
                if note is None:
                    left -= 1
                elif note.finish != "cancelled":
                    yield number, note
        finally:
            for row in job.rows:
                row.cancelled.set()
        if job.error is not None:
            raise job.error
        if any(row.finish == "cancelled" for row in job.rows):
            raise stopping()
