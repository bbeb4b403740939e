"""The command line as one of several processes: all compute, and the first one writes and speaks.

``torchrun`` and ``accelerate launch`` say in the environment how many there are. Nothing slow is imported for one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

from bayeslora.errors import InputError

T = TypeVar("T")

SHARED = ("train", "fit", "evaluate", "predict", "compare", "distill")
"""Verbs that several processes do together; the others are for one."""
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "gloo")
"""What PyTorch's errors say where another process has gone."""
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_joined = False


def count() -> int:
    """Return how many processes were started together; refuse an environment that does not say it."""
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise InputError(f"WORLD_SIZE is {size} in the environment, and must be at least 1; unset it")
    if size > 1:
        missing = [name for name in _NEEDED if not os.environ.get(name)]
        if missing:
            raise InputError(
                f"WORLD_SIZE is {size} in the environment, and {missing[0]} is not set; start with accelerate launch "
                "or torchrun, or unset WORLD_SIZE"
            )
        if not 0 <= _number("RANK", 0) < size:
            raise InputError(f"RANK is {os.environ['RANK']} in the environment, and WORLD_SIZE is {size}; unset both")
    return size


def is_first() -> bool:
    """Return whether this is the process that writes and speaks."""
    return count() == 1 or _number("RANK", 0) == 0


def _number(name: str, default: int) -> int:
    """Return a whole number of the environment."""
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{name} is {text[:80]!r} in the environment, and must be a whole number; unset it, or start with "
            "accelerate launch or torchrun"
        ) from None


def check(verb: str) -> None:
    """Refuse a verb that several processes cannot do together."""
    if count() > 1 and verb not in SHARED:
        raise InputError(
            f"{verb} is for one process, and {count()} were started; start it by itself: bayeslora {verb} …"
        )


@contextmanager
def silenced() -> Iterator[None]:
    """Let no process but the first write results to standard output, or show warnings."""
    with ExitStack() as changes:
        if not is_first():
            changes.enter_context(redirect_stdout(changes.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            changes.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


@contextmanager
def joined(cpu: bool) -> Iterator[None]:
    """Join the other processes for a verb, if there are any, and spread its predictions over them."""
    global _joined
    if count() == 1:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    from accelerate import PartialState

    from bayeslora.processes import sharded

    mine = not torch.distributed.is_initialized()
    PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=timedelta(hours=6))
    _joined = True
    with sharded():
        yield
    PartialState().wait_for_everyone()
    _joined = False
    if mine:
        PartialState().destroy_process_group()


def once(work: Callable[[], T]) -> T:
    """Do something in the first process while the others wait; what it comes to all have, and what it refuses."""
    if count() == 1:
        return work()
    from bayeslora.processes import first

    return first(work)


def speaks(shared: bool) -> bool:
    """Return whether this process is to say why the run ends: the first that fails, or of all that do one."""
    if shared or not _joined:  # what is wrong with the words of the command all find alike
        return is_first()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return bool(store.add(f"bayeslora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/ended", 1) == 1)
    except (RuntimeError, OSError):  # the process that knew has gone
        return True


def lost(error: Exception) -> bool:
    """Return whether an error says that another process has gone."""
    return count() > 1 and (type(error).__name__.startswith("Dist") or any(words in str(error) for words in LOST))
