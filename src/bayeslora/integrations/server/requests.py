"""Requests as OpenAI's interface has them, and those to classify."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator, model_validator

from bayeslora.integrations.server.errors import ApiError

Value = TypeVar("Value")


def _refuse(value: Value, info: ValidationInfo) -> Value:
    """Refuse a field that would be left out silently, unless its value asks for nothing."""
    if value:
        name = info.field_name
        raise ApiError(400, f"{name} is not supported; leave it out", "unsupported_parameter", name)
    return value


Unsupported = AfterValidator(_refuse)


class Sampled(BaseModel):
    """What both kinds of completion have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: dict[str, object] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    draws: int | None = Field(None, ge=1)
    presence_penalty: Annotated[float | None, Unsupported] = None
    frequency_penalty: Annotated[float | None, Unsupported] = None
    logit_bias: Annotated[dict[str, float] | None, Unsupported] = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class CompletionRequest(Sampled):
    """``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = None
    suffix: Annotated[str | None, Unsupported] = None

    @field_validator("best_of")
    @classmethod
    def _no_selection(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Refuse to choose among more answers than are returned."""
        return value if value in (1, info.data.get("n")) else _refuse(value, info)

    @model_validator(mode="after")
    def _no_streamed_echo(self) -> CompletionRequest:
        """Refuse a stream of the prompt."""
        if self.echo and self.stream:
            raise ApiError(400, "echo cannot be streamed; leave out one of the two", param="echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(p, int) for p in self.prompt):
            return [[p for p in self.prompt if isinstance(p, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, object]] | None = None

    @property
    def text(self) -> str:
        """The content as text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        other = next((part.get("type") for part in self.content if part.get("type") != "text"), None)
        if other is not None:
            raise ApiError(400, f"a part of a message is of type {other!r}; give text only", param="messages")
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(Sampled):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=5)
    tools: Annotated[list[object] | None, Unsupported] = None
    response_format: dict[str, object] | None = None

    @field_validator("response_format")
    @classmethod
    def _only_text(cls, value: dict[str, object] | None, info: ValidationInfo) -> dict[str, object] | None:
        """Refuse any format but text."""
        return value if (value or {}).get("type", "text") == "text" else _refuse(value, info)


class ClassifyRequest(BaseModel):
    """``/v1/classify``: which of some choices answers a text."""

    model: str
    input: str | dict[str, object] | list[str | dict[str, object]]
    choices: list[str] | None = None
    draws: int | None = Field(None, ge=1)

    @property
    def rows(self) -> list[str | dict[str, object]]:
        """The texts, or rows of columns."""
        return self.input if isinstance(self.input, list) else [self.input]
