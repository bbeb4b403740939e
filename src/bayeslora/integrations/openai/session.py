"""HTTP session with bounded concurrency, retries with back-off, and readable errors, for OpenAI's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar, final

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError, listed
from bayeslora.integrations.openai.catalogue import Catalogue
from bayeslora.integrations.openai.echo import Query, answer_of, choices_of, echoed_log_likelihoods
from bayeslora.integrations.openai.scoring import Ids, log_likelihoods_of, read_request, reads, shown_log_probs
from bayeslora.prediction.generation.answers import Answer

try:
    import httpx
except ModuleNotFoundError as missing:
    raise InputError("the client of servers needs httpx: pip install 'bayeslora[client]'") from missing

Item = TypeVar("Item")
Result = TypeVar("Result")
RETRIED = (429, 502, 503, 504)
"""Statuses after which a request is sent again."""
ALTERNATIVES = 5
"""How many of the most probable tokens are requested in the place of each."""


class RefusedError(InputError):
    """The server refused a request; sending it again does not help."""


@dataclass(frozen=True)
class Connection:
    """How a server of adapters is reached.

    Attributes:
        url: The server's address, such as ``http://localhost:8000``, with or without ``/v1``.
        names: The adapters, one a draw; none: all that the server says are adapters of its base model.
        api_key: The server's key, if it wants one.
        tokenizer: The base model's tokenizer, with which prompts are sent as tokens: needed where a format cuts long
            prompts, and for servers whose tokens do not add up to the text. None sends texts, but to vLLM, where texts
            are scored by tokens: there it is loaded by the name that the server gives its base model.
        concurrency: Most requests under way at once.
        timeout: Seconds to wait for an answer.
        retries: How often a request is sent again after 429, 502, 503, 504, a lost connection or no answer in time.
        backoff: Seconds before it is sent again the first time; each next wait is twice as long.
        transport: A transport of httpx in the place of the network's.
        echo: Whether texts are scored out of echoed prompts, one request a text, rather than by generated tokens, one
            request a token. None: by tokens on vLLM, whose echo is wrong for adapters of the head, elsewhere by echo.
            vLLM is sent one echo after another.
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
    echo: bool | None = None

    def __post_init__(self) -> None:
        """Refuse an address without a scheme, names that are no list of different adapters, and limits out of range."""
        if isinstance(self.names, str) or len(set(self.names)) < len(self.names):
            raise InputError(f"names must be a list of different adapters, and it is {self.names!r}")
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"the server's address {self.url!r} must begin with http:// or https://")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, and it is {getattr(self, name)}")
        if not self.timeout > 0:
            raise InputError(f"timeout must be more than 0 seconds, and it is {self.timeout}")

    @property
    def root(self) -> str:
        """The address without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def server(self) -> str:
        """What messages call the server."""
        return f"the server {self.root}"

    def run(self, work: Callable[[Session], Awaitable[Result]]) -> Result:
        """Do asynchronous work in a session to its end, also where a loop runs already, as in a notebook."""

        async def connected() -> Result:
            """Open a session, work, and close it."""
            headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
            limits = httpx.Limits(max_connections=self.concurrency)
            async with httpx.AsyncClient(
                headers=headers, timeout=self.timeout, limits=limits, transport=self.transport
            ) as client:
                return await work(Session(self, client))

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(connected())
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(connected())).result()


@final
class Session:
    """The requests of one call of the client."""

    def __init__(self, connection: Connection, client: httpx.AsyncClient) -> None:
        self.connection, self.client = connection, client
        self.gate = asyncio.Semaphore(connection.concurrency)
        self.after = 0  # tokens that the server must be allowed to write after an echo

    async def send(self, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """Return the JSON object that the server answers; without a body the page is read with GET."""
        wait, tries = self.connection.backoff, self.connection.retries + 1
        problem = ""
        for number in range(tries):
            try:
                async with self.gate:
                    response = await self.client.request(
                        "POST" if body else "GET", self.connection.root + path, json=body
                    )
            except httpx.TimeoutException:
                waited = f"{self.connection.timeout:g} s{f', {tries} times' if tries > 1 else ''}"
                problem = f"did not answer within {waited}; raise timeout, or lower concurrency"
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = f"cannot be reached ({error or type(error).__name__}); start it, or give its right address"
            else:
                if response.status_code not in RETRIED:
                    return await self._read(response, path, body)
                problem = f"answers {response.status_code} again and again ({tries} tries); lower concurrency, or wait"
            if number + 1 < tries:
                await asyncio.sleep(wait)
                wait *= 2
        raise InputError(f"the server {self.connection.root} {problem}")

    async def catalogue(self) -> Catalogue:
        """Return what the server says that it serves."""
        return Catalogue.of(await self.send("/v1/models"))

    async def log_likelihoods(
        self, names: Sequence[str], queries: Sequence[Query], *, echo: bool, batches: bool = False
    ) -> list[list[list[float]]]:
        """Return natural logarithms by adapter, query and answer, out of echoed prompts or by generated tokens."""
        if not echo:
            return await self._ask_each(names, queries, lambda _, name, query: self._by_tokens(name, query))
        items = queries if batches else [replace(query, answers=(a,)) for query in queries for a in query.answers]
        first = await self._by_echo(names[0], items[0])  # alone: then it is known whether a token must be written

        async def ask(k: int, name: str, query: Query) -> list[float]:
            """Return one adapter's log-likelihoods of a query's answers."""
            return first if k == 0 and query is items[0] else await self._by_echo(name, query)

        draws = await self._ask_each(names, items, ask)
        if batches:
            return draws
        counts = [len(query.answers) for query in queries]
        return [[[value for (value,) in islice(values, count)] for count in counts] for values in map(iter, draws)]

    async def texts(
        self,
        names: Sequence[str],
        prompts: Sequence[str],
        count: int,
        settings: Mapping[str, object],
        seed: int | None,
    ) -> list[list[list[Answer]]]:
        """Return generated answers by adapter, prompt and number; adapter k samples with ``seed + k``."""

        async def ask(k: int, name: str, prompt: str) -> list[Answer]:
            """Return one adapter's answers to a prompt."""
            body = {"model": name, "prompt": prompt, "logprobs": ALTERNATIVES, "n": count, **settings}
            if seed is not None:
                body["seed"] = seed + k
            return [answer_of(choice) for choice in choices_of(await self.send("/v1/completions", body), count)]

        return await self._ask_each(names, prompts, ask)

    async def _by_tokens(self, name: str, query: Query) -> list[float]:
        """Return one adapter's log-likelihoods of a query's answers by generated tokens."""

        async def read(beginning: Ids, tokens: Ids) -> list[tuple[tuple[Ids, int], float]]:
            """Return the log-probabilities of some tokens after the beginning of an answer."""
            completion = await self.send("/v1/completions", {"model": name, **read_request(query, beginning, tokens)})
            values = shown_log_probs(choices_of(completion, 1)[0], tokens)
            return [((beginning, token), value) for token, value in zip(tokens, values, strict=True)]

        found = await asyncio.gather(*(read(*wanted) for wanted in reads(query)))
        return log_likelihoods_of(query, dict(pair for pairs in found for pair in pairs))

    async def _by_echo(self, name: str, query: Query) -> list[float]:
        """Return one adapter's log-likelihoods of a query's answers out of one request's echoes."""
        after = self.after
        body = {"model": name, "prompt": query.whole_prompts, "echo": True, "max_tokens": after, "logprobs": 1}
        try:
            completion = await self.send("/v1/completions", body)
        except RefusedError as refusal:
            if after or "max_tokens" not in str(refusal):
                raise
            self.after = 1
            return await self._by_echo(name, query)
        return echoed_log_likelihoods(query, choices_of(completion, len(query.answers)), after)

    async def _ask_each(
        self, names: Sequence[str], items: Sequence[Item], ask: Callable[[int, str, Item], Awaitable[Result]]
    ) -> list[list[Result]]:
        """Return what each adapter answers to each item."""
        results = await asyncio.gather(*(ask(k, name, item) for k, name in enumerate(names) for item in items))
        return [list(results[k * len(items) : (k + 1) * len(items)]) for k in range(len(names))]

    async def _read(self, response: httpx.Response, path: str, body: Mapping[str, object] | None) -> dict[str, object]:
        """Return the object that a response holds, or raise what its status means."""
        status, server = response.status_code, f"the server {self.connection.root}"
        try:
            value: object = response.json()
        except ValueError:
            value = None
        if status in (401, 403):
            raise RefusedError(f"{server} refuses the API key ({status}); give its own, api_key=…")
        if status == 404 and body is not None:
            known = listed((await self.catalogue()).adapters)
            raise RefusedError(f"{server} has no adapter {body['model']!r}; it has {known or 'none'}")
        if status >= 400:
            raise RefusedError(f"{server} refuses {path} ({status}): {_reason(value, response.text)}")
        if not isinstance(value, dict):
            raise RefusedError(f"{server} does not answer {path} in JSON; give the address of a vLLM server")
        return value


def _reason(value: object, text: str) -> str:
    """Return what a server says about a refusal, in one line."""
    for key in ("error", "message", "detail"):
        value = value[key] if isinstance(value, dict) and value.get(key) else value
    return " ".join(str(value or text).split())[:300]
