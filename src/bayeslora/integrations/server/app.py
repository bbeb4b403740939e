"""The application: OpenAI's interface, classification, and the page."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, final

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from bayeslora.errors import InputError
from bayeslora.integrations.server.handlers import Answering
from bayeslora.integrations.server.requests import ApiError, ChatRequest, ClassifyRequest, CompletionRequest
from bayeslora.integrations.server.worker import BusyError, Served, Worker

Scope = dict[str, Any]


@final
@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        waiting: Most requests in the queue; more are told to come again.
        rows: Most rows of a batch.
        tokens: Most new tokens of an answer.
        timeout: Most seconds of a request, in the queue and in the model.
        body: Most bytes of a request.
        api_key: What clients have to send as ``Authorization: Bearer``; empty for nothing.
    """

    waiting: int = 64
    rows: int = 16
    tokens: int = 1024
    timeout: float = 120.0
    body: int = 2**20
    api_key: str = ""


def make_app(served: Served, limits: Limits | None = None) -> FastAPI:
    """Return the application; its worker ends when it is shut down.

    Args:
        served: What answers.
        limits: What is allowed.

    Returns:
        An ASGI application.
    """
    own = limits or Limits()
    worker = Worker(served, own.waiting, own.rows)
    answering = Answering(served, worker, own.tokens, own.timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """End the worker with the application."""
        yield
        worker.close()

    app = FastAPI(title="bayeslora", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(_Bounded, most=own.body)
    _errors(app)

    async def allowed(request: Request) -> None:
        """Refuse a request without the key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if own.api_key and not secrets.compare_digest(_digest(given), _digest(own.api_key)):
            raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    _pages(app)
    _interface(app, served, answering, allowed)
    return app


def _pages(app: FastAPI) -> None:
    """Add what is open to everybody: the page, and whether the server is there."""
    page = files("bayeslora.integrations.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """Return the page."""
        policy = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is there."""
        return {"status": "ok"}


def _interface(
    app: FastAPI, served: Served, answering: Answering, allowed: Callable[[Request], Awaitable[None]]
) -> None:
    """Add OpenAI's interface and classification."""
    began = int(time.time())

    def described(name: str) -> dict[str, Any]:
        """Return what is said of a model."""
        info = {"id": name, "object": "model", "created": began, "owned_by": "bayeslora"}
        own_draws = served.draws if name == served.name else 1
        most = served.most_draws if name == served.name else 1
        return {**info, "root": served.name, "draws": own_draws, "most_draws": most, "generates": served.generates}

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    async def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [described(name) for name in served.names]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(allowed)])
    async def one_model(name: str) -> dict[str, Any]:
        """Describe a model."""
        return described(answering.known(name))

    @app.post("/v1/completions", dependencies=[Depends(allowed)])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        return await answering.completion(body, request)

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)])
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer in a chat."""
        return await answering.chat(body, request)

    @app.post("/v1/classify", dependencies=[Depends(allowed)])
    async def classify(body: ClassifyRequest) -> Response:
        """Choose among choices."""
        return await answering.classify(body)


def _digest(text: str) -> bytes:
    """Return bytes of one length for any text, to be compared in constant time."""
    return hashlib.sha256(text.encode()).digest()


def _errors(app: FastAPI) -> None:
    """Give every error the shape that OpenAI's clients read."""

    async def own(_: Request, error: Exception) -> JSONResponse:
        """Say what this server refused."""
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status)

    async def malformed(_: Request, error: Exception) -> JSONResponse:
        """Say which field is wrong."""
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        said = ApiError(400, f"{'.'.join(place) or 'the body'}: {first['msg']}", param=place[0] if place else None)
        return JSONResponse(said.body, said.status)

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        """Say that there is no such address."""
        assert isinstance(error, HTTPException)
        said = ApiError(error.status_code, str(error.detail))
        return JSONResponse(said.body, said.status)

    async def busy(_: Request, error: Exception) -> JSONResponse:
        """Say that the queue is full."""
        said = ApiError(429, "the server is busy; try again soon", "server_busy", kind="rate_limit_error")
        return JSONResponse(said.body, said.status, headers={"Retry-After": "1"})

    async def refused(_: Request, error: Exception) -> JSONResponse:
        """Say what the library refused."""
        said = ApiError(400, str(error))
        return JSONResponse(said.body, said.status)

    async def broken(_: Request, error: Exception) -> JSONResponse:
        """Say that something went wrong here."""
        said = ApiError(500, f"the server failed: {type(error).__name__}", kind="server_error")
        return JSONResponse(said.body, said.status)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]] = {
        ApiError: own, RequestValidationError: malformed, HTTPException: unknown, BusyError: busy,
        InputError: refused, Exception: broken,
    }  # fmt: skip
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


@final
class _Bounded:
    """Refuses requests with too large a body, announced or not.

    Args:
        app: The application.
        most: Most bytes.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Read the body, up to the limit, and pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        parts: list[Any] = []
        seen = int(announced) if announced.isdigit() else 0
        more = seen <= self.most
        while more:
            parts.append(await receive())
            more = parts[-1].get("more_body", False)
            if sum(len(part.get("body", b"")) for part in parts) > self.most:
                seen, more = self.most + 1, False
        if seen > self.most:
            said = ApiError(413, f"the request has more than {self.most} bytes; send less", "request_too_large")
            await JSONResponse(said.body, said.status)(scope, receive, send)
            return
        waiting = iter(parts)

        async def again() -> Any:
            """Return what came in, then what comes."""
            return next(waiting, None) or await receive()

        await self.app(scope, again, send)
