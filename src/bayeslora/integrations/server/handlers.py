"""From a request to rows of the model, and from their tokens to OpenAI's answers, whole or as a stream."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import islice
from typing import final

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from bayeslora.errors import InputError
from bayeslora.integrations.server.classification import Asked, prediction_json
from bayeslora.integrations.server.decoding import Echo, Generation, Row, TokenNote
from bayeslora.integrations.server.echo import echo_of, scoring
from bayeslora.integrations.server.errors import ApiError, api_error
from bayeslora.integrations.server.requests import ChatRequest, ClassifyRequest, CompletionRequest, Sampled
from bayeslora.integrations.server.responses import ChatCompletion, Completion, Json, TextCompletion
from bayeslora.integrations.server.waiting import Client
from bayeslora.integrations.server.worker import Worker
from bayeslora.prediction.generation.run import check_room, prompt_ids

logger = logging.getLogger(__name__)


@final
class Handler:
    """Answers requests by jobs for the worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.served, self.limits = worker, worker.served, worker.limits
        self.created = int(time.time())

    async def models(self) -> Json:
        """List the models."""
        return {"object": "list", "data": [await self.model(name) for name in self.served.names]}

    async def model(self, name: str) -> Json:
        """Describe a model."""
        served = self.served
        draws, most = (served.draws, served.most_draws) if self._known(name) == served.name else (1, 1)
        info: Json = {"id": name, "object": "model", "created": self.created, "owned_by": "bayeslora"}
        return {**info, "root": served.name, "draws": draws, "most_draws": most, "generates": served.generates}

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Answer ``/v1/completions``."""
        client, draws = self._client(request), self._draw_count(body.model, body.draws)
        prompts, max_tokens = body.prompts, min(16, self.limits.tokens) if body.max_tokens is None else body.max_tokens
        self._check_answers(len(prompts) * body.n, max_tokens)
        encoded = await run_in_threadpool(lambda: [self._prompt_ids(prompt, max_tokens) for prompt in prompts])
        echoes = await self._echoes(client, body, draws, encoded) if body.echo else [Echo()] * len(prompts)
        rows = self._rows(body, encoded, max_tokens, echoes)
        return await self._respond(client, body, TextCompletion(body.model, draws, body.logprobs), rows)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer ``/v1/chat/completions``."""
        client, draws = self._client(request), self._draw_count(body.model, body.draws)
        max_tokens = body.max_completion_tokens or body.max_tokens or min(256, self.limits.tokens)
        self._check_answers(body.n, max(max_tokens, body.max_tokens or 0))
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        ids = await run_in_threadpool(self._prompt_ids, messages, max_tokens)
        rows = self._rows(body, [ids], max_tokens, [Echo()])
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await self._respond(client, body, ChatCompletion(body.model, draws, top), rows)

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        """Answer ``/v1/classify``."""
        client, draws = self._client(request), self._draw_count(body.model, body.draws)
        classes, rows = self.served.like.classes, body.rows
        if classes is not None and body.choices is not None and tuple(body.choices) != classes:
            raise ApiError(
                400, f"this model was trained on the classes {list(classes)}; leave choices out", param="choices"
            )
        choices = classes or tuple(body.choices or ())
        if len(set(choices)) < 2 or len(set(choices)) != len(choices) or not all(map(str.strip, choices)):
            raise ApiError(400, "choices must be at least two different texts, none of them blank", param="choices")
        if classes is None:
            _at_most(len(choices), self.limits.choices, "choices", "choices")
            _at_most(max(map(len, choices)), self.limits.characters, "characters of a choice", "choices")
        if not rows:
            raise ApiError(400, "input is empty; give at least one text", param="input")
        _at_most(len(rows), self.limits.texts, "texts", "input")
        try:
            asked = Asked(self.served, body.model, draws, choices, self.limits.characters)
            parts = await run_in_threadpool(asked.parts, rows)
            found = await client.results(parts)
        except InputError as error:
            raise ApiError(400, str(error), param="input") from error
        data = [row for prediction in found for row in prediction_json(prediction, choices)]
        data = [{"index": index, **row} for index, row in enumerate(data)]
        return JSONResponse({"object": "list", "model": body.model, "draws": found[0].draws, "data": data})

    def _client(self, request: Request) -> Client:
        """Return who waits for the answer to a request that has just come."""
        return Client(self.worker, request, time.monotonic() + self.limits.timeout)

    def _known(self, name: str) -> str:
        """Return a model's name, or refuse it."""
        if name not in self.served.names:
            raise ApiError(404, f"there is no model {name!r}; GET /v1/models lists them", "model_not_found", "model")
        return name

    def _draw_count(self, name: str, requested: int | None) -> int:
        """Return how many draws a request averages, or refuse it."""
        most, distinct = self.served.most_draws, self.served.posterior.distinct
        if requested is not None and requested > most:
            raise ApiError(400, f"draws is {requested}, and this server has at most {most}", param="draws")
        if self._known(name) != self.served.name:
            return 1
        return min(self.served.draws if requested is None else requested, most if distinct is None else distinct)

    def _check_answers(self, count: int, max_tokens: int) -> None:
        """Refuse what no answer can be, or too many or too long ones, before anything is tokenised."""
        if not self.served.generates:
            raise ApiError(400, "this model classifies and cannot generate; use /v1/classify", param="model")
        _at_most(count, self.limits.rows, "answers at once", "n")
        _at_most(max_tokens, self.limits.tokens, "new tokens", "max_tokens")

    def _prompt_ids(self, prompt: str | list[int] | list[dict[str, str]], max_tokens: int) -> list[int]:
        """Return a prompt's tokens, or refuse it."""
        served, longest, room = self.served, self.limits.characters, self.limits.context
        try:
            if isinstance(prompt, str):
                _at_most(len(prompt), longest, "characters", "prompt")
                return prompt_ids(served.model, served.tokenizer, prompt, max_tokens, room)
            elif messages := [part for part in prompt if isinstance(part, dict)]:
                _at_most(sum(len(part["content"]) for part in messages), longest, "characters", "messages")
                return prompt_ids(served.model, served.tokenizer, messages, max_tokens, room)
            else:
                tokens = [part for part in prompt if isinstance(part, int)]
                _at_most(len(tokens), longest, "token ids", "prompt")
                if any(not 0 <= token < len(served.tokenizer) for token in tokens):
                    raise InputError(f"must have tokens from 0 to {len(served.tokenizer) - 1}")
                return check_room(served.model, tokens, max_tokens, room)
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses the messages: {error}", param="messages") from error
        except InputError as error:
            code = "context_length_exceeded" if "more than the" in str(error) else None
            raise ApiError(400, f"the prompt {error}", code, "prompt") from error

    def _rows(self, body: Sampled, prompts: Sequence[list[int]], max_tokens: int, echoes: Sequence[Echo]) -> list[Row]:
        """Return the rows that a request wants, n for each prompt."""
        seed = random.getrandbits(31) if body.seed is None else body.seed
        how = max_tokens, body.temperature, body.top_p
        return [
            Row(ids, *how, seed=1000 * seed + p * body.n + i, stops=body.stops, echo=echo)
            for p, (ids, echo) in enumerate(zip(prompts, echoes, strict=True))
            for i in range(body.n)
        ]

    async def _echoes(
        self, client: Client, body: CompletionRequest, draws: int, encoded: Sequence[list[int]]
    ) -> list[Echo]:
        """Return the prompts, with the log-probabilities of their tokens where they are wanted."""
        served, top = self.served, body.logprobs
        if top is None:
            parts, scores = [], None
        else:
            parts = [scoring(served, body.model, draws, ids, top) for ids in encoded]
            scores = iter(await client.results([part for some in parts for part in some]) if any(parts) else ())

        def echoes() -> list[Echo]:
            """Return each prompt with its own scores."""
            if scores is None:
                pairs = zip(body.prompts, encoded, strict=True)
                return [echo_of(served.tokenizer, prompt, ids, None) for prompt, ids in pairs]
            own = [[score for part in islice(scores, len(some)) for score in part] for some in parts]
            rows = zip(body.prompts, encoded, own, strict=True)
            return [echo_of(served.tokenizer, *row) for row in rows]

        return await run_in_threadpool(echoes)

    async def _respond(self, client: Client, body: Sampled, shape: Completion, rows: list[Row]) -> Response:
        """Put rows into the queue, and return the answer or the stream."""
        arriving = client.tokens(Generation(body.model, shape.draws, rows, client.deadline))
        if body.stream:
            events = _events(shape, rows, arriving, body.with_usage)
            return _Stream(events, rows)
        async for _ in arriving:
            pass
        return JSONResponse(shape.whole(rows))


@final
class _Stream(StreamingResponse):
    """Server-sent events; once they are over, even before the first, nobody works for them any more."""

    def __init__(self, events: AsyncIterator[str], rows: Sequence[Row]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for row in self.rows:
                row.cancelled.set()


def _at_most(count: int, most: int, what: str, param: str) -> None:
    """Refuse more than this server allows."""
    if count > most:
        raise ApiError(400, f"{count} {what} are more than this server's {most}; ask for fewer", param=param)


async def _events(
    shape: Completion, rows: list[Row], arriving: AsyncIterator[tuple[int, TokenNote]], with_usage: bool
) -> AsyncIterator[str]:
    """Yield the events of a stream; whatever fails is its last one."""
    try:
        for number in range(len(rows)):
            opening = shape.opening(number)
            if opening is not None:
                yield _event(opening)
        async for number, note in arriving:
            yield _event(shape.piece(number, note))
        if with_usage:
            yield _event(shape.closing(rows))
        yield "data: [DONE]\n\n"
    except Exception as error:
        if not isinstance(error, (ApiError, InputError)):
            logger.exception("a stream failed")
        yield _event(api_error(error).body)


def _event(value: Mapping[str, object]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
