"""The server's errors, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bayeslora.errors import InputError


class ApiError(HTTPException):
    """An HTTP status and OpenAI's fields: a message, its kind, the parameter at fault, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def busy() -> ApiError:
    """Return the error of a full queue."""
    return ApiError(
        429, "the server is busy; try again soon", "server_busy", kind="rate_limit_error", headers={"Retry-After": "1"}
    )


def late() -> ApiError:
    """Return the error of a request that ran out of time."""
    return ApiError(504, "the answer took too long; ask for fewer tokens or draws", "timeout", kind="server_error")


def api_error(error: Exception) -> ApiError:
    """Return any error as clients see it."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case RequestValidationError():
            first = error.errors()[0]
            place = [str(part) for part in first["loc"] if part != "body"]
            field = ".".join(place) or "the body"
            return ApiError(400, f"{field}: {first['msg']}", param=place[0] if place else None)
        case InputError():
            return ApiError(400, str(error))
    return ApiError(500, f"the server failed: {type(error).__name__}", kind="server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Make an application answer every error in this shape."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        """Return an error's body."""
        api = api_error(error)
        return JSONResponse(api.body, api.status_code, api.headers)

    for kind in (HTTPException, RequestValidationError, InputError, Exception):
        app.add_exception_handler(kind, answer)
