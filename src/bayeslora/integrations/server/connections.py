"""uvicorn as this server runs it: how many connections, how long each may keep it waiting, and how it stops."""

from __future__ import annotations

import asyncio
import socket
from typing import final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bayeslora.integrations.server.served import Limits

GRACE = 5
"""Seconds that running answers have to end once the server is told to stop."""


@final
class Connection(H11Protocol):
    """uvicorn's connection, which waits for its client no longer than ``timeout_keep_alive``.

    That is the time for a whole request to come, and for a client that stopped reading to read on. uvicorn itself ends
    only those that wait for a next request; its ``limit_concurrency`` refuses requests, not the connections.
    """

    _coming: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, or end at once where twice as many are connected as may be."""
        super().connection_made(transport)
        self._coming = self.loop.call_later(self.timeout_keep_alive, transport.abort)
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the waiting."""
        super().connection_lost(exc)
        self._came()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Go on waiting until the request is whole."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self._came()
        elif self._coming is None:
            self._coming = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def timeout_keep_alive_handler(self) -> None:
        """End a connection that waits for a next request, whether or not the last answer has been read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _came(self) -> None:
        """Stop waiting for a request."""
        if self._coming is not None:
            self._coming.cancel()
            self._coming = None


@final
class Server(uvicorn.Server):
    """uvicorn's server; when it stops, answers have `GRACE` seconds to end, and those that run on end with an error."""

    def __init__(self, app: FastAPI, limits: Limits, port: int = 0) -> None:
        self.worker = app.state.worker
        config = uvicorn.Config(
            app, http=Connection, ws="none", log_level="warning", limit_concurrency=limits.connections + 1,
            timeout_keep_alive=limits.patience, timeout_graceful_shutdown=2 * GRACE, port=port,
        )  # fmt: skip
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and end what runs."""
        ending = asyncio.get_running_loop().call_later(GRACE, self.worker.stop)
        await super().shutdown(sockets)
        ending.cancel()
