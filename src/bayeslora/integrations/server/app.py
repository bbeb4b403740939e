"""The application: OpenAI's interface, classification, and the page."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bayeslora.integrations.server.errors import ApiError, add_error_handlers
from bayeslora.integrations.server.handlers import Handler
from bayeslora.integrations.server.served import Limits, Served
from bayeslora.integrations.server.worker import Worker

_POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def make_app(served: Served, limits: Limits | None = None) -> FastAPI:
    """Return the application; its worker ends when it is shut down.

    Args:
        served: What answers.
        limits: What is allowed.

    Returns:
        An ASGI application.
    """
    limits = limits or Limits()
    worker = Worker(served, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """End the worker with the application."""
        yield
        worker.close()

    app = FastAPI(title="bayeslora", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(_BodyLimit, max_bytes=limits.body)
    add_error_handlers(app)
    _add_page(app)
    _add_interface(app, worker)
    return app


def _add_page(app: FastAPI) -> None:
    """Add what is open to everybody: the page, and whether the server is there."""
    page = files("bayeslora.integrations.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """Return the page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is there."""
        return {"status": "ok"}


def _add_interface(app: FastAPI, worker: Worker) -> None:
    """Add OpenAI's interface and classification, for clients that have the key."""
    handler, expected = Handler(worker), worker.limits.api_key

    async def check_key(request: Request) -> None:
        """Refuse a request without the key."""
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if expected and not secrets.compare_digest(_digest(key), _digest(expected)):
            raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    for method, path, endpoint in (
        ("GET", "/models", handler.models),
        ("GET", "/models/{name:path}", handler.model),
        ("POST", "/completions", handler.completion),
        ("POST", "/chat/completions", handler.chat),
        ("POST", "/classify", handler.classify),
    ):
        router.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.include_router(router)


def _digest(text: str) -> bytes:
    """Return bytes of one length for any text, to be compared in constant time."""
    return hashlib.sha256(text.encode()).digest()


@final
class _BodyLimit:
    """Refuses a request once more of its body has come than is allowed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count the bytes of its body as they are read."""
        seen = 0

        async def counted() -> Message:
            """Return what comes next."""
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise ApiError(413, f"the request has more than {self.max_bytes} bytes; send less", "request_too_large")
            return message

        await self.app(scope, counted, send)
