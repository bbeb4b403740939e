"""From a request to rows of the model, and from their tokens to OpenAI's answers, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, final

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bayeslora.errors import InputError
from bayeslora.integrations.server.asked import answers, split_of
from bayeslora.integrations.server.decoding import Row, TokenNote
from bayeslora.integrations.server.requests import ApiError, ChatRequest, ClassifyRequest, CompletionRequest, Sampled
from bayeslora.integrations.server.responses import Chat, Shape, Text, echoed, placed
from bayeslora.integrations.server.worker import Call, Generation, Served, Worker, prompt_log_probs
from bayeslora.params import Params
from bayeslora.posteriors import Draws
from bayeslora.prediction import predict
from bayeslora.prediction.generation.run import prompt_ids

LOOK = 0.5
"""Seconds between two looks whether the client is still there."""


@final
class Answering:
    """Answers requests.

    Args:
        served: What answers.
        worker: The thread that has the model.
        most_tokens: Most new tokens of an answer.
        timeout: Most seconds of a request.
    """

    def __init__(self, served: Served, worker: Worker, most_tokens: int, timeout: float) -> None:
        self.served, self.worker, self.most_tokens, self.timeout = served, worker, most_tokens, timeout

    def known(self, name: str) -> str:
        """Return a model's name, or refuse it.

        Args:
            name: What the client asked for.

        Raises:
            ApiError: If there is no such model.
        """
        if name not in self.served.names:
            raise ApiError(404, f"there is no model {name!r}; GET /v1/models lists them", "model_not_found", "model")
        return name

    def draws(self, name: str, asked: int | None) -> tuple[tuple[str, int], Callable[[], list[Params]]]:
        """Return what a request's draws are known by, and how to get them.

        Args:
            name: Name of the model.
            asked: Number of draws that the client asked for; None for the server's.

        Raises:
            ApiError: If there are too many.
        """
        served = self.served
        if asked is not None and asked > served.most_draws:
            raise ApiError(400, f"draws is {asked}, and this server has at most {served.most_draws}", param="draws")
        if self.known(name) != served.name:
            return (name, 1), lambda: [served.posterior_of(name).mean]
        distinct = served.posterior.distinct
        count = min(asked or served.draws, distinct if distinct is not None else served.most_draws)
        return (name, count), lambda: [served.drawn(k) for k in range(count)]

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        """Answer ``/v1/completions``."""
        best_of = body.best_of if body.best_of != body.n else None
        body.refuse({"suffix": body.suffix, "best_of": best_of if best_of not in (None, 1) else None})
        if body.echo and body.stream:
            raise ApiError(400, "echo cannot be streamed; leave out one of the two", param="echo")
        prompts = [self._prompt(p, body.max_tokens) for p in body.prompts]
        if not prompts:
            raise ApiError(400, "prompt is empty; give at least one", param="prompt")
        shape = Text(body.model, body.logprobs)
        rows = self._rows(body, prompts, body.max_tokens)
        before: list[dict[str, Any]] | None = None
        if body.echo:
            given = zip(body.prompts, prompts, strict=True)
            before = [await self._echo(body, prompt, ids) for prompt, ids in given for _ in range(body.n)]
        return await self._respond(body, shape, rows, request, before)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer ``/v1/chat/completions``."""
        kind = (body.response_format or {}).get("type", "text")
        body.refuse({"tools": body.tools, "response_format": None if kind == "text" else kind})
        longest = body.max_completion_tokens or body.max_tokens or min(256, self.most_tokens)
        messages = [{"role": m.role, "content": m.text} for m in body.messages]
        ids = self._prompt(messages, longest)
        shape = Chat(body.model, (body.top_logprobs or 0) if body.logprobs else None)
        return await self._respond(body, shape, self._rows(body, [ids], longest), request, None)

    async def classify(self, body: ClassifyRequest) -> Response:
        """Answer ``/v1/classify``."""
        served, (key, _) = self.served, self.draws(body.model, body.draws)
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

        def work() -> Any:
            """Predict."""
            posterior = served.posterior_of(body.model)
            return predict(
                served.model, posterior, split, Draws(key[1], served.seed), tokenizer=served.tokenizer, mean=False
            )

        found = await self._call(work)
        return JSONResponse(
            {"object": "list", "model": body.model, "draws": found.draws, "data": answers(found, choices)}
        )

    def _prompt(self, prompt: str | list[int] | list[dict[str, str]], longest: int) -> list[int]:
        """Return a prompt's tokens, or refuse it."""
        served = self.served
        if not served.generates:
            raise ApiError(400, "this model classifies and cannot generate; use /v1/classify", param="model")
        if longest > self.most_tokens:
            raise ApiError(
                400, f"{longest} new tokens are more than this server's {self.most_tokens}; ask for fewer",
                param="max_tokens",
            )  # fmt: skip
        try:
            if isinstance(prompt, list) and all(isinstance(p, int) for p in prompt):
                ids = [p for p in prompt if isinstance(p, int)]
                size = len(served.tokenizer)
                if not ids:
                    raise InputError("is empty; give it at least one token")
                if min(ids) < 0 or max(ids) >= size:
                    raise InputError(f"must have tokens from 0 to {size - 1}")
                return ids
            chat = [p for p in prompt if isinstance(p, dict)]
            return prompt_ids(served.model, served.tokenizer, prompt if isinstance(prompt, str) else chat, longest)
        except InputError as error:
            code = "context_length_exceeded" if "more than the model's" in str(error) else None
            raise ApiError(400, f"the prompt {error}", code, "prompt") from error

    def _rows(self, body: Sampled, prompts: Sequence[list[int]], longest: int) -> list[Row]:
        """Return the rows that a request asks for."""
        if len(prompts) * body.n > self.worker.most_rows:
            raise ApiError(
                400, f"{len(prompts) * body.n} answers are more than this server gives at once, "
                f"{self.worker.most_rows}; ask for fewer", param="n",
            )  # fmt: skip
        seed = random.getrandbits(31) if body.seed is None else body.seed
        deadline = time.monotonic() + self.timeout
        return [
            Row(ids, longest, body.temperature, body.top_p, 1000 * seed + p * body.n + i, body.stops, deadline)
            for p, ids in enumerate(prompts)
            for i in range(body.n)
        ]

    async def _call(self, work: Callable[[], Any]) -> Any:
        """Do something in the model's thread."""
        job = Call(work)
        self.worker.submit(job)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.result), self.timeout)
        except TimeoutError as error:
            raise _late() from error

    async def _echo(self, body: CompletionRequest, prompt: str | list[int], ids: list[int]) -> dict[str, Any]:
        """Return a prompt with the log-probabilities of its tokens."""
        _, drawn = self.draws(body.model, body.draws)
        text, starts = placed(self.served.tokenizer, prompt, ids)
        if body.logprobs is None:
            return {"text": text, "logprobs": None}
        log_p = await self._call(lambda: prompt_log_probs(self.served.model, drawn(), ids))
        return {"text": text, "logprobs": echoed(self.served.tokenizer, ids, starts, log_p, body.logprobs)}

    async def _respond(
        self, body: Sampled, shape: Shape, rows: list[Row], request: Request, before: list[dict[str, Any]] | None
    ) -> Response:
        """Put rows into the queue, and return the answer or the stream."""
        key, drawn = self.draws(body.model, body.draws)
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[tuple[int, TokenNote | None]]()

        def teller(number: int) -> Callable[[TokenNote | None], None]:
            """Return what passes a row's tokens from the model's thread to this one."""

            def told(note: TokenNote | None) -> None:
                """Pass it on, if there is still somebody to take it."""
                if not loop.is_closed():
                    loop.call_soon_threadsafe(tokens.put_nowait, (number, note))

            return told

        for number, row in enumerate(rows):
            row.told = teller(number)
        job = Generation(drawn, key, rows)
        numbers = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        if rows[0].longest:
            self.worker.submit(job)
        else:
            for row in rows:
                row.finish = "length"
                row.told(None)
        arriving = self._arriving(rows, job, tokens, request)
        if body.stream:
            usage = bool((body.stream_options or {}).get("include_usage"))
            stream = _streamed(shape, numbers, rows, arriving, key[1], usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for _ in arriving:
            pass
        return JSONResponse(shape.whole(numbers, rows, before, key[1]))

    async def _arriving(
        self, rows: list[Row], job: Generation, tokens: asyncio.Queue[tuple[int, TokenNote | None]], request: Request
    ) -> AsyncIterator[tuple[int, TokenNote]]:
        """Yield tokens until all rows have ended; whoever stops listening ends the rows."""
        left, deadline = len(rows), rows[0].deadline + LOOK
        try:
            while left:
                try:
                    number, note = await asyncio.wait_for(tokens.get(), LOOK)
                except TimeoutError:
                    if time.monotonic() > deadline or await request.is_disconnected():
                        raise _late() from None
                    continue
                if note is None:
                    left -= 1
                else:
                    yield number, note
        finally:
            for row in rows:
                row.cancelled.set()
        if job.error is not None:
            raise job.error
        if any(row.finish == "timeout" for row in rows):
            raise _late()


def _late() -> ApiError:
    """Return what is said when the time is over."""
    return ApiError(504, "the answer took too long; ask for fewer tokens or draws", "timeout", kind="server_error")


async def _streamed(
    shape: Shape,
    numbers: dict[str, Any],
    rows: list[Row],
    arriving: AsyncIterator[tuple[int, TokenNote]],
    draws: int,
    usage: bool,
) -> AsyncIterator[str]:
    """Yield the events of a stream."""
    try:
        for number in range(len(rows)):
            first = shape.opening(numbers, number, draws)
            if first is not None:
                yield _event(first)
        async for number, note in arriving:
            yield _event(shape.piece(numbers, number, note, rows[number].finish))
        if usage:
            yield _event(shape.closing(numbers, rows))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
    except InputError as error:
        yield _event(ApiError(400, str(error)).body)


def _event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, default=_plain)}\n\n"


def _plain(value: Any) -> float | None:
    """Return a number that JSON has."""
    return None if math.isnan(value) or math.isinf(value) else float(value)
