"""Requests to a server of OpenAI's protocol: so many at once, again after a while, in words when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, final

from bayeslora.errors import InputError
from bayeslora.integrations.openai.echo import Asked, after_prompt, choices_of, generated
from bayeslora.prediction.generation.answers import Answer

if TYPE_CHECKING:
    from bayeslora.integrations.openai.client import Adapters

try:
    import httpx
except ModuleNotFoundError as missing:
    raise InputError("the client of servers needs httpx: pip install 'bayeslora[client]'") from missing

Item = TypeVar("Item")
Found = TypeVar("Found")
AGAIN = (429, 502, 503, 504)
"""Answers after which a request is sent again."""
ALTERNATIVES = 5
"""How many of the most probable tokens are asked for in the place of each."""


class RefusedError(InputError):
    """The server refused a request; sending it again does not help."""


@final
class Session:
    """The requests of one call.

    Args:
        adapters: The server, and how it is asked.
        client: A client of httpx.
    """

    def __init__(self, adapters: Adapters, client: Any) -> None:
        self.adapters, self.client = adapters, client
        self.url = adapters.url.rstrip("/").removesuffix("/v1")
        self.gate = asyncio.Semaphore(adapters.concurrency)
        self.after = 0  # tokens that the server must be allowed to write after an echo

    async def send(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON that the server answers.

        Args:
            path: The page.
            body: What is posted; None asks for the page.

        Returns:
            A JSON object.

        Raises:
            InputError: If the server cannot be reached, gives no answer in time, or refuses.
        """
        wait, tries = self.adapters.backoff, self.adapters.retries + 1
        said = ""
        for number in range(tries):
            try:
                async with self.gate:
                    answer = await self.client.request("POST" if body else "GET", self.url + path, json=body)
            except httpx.TimeoutException:
                took = f"{self.adapters.timeout:g} s{f', {tries} times' if tries > 1 else ''}"
                said = f"did not answer within {took}; raise timeout, or lower concurrency"
            except (httpx.TransportError, httpx.InvalidURL) as error:
                said = f"cannot be reached ({error or type(error).__name__}); start it, or give its right address"
            else:
                if answer.status_code not in AGAIN:
                    return await self._read(answer, path, body)
                said = f"answers {answer.status_code} again and again ({tries} tries); lower concurrency, or wait"
            if number + 1 < tries:
                await asyncio.sleep(wait)
                wait *= 2
        raise InputError(f"the server {self.url} {said}")

    async def served(self) -> tuple[str, ...]:
        """Return the names of the server's adapters.

        Returns:
            Those of its models that have another as their parent.

        Raises:
            InputError: If there are none.
        """
        data = (await self.send("/v1/models")).get("data")
        models = [model for model in data or [] if isinstance(model, dict)]
        found = tuple(str(model["id"]) for model in models if model.get("parent"))
        if not found:
            known = ", ".join(str(model.get("id")) for model in models) or "none"
            raise InputError(
                f"the server {self.url} calls none of its models an adapter ({known}); start it with the line that "
                "bayeslora export prints, or name them, names=[…]"
            )
        return found

    async def likelihoods(self, rows: Sequence[Asked]) -> list[list[list[float]]]:
        """Return log-likelihoods.

        Args:
            rows: Prompts and what may follow them.

        Returns:
            Natural logarithms by adapter, row and answer.
        """
        return await self._each(rows, lambda _, name, row: self._likelihood(name, row))

    async def texts(self, prompts: Sequence[str], body: dict[str, Any], seed: int | None) -> list[list[list[Answer]]]:
        """Return generated texts.

        Args:
            prompts: The prompts.
            body: What else is in each request.
            seed: Seed of the first adapter's tokens.

        Returns:
            Answers by adapter, prompt and number.
        """

        async def ask(k: int, name: str, prompt: str) -> list[Answer]:
            """Return one adapter's answers to a prompt."""
            own = {} if seed is None else {"seed": seed + k}
            asked = {"model": name, "prompt": prompt, "logprobs": ALTERNATIVES, **body, **own}
            return [generated(choice) for choice in choices_of(await self.send("/v1/completions", asked), body["n"])]

        return await self._each(prompts, ask)

    async def _likelihood(self, name: str, row: Asked) -> list[float]:
        """Return one adapter's log-likelihoods of a row's answers."""
        after = self.after
        body = {"model": name, "prompt": row.wholes, "echo": True, "max_tokens": after, "logprobs": 1}
        try:
            value = await self.send("/v1/completions", body)
        except RefusedError as refusal:
            if after or "max_tokens" not in str(refusal):
                raise
            self.after = 1
            return await self._likelihood(name, row)
        return after_prompt(row, choices_of(value, len(row.answers)), after)

    async def _each(
        self, items: Sequence[Item], ask: Callable[[int, str, Item], Awaitable[Found]]
    ) -> list[list[Found]]:
        """Return what each adapter answers to each item."""
        names = tuple(self.adapters.names) or await self.served()
        found = await asyncio.gather(*(ask(k, name, item) for k, name in enumerate(names) for item in items))
        return [list(found[k * len(items) : (k + 1) * len(items)]) for k in range(len(names))]

    async def _read(self, answer: Any, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return what an answer holds, or raise what it means."""
        status = answer.status_code
        try:
            value = answer.json()
        except ValueError:
            value = None
        if status in (401, 403):
            raise RefusedError(f"the server {self.url} refuses the API key ({status}); give its own, api_key=…")
        if status == 404 and body is not None:
            known = ", ".join(await self.served())
            raise RefusedError(f"the server {self.url} has no adapter {body['model']!r}; it has {known}")
        if status >= 400:
            raise RefusedError(f"the server {self.url} refuses {path} ({status}): {_told(value, answer.text)}")
        if not isinstance(value, dict):
            raise RefusedError(
                f"the server {self.url} does not answer {path} in JSON; give the address of a vLLM server"
            )
        return value


@asynccontextmanager
async def opened(adapters: Adapters) -> AsyncIterator[Session]:
    """Connect to a server for the length of a ``with`` block.

    Args:
        adapters: The server, and how it is asked.

    Yields:
        The session.
    """
    headers = {"Authorization": f"Bearer {adapters.api_key}"} if adapters.api_key else {}
    limits = httpx.Limits(max_connections=adapters.concurrency)
    async with httpx.AsyncClient(
        headers=headers, timeout=adapters.timeout, limits=limits, transport=adapters.transport
    ) as client:
        yield Session(adapters, client)


def _told(value: Any, text: str) -> str:
    """Return what a server says about a refusal, in one line."""
    for key in ("error", "message", "detail"):
        value = value[key] if isinstance(value, dict) and value.get(key) else value
    return " ".join(str(value or text).split())[:300]
