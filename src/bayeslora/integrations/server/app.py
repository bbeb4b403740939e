"""The application: OpenAI's interface, classification, and the page."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, final

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from bayeslora.integrations.server.description import describe, errors
from bayeslora.integrations.server.errors import ApiError, add_error_handlers
from bayeslora.integrations.server.handlers import Handler
from bayeslora.integrations.server.schemas import ChatAnswer, Classification, Health, Model, Models, TextAnswer
from bayeslora.integrations.server.served import Limits, Served
from bayeslora.integrations.server.worker import Worker

_POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_OPEN = ("/", "/health")
_BEARER = HTTPBearer(auto_error=False)


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

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, max_body_size=limits.body)
    app.state.worker = worker
    if limits.api_key:
        app.add_middleware(_Key, key=limits.api_key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=limits.hosts, www_redirect=False)
    add_error_handlers(app)
    _add_page(app, worker)
    _add_interface(app, worker)
    return app


def _add_page(app: FastAPI, worker: Worker) -> None:
    """Add what is open to everybody: the page, and whether the server answers."""
    page = files("bayeslora.integrations.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        """Return the page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    unwell = {"model": Health, "description": "The model's thread has ended"}

    @app.get("/health", response_model=Health, responses=errors([400, 500]) | {503: unwell})
    async def health() -> JSONResponse:
        """Say whether the server answers."""
        alive = worker.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


def _add_interface(app: FastAPI, worker: Worker) -> None:
    """Add OpenAI's interface, classification, and the description of all."""
    handler, keyed = Handler(worker), bool(worker.limits.api_key)
    shared, work = [400, 401, 500, 503] if keyed else [400, 500, 503], [404, 413, 429, 504]
    dependencies = [Depends(_BEARER)] if keyed else []  # for the description; `_Key` refuses
    router = APIRouter(prefix="/v1", route_class=_Route, dependencies=dependencies)
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    stream = {"content": {"text/event-stream": {"itemSchema": event}}, "description": "The answer, or its pieces"}
    for method, path, endpoint, model, statuses in (
        ("GET", "/models", handler.models, Models, []),
        ("GET", "/models/{name:path}", handler.model, Model, [404]),
        ("POST", "/completions", handler.completion, TextAnswer, work),
        ("POST", "/chat/completions", handler.chat, ChatAnswer, work),
        ("POST", "/classify", handler.classify, Classification, work),
    ):
        responses = errors(sorted([*shared, *statuses])) | ({200: stream} if "completion" in path else {})
        router.add_api_route(path, endpoint, methods=[method], response_model=model, responses=responses)
    app.include_router(router)

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> JSONResponse:
        """Describe the interface."""
        return JSONResponse(app.openapi())

    app.openapi = lambda: describe(app, worker.served, worker.limits)  # type: ignore[method-assign]  # as FastAPI asks


@final
class _Body(Request):
    """A request whose JSON is read by pydantic: half letters, NaN and deep nesting are no JSON."""

    async def json(self) -> Any:
        """Return the body's value."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error


@final
class _Route(APIRoute):
    """A route of `_Body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            """Answer a request whose JSON is read as `_Body` does."""
            return await handle(_Body(request.scope, request.receive))

        return answer


@final
class _Key:
    """Refuses a request without the key before its body is read."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on that has the key or needs none."""
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = await _BEARER(Request(scope))
            if not secrets.compare_digest(_digest(given.credentials.strip() if given else ""), self.expected):
                said = "the API key is missing or wrong; send Authorization: Bearer KEY"
                error = ApiError(401, said, "invalid_api_key")
                await JSONResponse(error.body, 401, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _digest(text: str) -> bytes:
    """Return bytes of one length for any text, to be compared in constant time."""
    return hashlib.sha256(text.encode()).digest()
