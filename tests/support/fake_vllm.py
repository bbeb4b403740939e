"""A server of adapters to stand in for vLLM: draws of a tiny model's posterior under names, in vLLM's answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from torch import Tensor

from bayeslora.integrations.openai.client import Adapters
from bayeslora.params import swapped

NAMES = ("draw-000", "draw-001", "draw-002")


@dataclass
class Stand:
    """A server, its faults, and what it was asked.

    Attributes:
        faults: Status codes that the next requests get.
        least: Smallest max_tokens that it accepts.
        echoes: Whether it gives the prompt's log-probabilities back.
        key: The key that it wants.
        opening: A token that it counts before each text, as vLLM does where a tokenizer opens texts with one.
        wait: Seconds that a request takes at least.
        parents: Whether it says which models are adapters.
    """

    model: Any
    posterior: Any
    tokenizer: Any
    faults: list[int] = field(default_factory=list)
    least: int = 0
    echoes: bool = True
    key: str = ""
    opening: str = ""
    wait: float = 0.0
    parents: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0

    def client(self, **settings: Any) -> Adapters:
        settings = {"names": NAMES, "backoff": 0.0, "transport": httpx.ASGITransport(app_of(self)), **settings}
        return Adapters("http://stand", **settings)

    @torch.no_grad()
    def log_probs(self, name: str, ids: list[int]) -> Tensor:
        """The draw's log-probabilities [T V] of each next token."""
        with swapped(self.model, self.posterior.draw(NAMES.index(name))):
            return self.model.eval()(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def choice(self, body: dict[str, Any], prompt: str | list[int], index: int) -> dict[str, Any]:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        rng = torch.Generator().manual_seed(body.get("seed", 0) + index)
        new: list[int] = []
        for _ in range(body["max_tokens"]):
            p = self.log_probs(body["model"], ids + new)[-1]
            heat = body.get("temperature", 1.0)
            new.append(int(torch.multinomial((p / heat).softmax(-1), 1, generator=rng) if heat else p.argmax()))
        whole = self.log_probs(body["model"], ids + new)
        echo = body.get("echo") and self.echoes
        first, shown = (0, ids + new) if echo else (len(ids), new)
        values = [None if t == 0 else float(whole[t - 1, (ids + new)[t]]) for t in range(first, len(ids + new))]
        tokens = [self.tokenizer.decode([i]) for i in shown]
        if echo and self.opening and isinstance(prompt, str):
            tokens, values = [self.opening, *tokens], [None, *values]
        offsets = [sum(map(len, tokens[:t])) for t in range(len(tokens))]
        tops = [None if v is None else {token: v} for token, v in zip(tokens, values, strict=True)]
        return {
            "index": index,
            "text": (text if echo else "") + self.tokenizer.decode(new),
            "finish_reason": "length",
            "logprobs": {"tokens": tokens, "token_logprobs": values, "text_offset": offsets, "top_logprobs": tops},
        }


def app_of(stand: Stand) -> FastAPI:
    app = FastAPI()

    def refusal(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "code": status}}, status)

    @app.middleware("http")
    async def guard(request: Request, then: Callable[[Request], Any]) -> Any:
        if stand.key and request.headers.get("Authorization") != f"Bearer {stand.key}":
            return refusal(401, "Unauthorized")
        if stand.faults:
            return refusal(stand.faults.pop(0), "not now")
        stand.busy += 1
        stand.busiest = max(stand.busiest, stand.busy)
        try:
            await asyncio.sleep(stand.wait)
            return await then(request)
        finally:
            stand.busy -= 1

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        base = {"id": "base", "object": "model", "parent": None}
        parent = "base" if stand.parents else None
        return {"data": [base, *({"id": name, "parent": parent} for name in NAMES)]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        stand.asked.append(body)
        if body["model"] not in NAMES:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if body["max_tokens"] < stand.least:
            return refusal(400, f"max_tokens must be at least {stand.least}")
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        each = [prompt for prompt in prompts for _ in range(body.get("n", 1))]
        found = [stand.choice(body, prompt, index) for index, prompt in enumerate(each)]
        return {"object": "text_completion", "choices": found[::-1]}

    return app


@contextmanager
def listening(stand: Stand) -> Iterator[str]:
    """The stand-in on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app_of(stand), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
