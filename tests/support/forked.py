"""Processes that are forked, as a launcher starts those of one run: what is imported stays so."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.distributed import TCPStore  # type: ignore[attr-defined]


def in_ranks(action: Callable[[], object], count: int = 2) -> list[tuple[int | None, str]]:
    """Do something in every process of a group; return how each ended, negative for a signal, and what it said."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as a launcher keeps one
    group = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return _forked(action, [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)])


def run_script(path: Path, *words: str, folder: Path) -> tuple[int | None, str]:
    """Run a script in a folder, and return how it ended and what it said."""

    def run() -> None:
        warnings.resetwarnings()  # what warns a user is no error
        os.chdir(folder)
        sys.argv = [str(path), *words]
        runpy.run_path(str(path), run_name="__main__")

    return _forked(run, [{}])[0]


def run_alone(action: Callable[[], object], folder: Path) -> tuple[int | None, str]:
    """Do something in a process and a folder of its own, and return how it ended and what it said."""

    def run() -> None:
        warnings.resetwarnings()  # what warns a user is no error
        os.chdir(folder)
        action()

    return _forked(run, [{}])[0]


def _forked(
    action: Callable[[], object], environments: Sequence[dict[str, str]], timeout: float = 120
) -> list[tuple[int | None, str]]:
    """Do something in a process for each environment."""
    context, deadline = multiprocessing.get_context("fork"), time.monotonic() + timeout
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(k)) for k in range(len(environments))]
        processes = [
            context.Process(target=_child, args=(action, environment, log))
            for environment, log in zip(environments, logs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def _child(action: Callable[[], object], environment: dict[str, str], log: Path) -> None:
    """Do it in a process whose group is not known yet, and leave without what its parent would do at its end."""
    os.environ |= environment
    # torch's pool did not live through the fork: made anew here, before several threads that load a model would at once
    torch.set_num_threads(torch.get_num_threads())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # to which older releases of transformers load, and which torch does not know
    torch.serialization.register_package(0, lambda _: None, lambda data, place: data if place == "cpu:0" else None)
    status = 1
    with log.open("w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        logging.basicConfig(stream=sys.stdout, force=True)
        try:
            action()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            print(ended.code)
        except BaseException:
            traceback.print_exc()
    os._exit(status)
