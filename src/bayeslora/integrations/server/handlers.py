"""From a request to rows of the model, and from their tokens to OpenAI's answers, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar, final

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bayeslora.errors import InputError
from bayeslora.integrations.server.classification import prediction_json, split_of
from bayeslora.integrations.server.decoding import Echo, Generation, Row, TokenNote
from bayeslora.integrations.server.errors import ApiError, api_error, late
from bayeslora.integrations.server.requests import ChatRequest, ClassifyRequest, CompletionRequest, Sampled
from bayeslora.integrations.server.responses import ChatCompletion, Completion, Json, TextCompletion, echo_of
from bayeslora.integrations.server.worker import Call, Worker, prompt_log_probs
from bayeslora.posteriors import Draws
from bayeslora.prediction import predict
from bayeslora.prediction.generation.run import check_room, prompt_ids

Result = TypeVar("Result")
POLL = 0.5
"""Seconds between two checks whether the client is still there."""


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
        prompts = [self._prompt_ids(prompt, body.max_tokens) for prompt in body.prompts]
        if not prompts:
            raise ApiError(400, "prompt is empty; give at least one", param="prompt")
        rows = self._rows(body, prompts, body.max_tokens)
        shape = TextCompletion(body.model, self._draw_count(body.model, body.draws), body.logprobs)
        if body.echo:
            for number, row in enumerate(rows):
                row.echo = await self._echo(shape, body, body.prompts[number // body.n], row.ids)
        return await self._respond(body, shape, rows, request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer ``/v1/chat/completions``."""
        max_tokens = body.max_completion_tokens or body.max_tokens or min(256, self.limits.tokens)
        ids = self._prompt_ids(
            [{"role": message.role, "content": message.text} for message in body.messages], max_tokens
        )
        rows = self._rows(body, [ids], max_tokens)
        top = (body.top_logprobs or 0) if body.logprobs else None
        shape = ChatCompletion(body.model, self._draw_count(body.model, body.draws), top)
        return await self._respond(body, shape, rows, request)

    async def classify(self, body: ClassifyRequest) -> Response:
        """Answer ``/v1/classify``."""
        served, draws = self.served, self._draw_count(body.model, body.draws)
        classes = served.like.classes
        if classes is not None and body.choices is not None and tuple(body.choices) != classes:
            raise ApiError(
                400, f"this model was trained on the classes {list(classes)}; leave choices out", param="choices"
            )
        choices = classes or tuple(body.choices or ())
        if len(set(choices)) < 2 or len(set(choices)) != len(choices):
            raise ApiError(400, "choices must be at least two different texts", param="choices")
        if not body.rows:
            raise ApiError(400, "input is empty; give at least one text", param="input")
        try:
            split = split_of(served.like, body.rows, choices, served.text_column)
        except InputError as error:
            raise ApiError(400, str(error), param="input") from error
        prediction = await self._call(
            lambda: predict(
                served.model, served.posterior_of(body.model), split, Draws(draws, served.seed),
                tokenizer=served.tokenizer, mean=False,
            )
        )  # fmt: skip
        data = prediction_json(prediction, choices)
        return JSONResponse({"object": "list", "model": body.model, "draws": prediction.draws, "data": data})

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
        return min(requested or self.served.draws, most if distinct is None else distinct)

    def _prompt_ids(self, prompt: str | list[int] | list[dict[str, str]], max_tokens: int) -> list[int]:
        """Return a prompt's tokens, or refuse it."""
        served = self.served
        if not served.generates:
            raise ApiError(400, "this model classifies and cannot generate; use /v1/classify", param="model")
        if max_tokens > self.limits.tokens:
            raise ApiError(
                400, f"{max_tokens} new tokens are more than this server's {self.limits.tokens}; ask for fewer",
                param="max_tokens",
            )  # fmt: skip
        try:
            if isinstance(prompt, str):
                return prompt_ids(served.model, served.tokenizer, prompt, max_tokens)
            messages = [part for part in prompt if isinstance(part, dict)]
            if messages:
                return prompt_ids(served.model, served.tokenizer, messages, max_tokens)
            tokens = [part for part in prompt if isinstance(part, int)]
            if any(not 0 <= token < len(served.tokenizer) for token in tokens):
                raise InputError(f"must have tokens from 0 to {len(served.tokenizer) - 1}")
            return check_room(served.model, tokens, max_tokens)
        except InputError as error:
            code = "context_length_exceeded" if "more than the model's" in str(error) else None
            raise ApiError(400, f"the prompt {error}", code, "prompt") from error

    def _rows(self, body: Sampled, prompts: Sequence[list[int]], max_tokens: int) -> list[Row]:
        """Return the rows that a request wants, n for each prompt."""
        count = len(prompts) * body.n
        if count > self.limits.rows:
            raise ApiError(
                400, f"{count} answers are more than this server gives at once, {self.limits.rows}; ask for fewer",
                param="n",
            )  # fmt: skip
        seed = random.getrandbits(31) if body.seed is None else body.seed
        return [
            Row(ids, max_tokens, body.temperature, body.top_p, 1000 * seed + p * body.n + i, body.stops)
            for p, ids in enumerate(prompts)
            for i in range(body.n)
        ]

    async def _call(self, work: Callable[[], Result]) -> Result:
        """Do something in the model's thread."""
        job = Call([work])
        self.worker.submit(job)
        try:
            return (await asyncio.wait_for(asyncio.wrap_future(job.result), self.limits.timeout))[0]
        except TimeoutError as error:
            raise late() from error

    async def _echo(
        self, shape: TextCompletion, body: CompletionRequest, prompt: str | list[int], ids: list[int]
    ) -> Echo:
        """Return a prompt, with the log-probabilities of its tokens where they are wanted."""
        served, log_p = self.served, None
        if body.logprobs is not None:
            log_p = await self._call(
                lambda: prompt_log_probs(served.model, served.tokenizer, served.draws_of(body.model, shape.draws), ids)
            )
        return echo_of(served.tokenizer, prompt, ids, log_p, body.logprobs or 0)

    async def _respond(self, body: Sampled, shape: Completion, rows: list[Row], request: Request) -> Response:
        """Put rows into the queue, and return the answer or the stream."""
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[tuple[int, TokenNote | None]] = asyncio.Queue()

        def pass_on(number: int, note: TokenNote | None) -> None:
            """Take a token from the model's thread to this one, if there is still somebody to read it."""
            if not loop.is_closed():
                loop.call_soon_threadsafe(tokens.put_nowait, (number, note))

        for number, row in enumerate(rows):
            row.on_token = partial(pass_on, number)
        job = Generation(body.model, shape.draws, rows, time.monotonic() + self.limits.timeout)
        if rows[0].max_tokens:
            self.worker.submit(job)
        else:
            for row in rows:
                row.finish = "length"
                row.on_token(None)
        arriving = self._arriving(job, tokens, request)
        if body.stream:
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            events = _events(shape, rows, arriving, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for _ in arriving:
            pass
        return JSONResponse(shape.whole(rows))

    async def _arriving(
        self, job: Generation, tokens: asyncio.Queue[tuple[int, TokenNote | None]], request: Request
    ) -> AsyncIterator[tuple[int, TokenNote]]:
        """Yield tokens until all rows have ended; whoever stops listening ends the rows."""
        left, deadline = len(job.rows), time.monotonic() + self.limits.timeout
        try:
            while left:
                if time.monotonic() > deadline or await request.is_disconnected():
                    raise late()
                try:
                    number, note = await asyncio.wait_for(tokens.get(), POLL)
                except TimeoutError:
                    continue
                if note is None:
                    left -= 1
                else:
                    yield number, note
        finally:
            for row in job.rows:
                row.cancelled.set()
        if job.error is not None:
            raise job.error


async def _events(
    shape: Completion, rows: list[Row], arriving: AsyncIterator[tuple[int, TokenNote]], with_usage: bool
) -> AsyncIterator[str]:
    """Yield the events of a stream."""
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
    except (ApiError, InputError) as error:
        yield _event(api_error(error).body)


def _event(value: Mapping[str, object]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
