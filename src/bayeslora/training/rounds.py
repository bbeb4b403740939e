"""The order of the rows in an epoch; in several processes each row counts once.

accelerate gives every process equally many batches of one size, and fills up the last ones with rows from the start of
the epoch, which then count twice. Here they are filled up with idle rows, whose label is `IGNORED` by every loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

IDLE = -1
"""The number of a row that is there so that batches are even."""
IGNORED = -100
"""The label of a row that does not count, as in PyTorch."""


@final
class WholeRounds(Sampler[Any]):
    """The rows of another sampler, and idle ones up to a multiple of ``size``, the rows of a round of all processes."""

    def __init__(self, sampler: Any, size: int, idle: int | tuple[int, ...]) -> None:
        self.sampler, self.size, self.idle = sampler, size, idle

    def __iter__(self) -> Iterator[Any]:
        """Yield the numbers of the rows."""
        yield from self.sampler
        for _ in range(-len(self.sampler) % self.size):
            yield self.idle

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.size) * self.size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


@final
class MemberSampler(Sampler[tuple[int, ...]]):
    """The rows of each step for several members, each in the order that its seed gives in a run of its own."""

    def __init__(self, rows: int, seeds: Sequence[int]) -> None:
        self.samplers = [SeedableRandomSampler(range(rows), data_seed=seed) for seed in seeds]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Yield the number of a row for each member."""
        yield from zip(*self.samplers, strict=True)

    def __len__(self) -> int:
        return len(self.samplers[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the orders of an epoch."""
        for sampler in self.samplers:
            sampler.set_epoch(epoch)
