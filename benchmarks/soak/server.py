"""A server for a long time under twice the load that it can bear: memory, outcomes of requests, latency of ``/health``.

A tiny model is served by uvicorn in a process of its own. Its capacity is measured with as many clients as rows that
wait for each other (closed loop); then requests of all kinds come by a Poisson process at twice that rate, whatever
becomes of those before (open loop): chats, completions with ``n`` and ``echo``, streams, classification, clients that
hang up or read slowly, and bad requests. Memory is flat if the least-squares line through the server's resident memory,
the first fifth of the time left out, rises by less than 3 % of its mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import finish, row
from soak.served import KEY, serving

TIMEOUT = 5
KINDS = {"chat": 5, "completion": 4, "stream": 4, "classify": 3, "hang-up": 2, "slow": 1, "bad": 2}
GOOD = {"answered", "refused 400", "refused 429", "refused 503", "timed out 504", "hung up"}


class Load:
    """Clients of one server, and what became of their requests."""

    def __init__(self, address: str, seed: int) -> None:
        self.random, self.outcomes, self.waits = random.Random(seed), Counter[str](), list[float]()
        self.client = httpx.AsyncClient(
            base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )  # fmt: skip

    def body(self, kind: str) -> tuple[str, dict[str, object]]:
        """Return the path and the body of a request."""
        pick, count = self.random, self.random.randint
        text = " ".join(pick.choices(["bag", "holds", "red", "blue", "3", "5"], k=count(1, 30)))
        common = {"model": "tiny", "draws": count(1, 4), "temperature": pick.choice([0, 0.7, 1.5])}
        messages = [{"role": "user", "content": text}]
        match kind:
            case "chat":
                return "/v1/chat/completions", {**common, "messages": messages, "max_tokens": count(1, 32)}
            case "completion":
                extra = {"n": count(1, 4), "echo": pick.random() < 0.5, "logprobs": pick.choice([None, 3])}
                return "/v1/completions", {**common, **extra, "prompt": text, "max_tokens": count(0, 32)}
            case "classify":
                texts = [text[: 5 * k] + "." for k in range(1, count(2, 30))]
                return "/v1/classify", {"model": "tiny", "input": texts, "choices": ["red", "blue", "green"]}
            case "bad":
                wrong = pick.choice([{"prompt": ""}, {"prompt": [10**6]}, {"prompt": "x", "n": 10**9}, {"prompt": 3}])
                return "/v1/completions", {"model": "tiny", **wrong}
        return "/v1/chat/completions", {**common, "messages": messages, "max_tokens": 32, "stream": True}

    async def ask(self, kind: str) -> None:
        """Send one request, and note what becomes of it."""
        began = time.monotonic()
        try:
            outcome = await self.outcome(kind, *self.body(kind))
        except (httpx.HTTPError, ValueError) as error:
            outcome = f"LOST {type(error).__name__}"
        self.outcomes[outcome] += 1
        self.outcomes[f"{kind}: {outcome}"] += 1
        if outcome == "answered" and kind != "slow":
            self.waits.append(time.monotonic() - began)

    async def outcome(self, kind: str, path: str, body: dict[str, object]) -> str:
        """Return what becomes of a request."""
        if "stream" not in body:
            found = await self.client.post(path, json=body)
            return verdict(found.status_code)
        async with self.client.stream("POST", path, json=body) as found:
            if found.status_code != 200:
                await found.aread()
                return verdict(found.status_code)
            last = ""
            async for line in found.aiter_lines():
                last = line or last
                if kind == "hang-up" and self.random.random() < 0.2:
                    return "hung up"
                if kind == "slow":
                    await asyncio.sleep(0.1)
        if last == "data: [DONE]":
            return "answered"
        kinds = {"timeout": "timed out 504", "server_busy": "refused 429"}
        code = json.loads(last.removeprefix("data: ")).get("error", {}).get("code")
        return kinds.get(code, f"LOST stream ends with {last[:60]}")

    async def closed(self, seconds: float, clients: int) -> float:
        """Return how many requests a second end well if each client waits for its answer."""
        end, before = time.monotonic() + seconds, self.outcomes.total()

        async def one() -> None:
            """Ask again and again."""
            while time.monotonic() < end:
                await self.ask(self.kind())

        await asyncio.gather(*(one() for _ in range(clients)))
        return (self.outcomes.total() - before) / 2 / seconds  # each is counted twice, in all and by its kind

    def kind(self) -> str:
        """Return the kind of the next request."""
        return self.random.choices(list(KINDS), list(KINDS.values()))[0]

    async def open(self, seconds: float, rate: float) -> int:
        """Send requests at a rate whatever becomes of them, wait for all, and return how many they were."""
        end, tasks, sent = time.monotonic() + seconds, set[asyncio.Task[None]](), 0
        due = time.monotonic()
        while due < end:
            due += self.random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self.ask(self.kind()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.gather(*tasks)
        return sent

    async def watch(self, pid: int, seconds: float, health: list[float], memory: list[tuple[float, float]]) -> None:
        """Note the latency of ``/health`` every second, and the server's memory in MiB."""
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=self.client.base_url, timeout=60) as client:
            while (now := time.monotonic() - began) < seconds:
                (await client.get("/health")).raise_for_status()
                health.append(time.monotonic() - began - now)
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
                memory.append((now, resident))
                if len(memory) % 60 == 0:
                    said = {name: count for name, count in sorted(self.outcomes.items()) if ":" not in name}
                    print(f"{now / 60:5.1f} min  {resident:.0f} MiB  {said}", flush=True)
                await asyncio.sleep(max(0.0, 1 - health[-1]))


