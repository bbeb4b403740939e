"""The server's errors, in the shape that OpenAI's clients read."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bayeslora.errors import InputError

_KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}


class ApiError(HTTPException):
    """An HTTP status and OpenAI's fields: a message, its kind, the parameter at fault, and a code for programs."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, _HEADERS.get(status))
        kind = _KINDS.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def busy() -> ApiError:
    """Return the error of a full queue."""
    return ApiError(429, "the server is busy; try again soon", "server_busy")


def stopping() -> ApiError:
    """Return the error of a server that is told to stop."""
    return ApiError(503, "the server is stopping; try again later or elsewhere", "server_stopping")


def late() -> ApiError:
    """Return the error of a request that ran out of time."""
    return ApiError(504, "the answer took too long; ask for fewer tokens or draws", "timeout")


def api_error(error: Exception) -> ApiError:
    """Return any error as clients see it."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            api = ApiError(error.status_code, str(error.detail))
            api.headers = error.headers or api.headers
            return api
        case RequestValidationError():
            first = error.errors()[0]
            place = [str(part) for part in first["loc"] if part != "body"]
            field = ".".join(place) or "the body"
            return ApiError(400, f"{field}: {first['msg']}", param=place[0] if place else None)
        case InputError():
            return ApiError(400, str(error))
    return ApiError(500, f"the server failed: {type(error).__name__}")


def add_error_handlers(app: FastAPI) -> None:
    """Make an application answer every error in this shape."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        """Return an error's body."""
        api = api_error(error)
        return JSONResponse(api.body, api.status_code, api.headers)

    for kind in (HTTPException, RequestValidationError, InputError, Exception):
        app.add_exception_handler(kind, answer)
