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
        software: Who it says that it is; "vllm" dies of several echoed texts in one request, as on CPUs.
        places: Where it says that it has its models from.
        shown: Most tokens whose log-probabilities it gives.
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
    software: str = "other"
    places: dict[str, str] = field(default_factory=dict)
    shown: int = 128
    asked: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0

    @property
    def base(self) -> dict[str, Tensor]:
        """An adapter that does nothing."""
        return {name: torch.zeros_like(value) for name, value in self.posterior.mean.items()}

    def client(self, **settings: Any) -> Adapters:
        settings = {
            "names": NAMES,
            "backoff": 0.0,
            "check": False,
            "transport": httpx.ASGITransport(app_of(self)),
            **settings,
        }
        return Adapters("http://stand", **settings)

    @torch.no_grad()
    def log_probs(self, name: str, ids: list[int]) -> Tensor:
        """The draw's log-probabilities [T V] of each next token."""
        draw = self.base if name == "base" else self.posterior.draw(NAMES.index(name))
        with swapped(self.model, draw):
            return self.model.eval()(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def shown_at(self, log_p: Tensor, wanted: list[int]) -> dict[str, float]:
        return {f"token_id:{token}": float(log_p[token]) for token in wanted[: self.shown]}

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
        if self.software == "vllm" and body.get("logprob_token_ids"):
            tops = [self.shown_at(whole[t - 1], body["logprob_token_ids"]) for t in range(first, len(ids + new))]
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
        parents = {"base": None, **dict.fromkeys(NAMES, "base" if stand.parents else None)}
        return {
            "data": [
                {"id": name, "parent": parent, "root": stand.places.get(name, name), "owned_by": stand.software}
                for name, parent in parents.items()
            ]
        }

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        stand.asked.append(body)
        if body["model"] not in (*NAMES, "base"):
            return refusal(404, f"The model `{body['model']}` does not exist.")
        if body["max_tokens"] < stand.least:
            return refusal(400, f"max_tokens must be at least {stand.least}")
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        if stand.software == "vllm" and body.get("echo") and len(prompts) > 1:
            return refusal(500, "EngineCore encountered an issue")
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


def client_of(stand: Stand, **settings: Any) -> Adapters:
    """Return a client of the stand-in that has its tokenizer."""
    return stand.client(tokenizer=stand.tokenizer, **settings)