def verdict(status: int) -> str:
    """Return what a status means."""
    words = {200: "answered", 400: "refused 400", 429: "refused 429", 503: "refused 503", 504: "timed out 504"}
    return words.get(status, f"LOST status {status}")


def growth(memory: list[tuple[float, float]]) -> tuple[float, float]:
    """Return by how much the line through the memory rises, and the mean memory, without the first fifth."""
    times, sizes = torch.tensor(memory[len(memory) // 5 :], dtype=torch.float64).T
    slope = ((times - times.mean()) * (sizes - sizes.mean())).sum() / (times - times.mean()).square().sum()
    return float(slope * (times[-1] - times[0])), float(sizes.mean())


async def soak(address: str, pid: int, minutes: float, seed: int) -> list[dict[str, object]]:
    """Run the load, and return the rows."""
    load = Load(address, seed)
    await load.closed(5, 16)  # warm up
    rate = await load.closed(min(30, 20 * minutes), 16)
    print(f"capacity {rate:.1f} requests a second", flush=True)
    load.outcomes.clear()
    load.waits.clear()
    health, memory = list[float](), list[tuple[float, float]]()
    sent, _ = await asyncio.gather(load.open(60 * minutes, 2 * rate), load.watch(pid, 60 * minutes, health, memory))
    await load.client.aclose()
    rise, mean = growth(memory)
    total = {name: count for name, count in load.outcomes.items() if ":" not in name}
    lost = sent - sum(count for name, count in total.items() if name in GOOD)
    print(json.dumps(dict(sorted(load.outcomes.items())), indent=2))
    p50, p99, most = torch.tensor(health).quantile(torch.tensor([0.5, 0.99, 1.0])).tolist()
    w50, w99 = torch.tensor(load.waits).quantile(torch.tensor([0.5, 0.99])).tolist() if load.waits else (0.0, 0.0)
    return [
        row("minutes", minutes, None, "min"),
        row("capacity", rate, None, "requests/s"),
        row("requests sent", sent, None, "requests"),
        *(row(name, total.get(name, 0), None, "requests") for name in sorted(GOOD)),
        row("requests lost", lost, 0, "requests"),
        row("memory at the end", memory[-1][1], None, "MiB"),
        row("rise of the memory", rise, 0.03 * mean, "MiB"),
        row("/health p50", p50, None, "s"),
        row("/health p99", p99, 1.0, "s"),
        row("/health slowest", most, None, "s"),
        row("answers p50", w50, None, "s"),
        row("answers p99", w99, TIMEOUT + 2.0, "s"),
    ]


def main() -> None:
    """Serve, load, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8124)
    parser.add_argument("--json", help="file to write the rows to")
    asked = parser.parse_args()
    with serving(asked.port, waiting=32, rows=16, timeout=TIMEOUT) as process:
        rows = asyncio.run(soak(f"http://127.0.0.1:{asked.port}", process.pid, asked.minutes, asked.seed))
    rows.append(row("exit status after SIGTERM", process.returncode, None, "status"))
    finish(rows, asked.json)


if __name__ == "__main__":
    main()
