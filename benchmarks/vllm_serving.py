"""Draws on vLLM beside `bl.predict` and our own server: agreement, and rows a second for 1, 4 and 10 draws, in one run.

The base is SmolLM2-135M-Instruct, the posterior a Gaussian around a random adapter, the rows generated questions about
odds: nothing is learned, for neither speed nor agreement asks for it. vLLM comes from an environment of its own, such
as that of `nox -s vllm`; it is started by the line that `bayeslora export` prints, in the precision of the model here.

Rows for each second of processor time are what a busy machine does not change: with one thread they are rows a second
of one core that has nothing else to do.

    python benchmarks/vllm_serving.py --vllm .nox/vllm/bin/vllm --json vllm_serving.json
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import torch
from peft import LoraConfig, get_peft_model
from report import finish, row
from transformers import AutoModelForCausalLM, AutoTokenizer

import bayeslora as bl
from bayeslora.cli.demo.model import demo_model
from bayeslora.integrations.openai.client import Adapters
from bayeslora.integrations.openai.serving import vllm_command
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian
from bayeslora.posteriors.loading import export_draws
from bayeslora.posteriors.provenance import origin_of
from bayeslora.tasks.synthetic import chance_task
from bayeslora.tasks.types import Format, Split

Result = TypeVar("Result")
Speed = tuple[float, float]
"""Rows a second, by the clock and of processor time."""
Splits = dict[str, Split]
Here = dict[tuple[str, int], bl.Prediction]
"""What the library predicts, by readout and draws."""
READOUTS = {"letters": Format("", "letters"), "likelihood": Format("", "likelihood", normalisation="tokens")}
VLLM = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def model_of(targets: Sequence[str], dtype: torch.dtype, seed: int) -> tuple[Any, Any, DiagonalGaussian]:
    """Return a model with a random adapter, its tokenizer, and a posterior around that adapter."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=list(targets))
    model = get_peft_model(base, config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    mean = {name: value.float().cpu() for name, value in read(model).items()}
    spread = {name: torch.full_like(value, 1e-4) for name, value in mean.items()}
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    return model, tokenizer, DiagonalGaussian(mean, spread, origin_of(model, "random"))


@contextmanager
def started(words: Sequence[str], port: int, env: dict[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server, and yield its address and its process when it answers."""
    process = subprocess.Popen([*words], env=os.environ | env, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"{words[0]} has ended with status {process.returncode}")
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    """Return a port that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time of a process and of those that it started."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def rate(work: Callable[[], Result], count: int, worker: psutil.Process, repeats: int = 1) -> tuple[Result, Speed]:
    """Return a result, and how many rows were done in a second by the clock and of the worker's processor time."""
    clock, processor = [], []
    for _ in range(repeats):
        began, used = time.perf_counter(), cpu_seconds(worker)
        result = work()
        clock.append(time.perf_counter() - began)
        processor.append(cpu_seconds(worker) - used)
    return result, (count / min(clock), count / min(processor))


def speed_rows(name: str, speed: Speed, unit: str = "rows") -> list[Any]:
    """Return the rows of a speed, and print them."""
    rows = [row(name, speed[0], None, f"{unit}/s"), row(f"{name}, of one core", speed[1], None, f"{unit}/cpu s")]
    print(f"{name}: {speed[0]:.3f} {unit}/s, {speed[1]:.3f} of one core", flush=True)
    return rows


def apart(one: bl.Prediction, other: bl.Prediction) -> float:
    """Return the largest difference of a draw's probabilities."""
    return float((one.log_probs.exp() - other.log_probs.exp()).abs().max())


def measured(
    name: str, client: Adapters, worker: psutil.Process, splits: Splits, here: Here, repeats: int
) -> list[dict[str, Any]]:
    """Return agreement and speed of a server, after a row of each readout to warm it up."""
    rows = []
    adapters = client.names or client.served()
    for readout, split in splits.items():
        replace(client, names=adapters[:1]).predict(split.take([0]))
        for draws in sorted({key[1] for key in here}):
            some = replace(client, names=adapters[:draws])
            found, speed = rate(lambda some=some, split=split: some.predict(split), len(split), worker, repeats)
            rows += speed_rows(f"{name}, {readout}, {draws} draws", speed)
        differ = 1e6 * apart(found, here[readout, draws])
        rows.append(row(f"{name}, {readout}: largest difference of a probability", differ, None, "millionths"))
    return rows


def generated(
    name: str, client: Adapters, worker: psutil.Process, split: Split, tokens: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return how many tokens a second a server writes for all its draws, and the texts."""
    prompts, draws = [example.text for example in split], len(client.names or client.served())
    answers, speed = rate(
        lambda: client.generate_each(prompts, max_tokens=tokens, temperature=0), len(prompts) * draws * tokens, worker
    )
    texts = [answer.text for each in answers for answer in each.answers]
    return speed_rows(f"{name}, {tokens} tokens after {len(prompts)} prompts, {draws} draws", speed, "tokens"), texts


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", required=True, help="vLLM's command in its own environment")
    parser.add_argument("--rows", type=int, default=16, help="rows of the letters readout; half as many of the other")
    parser.add_argument("--repeats", type=int, default=1, help="the best time counts")
    parser.add_argument("--tokens", type=int, default=16, help="of each text that is generated")
    parser.add_argument("--draws", type=int, nargs="*", default=[1, 4, 10])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--targets", nargs="*", default=["q_proj", "v_proj"])
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer, posterior = model_of(options.targets, getattr(torch, options.dtype), options.seed)
    test = chance_task(1, 1, options.rows).test
    assert test is not None
    splits = {name: replace(test, format=form) for name, form in READOUTS.items()}
    splits["likelihood"] = splits["likelihood"].take(range(max(1, options.rows // 2)))
    rows, here, most = [], {}, max(options.draws)
    for readout, split in splits.items():
        bl.predict(model, posterior, split.take([0]), 2, mean=False, tokenizer=tokenizer)  # the model is tried once
        for draws in options.draws:
            work = partial(bl.predict, model, posterior, split, draws, mean=False, tokenizer=tokenizer)
            here[readout, draws], speed = rate(work, len(split), psutil.Process(), options.repeats)
            rows += speed_rows(f"bl.predict, {readout}, {draws} draws", speed)
    env = VLLM | {"OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        posterior.save_pretrained(Path(folder) / "run")
        paths = export_draws(posterior, Path(folder) / "adapters", most)
        words, port = shlex.split(vllm_command(posterior.origin, {path.name: path for path in paths})), free_port()
        how = f"--dtype {options.dtype} --max-model-len 1024 --host 127.0.0.1 --port {port} --no-enable-prefix-caching"
        eager = [] if torch.cuda.is_available() else ["--enforce-eager"]
        with started([options.vllm, *words[1:3], *how.split(), *eager, *words[3:]], port, env) as (address, worker):
            client = Adapters(address, tokenizer=tokenizer, check=False, timeout=600.0)
            rows += measured("vLLM", client, worker, splits, here, options.repeats)
            speed, texts = generated("vLLM", client, worker, splits["likelihood"], options.tokens)
            rows += speed
        port = free_port()
        how = f"--name run --port {port} --draws {most} --most-draws {most} --dtype {options.dtype} --timeout 600"
        words = [sys.executable, "-m", "bayeslora", "serve", str(Path(folder) / "run"), *how.split()]
        with started(words, port, env) as (address, worker):
            names = [f"run/draw-{k:03d}" for k in range(most)]
            client = Adapters(address, names, tokenizer=tokenizer, check=False, timeout=600.0)
            rows += measured("bayeslora serve", client, worker, splits, here, options.repeats)
            speed, own = generated("bayeslora serve", client, worker, splits["likelihood"], options.tokens)
            same = sum(map(str.__eq__, texts, own)) / len(texts)
            rows += [*speed, row("texts that both servers write alike", same, None, "share")]
    finish(rows, options.json)


if __name__ == "__main__":
    main()
