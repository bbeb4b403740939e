"""Runs that are killed, and what they come to when they go on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch

from bayeslora.methods import (
    Blob,
    Ensemble,
    Inference,
    Isotropic,
    Ivon,
    Laplace,
    Map,
    McDropout,
    Swag,
    Temperature,
    Tfb,
    multi_swag,
)
from bayeslora.params import initialise
from bayeslora.training.run import fit
from support.tiny import arguments, make_model, make_task, make_tokenizer

SWAG: dict[str, Any] = {"start": 2, "interval": 1, "rank": 3}
METHODS: dict[str, Inference] = {
    "map": Map(),
    "map, early stopping": Map(early_stopping=1),
    "ensemble": Ensemble(2),
    "ensemble together": Ensemble(2, together=True),
    "swag": Swag(**SWAG),
    "multiswag": multi_swag(2, **SWAG),
    "blob": Blob(),
    "blob elbo": Blob("elbo"),
    "ivon": Ivon(),
    "ensemble of ivon": Ensemble(2, Ivon()),
    "laplace": Laplace(),
    "tfb": Tfb(),
    "mc-dropout": McDropout(),
    "isotropic": Isotropic(),
    "temperature": Temperature(),
}
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Ended:
    """How a child ended: its status (negative for a signal), and the operations on files that it did."""

    status: int
    operations: int
    seconds: float


@dataclass(frozen=True)
class Tally:
    """Kills of one method: how many there were, how many inside a write, and what went wrong, one line each."""

    kills: int
    inside: int
    faults: tuple[str, ...]


def train(method: Inference, folder: Path, limit: int) -> None:
    """Train in a folder, from where an earlier process came to, and keep the posterior."""
    if (folder / "posterior").exists():
        return
    early = isinstance(method, Map) and method.early_stopping is not None
    args = arguments(
        folder / "training", save_strategy="steps", save_steps=2, save_total_limit=limit,
        eval_strategy="epoch" if early else "no", **({"max_steps": -1, "num_train_epochs": 3} if early else {}),
    )  # fmt: skip
    model = make_model(lora_dropout=0.1)
    initialise(model, args.seed)
    task = make_task(readout="likelihood")
    posterior = fit(model, task, method, args, tokenizer=make_tokenizer(), resume=True)
    posterior.save_pretrained(folder / "posterior")


def digest(folder: Path) -> str:
    """Return a digest of the tensors and the configuration in a posterior's folder."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" or path.name == "adapter_config.json":
            sha.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return sha.hexdigest()


def in_child(action: Callable[[], object], root: Path, *, at: int = 0, after: float = 0.0) -> Ended:
    """Do something in a child that is killed at an operation on files below a folder, or after so many seconds."""
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(action, str(root), at, writer)
    os.close(writer)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), int(told or 0), time.monotonic() - began)


def _child(action: Callable[[], object], root: str, at: int, writer: int) -> NoReturn:
    """Do it, and tell how many operations it took; die at one of them, with a file half written."""
    count, real, real_save = 0, vars(safetensors.torch)["serialize_file"], torch.save

    def operation(half: Path | None) -> None:
        nonlocal count
        count += 1
        if count == at:
            count += 1
            if half is not None:
                half.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not args or not str(args[0]).startswith(root):
            return
        if event in CHANGES or (event == "open" and args[2] & WRITING):
            operation(Path(args[0]) if event == "open" else None)

    def serialize(tensors: Any, path: Any, **more: Any) -> None:
        operation(Path(path))
        real(tensors, path, **more)

    def save(value: Any, path: Any, **more: Any) -> None:
        operation(Path(path) if isinstance(path, str | Path) else None)
        real_save(value, path, **more)

    status = 1
    try:
        vars(torch)["save"] = save
        vars(safetensors.torch)["serialize_file"] = serialize
        sys.addaudithook(hook)
        log = os.open(f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        action()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os.write(writer, str(count).encode())
    os._exit(status)


def killed(name: str, method: Inference, kills: int, seed: int) -> Tally:
    """Kill runs of a method and compare what they come to.

    They are killed at operations on files and at any time in turn, with one checkpoint kept and with two.
    """
    torch.set_num_threads(1)
    rng, count, inside, faults = random.Random(seed), 0, 0, list[str]()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        usual = in_child(lambda: train(method, whole, 1), whole)
        if usual.status:
            return Tally(0, 0, (f"{name}: the unbroken run failed: {_said(whole)}",))
        wanted = digest(whole / "posterior")
        while count < kills:
            folder = Path(place, f"{count}-{len(faults)}-{rng.random()}")
            pair, writing = divmod(seed + count, 2)
            limit = 1 + pair % 2
            at = rng.randint(1, usual.operations) if writing else 0
            after = 0.0 if at else rng.uniform(0.02, usual.seconds)
            run = functools.partial(in_child, functools.partial(train, method, folder, limit), folder)
            ended = run(at=at, after=after)
            count += ended.status == -signal.SIGKILL
            inside += bool(at) and ended.status == -signal.SIGKILL
            again = run()
            moment = f"operation {at} of {usual.operations}" if at else f"{after:.3f} s"
            where = f"{name}, save_total_limit={limit}, killed at {moment}"
            if again.status:
                faults.append(f"{where}: does not go on: {_said(folder)}")
            elif digest(folder / "posterior") != wanted:
                faults.append(f"{where}: goes on to something else")
    return Tally(count, inside, tuple(faults))


def _said(folder: Path) -> str:
    """Return the last line that a child said."""
    log = Path(f"{folder}.log")
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "nothing was said"


def all_killed(
    kills: int, seed: int, names: Sequence[str] = tuple(METHODS), watch: Callable[[str], None] = print
) -> list[Tally]:
    """Kill all methods, about equally often."""
    tallies = []
    for k, name in enumerate(names):
        share = (k + 1) * kills // len(names) - k * kills // len(names)
        tally = killed(name, METHODS[name], share, seed + k)
        watch(json.dumps({"method": name, "kills": tally.kills, "inside": tally.inside, "faults": tally.faults}))
        tallies.append(tally)
    return tallies
