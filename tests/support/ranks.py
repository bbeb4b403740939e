"""Several processes of one training run, as a launcher starts them, but forked: what is imported stays so."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate.state import AcceleratorState, GradientState


def in_ranks(action: Callable[[], object], count: int = 2, timeout: float = 120) -> list[tuple[int | None, str]]:
    """Do something in every process of a group; return how each ended, negative for a signal, and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    context, deadline = multiprocessing.get_context("fork"), time.monotonic() + timeout
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(count)]
        environments = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        processes = [
            context.Process(target=_rank, args=(action, environment, log))
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


def _rank(action: Callable[[], object], environment: dict[str, str], log: Path) -> None:
    """Do it in a process whose group is not known yet, and leave without what its parent would do at its end."""
    os.environ |= environment
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    status = 1
    with log.open("w", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        logging.basicConfig(stream=sys.stdout, force=True)
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
    os._exit(status)
