"""Requests as OpenAI's interface has them, and its errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ApiError(Exception):
    """What a client is told.

    Args:
        status: HTTP status.
        message: One sentence.
        code: A word for programs.
        param: The field that is at fault.
        kind: OpenAI's type of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Sampled(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    draws: int | None = Field(None, ge=1)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in given if s)

    def refuse(self, others: dict[str, Any]) -> None:
        """Refuse what would be left out silently.

        Args:
            others: Name to value of fields that this server does not know.

        Raises:
            ApiError: If one of them is set.
        """
        known = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
        }
        for name, value in {**known, **others}.items():
            if value not in (None, 0, 0.0, {}, [], "", False):
                raise ApiError(400, f"{name} is not supported; leave it out", "unsupported_parameter", name)


class CompletionRequest(Sampled):
    """``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(p, int) for p in self.prompt):
            return [[int(p) for p in self.prompt if isinstance(p, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The content as text.

        Raises:
            ApiError: If a part is no text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        other = next((p.get("type") for p in self.content if p.get("type") != "text"), None)
        if other is not None:
            raise ApiError(400, f"a part of a message is of type {other!r}; give text only", param="messages")
        return "".join(str(p.get("text", "")) for p in self.content)


class ChatRequest(Sampled):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=5)
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class ClassifyRequest(BaseModel):
    """``/v1/classify``: which of some choices answers a text."""

    model: str
    input: str | dict[str, Any] | list[str | dict[str, Any]]
    choices: list[str] | None = None
    draws: int | None = Field(None, ge=1)

    @property
    def rows(self) -> list[str | dict[str, Any]]:
        """The texts, or rows of columns."""
        return self.input if isinstance(self.input, list) else [self.input]
