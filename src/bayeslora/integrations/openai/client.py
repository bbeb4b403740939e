"""Draws on a server: the adapters of `bayeslora export`, asked over OpenAI's ``/v1/completions`` and averaged here.

A text's log-likelihood under an adapter is the sum of its tokens' log-probabilities after the prompt, which the server
gives back for a prompt that holds both (``echo``, ``logprobs``). What is averaged over the adapters are probabilities:
of a task's choices, after a softmax over them, or of whole texts. vLLM answers so, and every server that echoes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar, final

import torch
from torch import Tensor

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.integrations.openai.echo import Query, queries_of_split, query_of_texts, unique_queries
from bayeslora.integrations.openai.session import Connection, Session
from bayeslora.metrics.prediction import Prediction
from bayeslora.prediction.generation.answers import Answers
from bayeslora.prediction.generation.semantic import Equivalence
from bayeslora.tasks.types import Split

if TYPE_CHECKING:
    import httpx

__all__ = ["Adapters"]

Result = TypeVar("Result")
FIXED_SETTINGS = ("model", "prompt", "echo", "stream", "logprobs")
"""Fields of a request that a caller's settings cannot change."""


@final
@dataclass(frozen=True)
class Adapters:
    """Draws of a posterior that a server holds as adapters.

    Attributes:
        url: The server's address, such as ``http://localhost:8000``, with or without ``/v1``.
        names: The adapters, one a draw; none: all that the server says are adapters of its base model.
        api_key: The server's key, if it wants one.
        tokenizer: The base model's tokenizer, with which prompts are sent as tokens: needed where a format cuts long
            prompts, and for servers whose tokens do not add up to the text. None sends texts.
        concurrency: Most requests under way at once.
        timeout: Seconds to wait for an answer.
        retries: How often a request is sent again after 429, 502, 503, 504, a lost connection or no answer in time.
        backoff: Seconds before it is sent again the first time; each next wait is twice as long.
        transport: A transport of httpx in the place of the network's.
    """

    url: str
    names: Sequence[str] = ()
    api_key: str | None = field(default=None, repr=False)
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    concurrency: int = 32
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 0.5
    transport: httpx.AsyncBaseTransport | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse names that are no list of different adapters, and settings out of range."""
        if isinstance(self.names, str) or len(set(self.names)) < len(self.names):
            raise InputError(f"names must be a list of different adapters, and it is {self.names!r}")
        _ = self.connection

    @cached_property
    def connection(self) -> Connection:
        """How the server is reached."""
        return Connection(
            self.url, self.api_key, self.concurrency, self.timeout, self.retries, self.backoff, self.transport
        )

    def served(self) -> tuple[str, ...]:
        """Return the names of the adapters that the server holds, without its base model."""
        return self._run(lambda session: session.served())

    def predict(self, split: Split) -> Prediction:
        """Return every adapter's probabilities of the choices; see `bayeslora.predict`.

        Args:
            split: The N examples; their format's readout is ``letters``, ``likelihood`` or ``auto``.

        Returns:
            The prediction, a draw for each adapter; without a pass at the mean, and without a Monte Carlo error, for a
            server does not say how its adapters were drawn.
        """
        queries, neutral, readout, cut = queries_of_split(split, self.tokenizer)
        unique, numbers = unique_queries(neutral)
        began = time.perf_counter()
        draws = self._run(lambda session: session.log_likelihoods([*queries, *unique]))
        widest = max(len(query.answers) for query in queries)
        scores = [
            [[*row, *[-math.inf] * (widest - len(row))] for row in _scores(draw, queries, numbers)] for draw in draws
        ]
        log_probs = torch.tensor(scores, dtype=torch.float64).log_softmax(-1).float()
        return Prediction(log_probs, truncated=cut, readout=readout, seconds=time.perf_counter() - began)

    def log_likelihoods(self, prompt: str, texts: Sequence[str]) -> Float[Tensor, "S N"]:
        """Return each adapter's log-likelihood of texts after a prompt, the end of the text not counted.

        Args:
            prompt: What comes before.
            texts: The N texts, each with the space that it begins with.

        Returns:
            Natural logarithms.
        """
        query = query_of_texts(prompt, texts, self.tokenizer)
        return torch.tensor([draw[0] for draw in self._run(lambda session: session.log_likelihoods([query]))])

    def score(self, prompt: str, texts: Sequence[str]) -> Float[Tensor, " N"]:
        """Return the log of the adapters' average likelihood of texts after a prompt.

        Args:
            prompt: See `log_likelihoods`.
            texts: See `log_likelihoods`.

        Returns:
            log (1/S) Σ_k p_k(text | prompt) of each.
        """
        each = self.log_likelihoods(prompt, texts)
        return each.logsumexp(0) - math.log(len(each))

    def generate_each(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        n: int = 1,
        seed: int | None = None,
        same: Equivalence | None = None,
        **settings: object,
    ) -> list[Answers]:
        """Return answers of each adapter to each prompt, and which of them say the same.

        Args:
            prompts: Texts.
            max_tokens: Most tokens of an answer.
            temperature: Of the tokens; 1 samples from each draw, 0 takes its most probable tokens.
            n: Answers of each adapter.
            seed: Seed of the tokens; adapter k has ``seed + k``. None leaves it to the server.
            same: Whether two texts say the same; see `bayeslora.generate_each`.
            **settings: More of the request, such as ``top_p`` or ``stop``.

        Returns:
            The answers to each prompt, adapter after adapter. A server gives no entropies (they are not a number), and
            mostly no token ids (-1).

        Raises:
            InputError: If a setting is not the caller's, or a number makes no sense.
        """
        for key in settings.keys() & set(FIXED_SETTINGS):
            raise InputError(f"generate_each sets {key!r} itself; leave it out")
        if n < 1 or max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, and they are {n} and {max_tokens}")
        body = {"max_tokens": max_tokens, "temperature": temperature, **settings}
        draws = self._run(lambda session: session.texts(prompts, n, body, seed))
        numbers = tuple(k for k in range(len(draws)) for _ in range(n))
        return [
            Answers.of(tuple(answer for draw in draws for answer in draw[i]), numbers, same)
            for i in range(len(prompts))
        ]

    def _run(self, work: Callable[[Session], Awaitable[Result]]) -> Result:
        """Do asynchronous work to its end, also where a loop runs already, as in a notebook."""

        async def connected() -> Result:
            """Open a session, work, and close it."""
            async with self.connection.session(self.names) as session:
                return await work(session)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(connected())
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(connected())).result()


def _scores(
    log_likelihoods: Sequence[Sequence[float]], queries: Sequence[Query], numbers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return the choices' scores: log-likelihoods times their scales, less those after the neutral prompt."""
    scores = []
    for number, (query, values) in enumerate(zip(queries, log_likelihoods, strict=False)):
        neutral = [log_likelihoods[len(queries) + k][0] for k in numbers[number]] if numbers else [0.0] * len(values)
        scales = query.scales or [1.0] * len(values)
        scores.append([value * scale - less for value, scale, less in zip(values, scales, neutral, strict=True)])
    return scores
