"""The answers' fields, for the description at ``/openapi.json``; `responses` writes them."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

Finish = Literal["stop", "length"]


class TokenProb(TypedDict):
    """A token and its probability."""

    token: str
    prob: float


class TokenUncertainty(TokenProb):
    """What is uncertain about a token, in nats."""

    entropy: float
    mutual_information: float
    alternatives: list[TokenProb]


class Uncertainty(TypedDict):
    """What is uncertain about an answer, in nats."""

    draws: int
    log_likelihood: float
    log_mean_likelihood: float
    mean_entropy: float
    mean_mutual_information: float
    max_mutual_information: float
    tokens: list[TokenUncertainty]


class Usage(TypedDict):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(TypedDict):
    """What all answers have."""

    index: int
    finish_reason: Finish
    uncertainty: Uncertainty


class TextLogProbs(TypedDict):
    """Log-probabilities of a text, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Choice):
    """One text."""

    text: str
    logprobs: TextLogProbs | None


class Head(TypedDict):
    """What begins a whole answer."""

    id: str
    created: int
    model: str
    usage: Usage


class TextAnswer(Head):
    """Answer of ``/v1/completions``."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class TokenLogProb(TypedDict):
    """A token's log-probability and bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogProb(TokenLogProb):
    """A token's log-probability, and those of the most probable ones."""

    top_logprobs: list[TokenLogProb]


class ChatLogProbs(TypedDict):
    """Log-probabilities of a message."""

    content: list[ChatTokenLogProb]
    refusal: None


class ChatMessage(TypedDict):
    """The message that answers a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    """One message."""

    message: ChatMessage
    logprobs: ChatLogProbs | None


class ChatAnswer(Head):
    """Answer of ``/v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Classified(TypedDict):
    """The prediction of one input."""

    index: int
    answer: str
    probs: dict[str, float]
    confidence: float
    entropy: float
    mutual_information: float
    disagreement: float


class Classification(TypedDict):
    """Answer of ``/v1/classify``."""

    object: Literal["list"]
    model: str
    draws: int
    data: list[Classified]


class Model(TypedDict):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    draws: int
    most_draws: int
    generates: bool


class Models(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """Whether the server answers."""

    status: Literal["ok", "failed"]


class ErrorFields(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """Answer of a request that is refused or fails."""

    error: ErrorFields
