"""Requests as OpenAI's interface has them, and those to classify.

Types are strict, so that no number is read out of a text; fields that are not known here are ignored, for clients of
other servers send many. What one server allows beyond this is in `Limits`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from bayeslora.integrations.server.errors import ApiError

Value = TypeVar("Value")


def _refuse(value: Value, info: ValidationInfo) -> Value:
    """Refuse a field that would be left out silently, unless its value asks for nothing."""
    if value:
        name = info.field_name
        raise ApiError(400, f"{name} is not supported; leave it out", "unsupported_parameter", name)
    return value


def _whole(value: object) -> object:
    """Return 1 for 1.0, which JSON calls an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Unsupported = AfterValidator(_refuse)
Whole = BeforeValidator(_whole)
NoNumber = Annotated[float | None, Unsupported, WithJsonSchema({"enum": [None, 0]})]
NoObject = Annotated[dict[str, float] | None, Unsupported, WithJsonSchema({"enum": [None, {}]})]
NoList = Annotated[list[object] | None, Unsupported, WithJsonSchema({"enum": [None, []]})]
NoText = Annotated[str | None, Unsupported, WithJsonSchema({"enum": [None, ""]})]
OnlyOne = Annotated[int | None, WithJsonSchema({"enum": [None, 1]}), Whole]
Stop = Annotated[str, Field(max_length=256)]
Count = Annotated[int, Field(ge=1), Whole]
DrawCount = Annotated[int, Field(ge=0), Whole]
"""0 is the mean."""
Top = Annotated[int, Field(ge=0, le=5), Whole]
Seed = Annotated[int, Whole]
TokenId = Annotated[int, Field(ge=0), Whole]
Filled = Field(json_schema_extra={"minItems": 1})  # an empty list gets a clearer refusal than one for each type
TokenIds = Annotated[list[TokenId], Filled]


class Strict(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has besides its pieces."""

    include_usage: bool | None = None


class Sampled(Strict):
    """What both kinds of completion have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: Annotated[int, Field(ge=1, le=128), Whole] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Seed | None = None
    draws: DrawCount | None = None
    presence_penalty: NoNumber = None
    frequency_penalty: NoNumber = None
    logit_bias: NoObject = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class CompletionRequest(Sampled):
    """``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Filled]
        | TokenIds
        | Annotated[list[TokenIds], Filled]
    )  # fmt: skip
    max_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    logprobs: Top | None = None
    echo: bool = False
    best_of: OnlyOne = None
    suffix: NoText = None

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


class Part(Strict):
    """A part of a message."""

    type: Annotated[str, WithJsonSchema({"const": "text"})]
    text: str = ""

    @field_validator("type")
    @classmethod
    def _only_text(cls, value: str) -> str:
        """Refuse images and sounds."""
        if value != "text":
            raise ApiError(400, f"a part of a message is of type {value!r}; give text only", param="messages")
        return value


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=64)] | None = None

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class ChatRequest(Sampled):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Top | None = None
    tools: NoList = None
    response_format: Annotated[dict[str, object] | None, WithJsonSchema({"enum": [None, {"type": "text"}]})] = None

    @field_validator("response_format")
    @classmethod
    def _only_text(cls, value: dict[str, object] | None, info: ValidationInfo) -> dict[str, object] | None:
        """Refuse any format but text."""
        return value if (value or {}).get("type", "text") == "text" else _refuse(value, info)


Columns = dict[str, object]


class ClassifyRequest(Strict):
    """``/v1/classify``: which of some choices answers a text."""

    model: str
    input: str | Columns | Annotated[list[str | Columns], Filled]
    choices: list[str] | None = None
    draws: DrawCount | None = None

    @property
    def rows(self) -> list[str | dict[str, object]]:
        """The texts, or rows of columns."""
        return self.input if isinstance(self.input, list) else [self.input]
