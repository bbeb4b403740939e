"""The processes of one run, as ``torchrun``, ``accelerate launch`` or a scheduler starts them.

What exchanges something is called by all processes, in the same order. In a run of one process nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from bayeslora.errors import InputError, SharedError

T = TypeVar("T")

_SHARDED: ContextVar[bool] = ContextVar("_SHARDED", default=False)


def state() -> PartialState:
    """Return this process's place in its group, which is joined when it is first asked for."""
    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def sharded() -> Iterator[None]:
    """Spread the rows of every prediction in a ``with`` block over the processes of the run.

    Every process of the group makes the same calls and gets the whole result, the same numbers in all of them, in the
    order of the rows. Outside of such a block each process predicts by itself, so that one alone may predict, or each
    its own rows. `fit`, `distill` and comparisons, which all processes call, do it by themselves.

    A model whose own weights are spread over the processes (FSDP) is not given other rows in each.
    """
    token = _SHARDED.set(True)
    try:
        yield
    finally:
        _SHARDED.reset(token)


def is_sharded() -> bool:
    """Return whether rows are to be spread over several processes."""
    return _SHARDED.get() and state().num_processes > 1


def is_first() -> bool:
    """Return whether this process is the one that writes."""
    return bool(state().is_main_process)


def share(sizes: Sequence[int]) -> list[list[int]] | None:
    """Return the rows of each process, largest first, dealt in turn; None where each process takes all."""
    count = state().num_processes if is_sharded() else 1
    if count == 1 or len(sizes) < count:
        return None
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    return [order[k::count] for k in range(count)]


def own(parts: Sequence[list[int]]) -> list[int]:
    """Return this process's part."""
    return parts[state().process_index]


def everywhere(work: Callable[[], T]) -> list[T]:
    """Do something in every process, and return what each came to; an `InputError` of one is raised in all."""
    if state().num_processes == 1:
        return [work()]
    value, refusal = None, ""
    try:
        value = work()
    except InputError as error:
        refusal = str(error)
    results: list[tuple[T, str]] = gather_object([(value, refusal)])
    for _, words in results:
        if words:
            raise SharedError(words)
    return [result for result, _ in results]


def first(work: Callable[[], T]) -> T:
    """Do something in the first process while the others wait; what it comes to, or its `InputError`, all have."""
    return cast(T, everywhere(lambda: work() if is_first() else None)[0])


def sums(numbers: Tensor) -> list[float]:
    """Return the sums over all processes, so that all decide alike; the device is waited for once."""
    values: list[float] = summed([numbers])[0].tolist()
    return values


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor over all processes, on the device where they meet."""
    group = state()
    if group.num_processes == 1:
        return list(tensors)
    total: list[Tensor] = reduce([t.to(group.device) for t in tensors], "sum")
    return total
