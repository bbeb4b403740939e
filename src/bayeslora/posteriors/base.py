"""What a posterior is, and the simplest: a point.

A draw is a function of (index, seed, parameter name) and of nothing else: draw k is the same weights for the whole data
set, on every device, in any batch order and in any process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from bayeslora.origin import Origin
from bayeslora.params import Params, generator, swapped

if TYPE_CHECKING:
    from bayeslora.evaluation import Evaluation

Sampling = Literal["independent", "antithetic", "simplex", "sobol"]
"""How the draws of a stream belong together: not at all; each odd draw mirrors the one before it at the mean; the noise
of five draws sums to zero; or they are Sobol's sequence with a random digital shift, so that each number of each
parameter fills its distribution evenly. Each draw by itself has the posterior's distribution in all four."""

_GROUP = 5
"""Draws of ``simplex`` whose noise sums to zero."""

GROUPS: Mapping[Sampling, int] = {"independent": 1, "antithetic": 2, "simplex": _GROUP, "sobol": 1}
"""How many draws of a posterior belong together so that a part of them loses what they are for."""


class Posterior(ABC):
    """A distribution over adapter parameters.

    Attributes:
        mean: The one adapter that stands for the posterior: what is saved as the plain PEFT adapter.
        origin: Base model, adapter configuration and method; None for one built by hand, which cannot be saved.
    """

    if TYPE_CHECKING:  # a run-time property here would become the default of the families' fields

        @property
        def origin(self) -> Origin | None:
            """Base model, adapter configuration and method."""

        @property
        def mean(self) -> Params:
            """The one adapter that stands for the posterior: what is saved as the plain PEFT adapter."""

    @property
    @abstractmethod
    def distinct(self) -> int | None:
        """How many different draws there are; None where there is no limit."""

    @abstractmethod
    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return draw number ``index`` of the stream ``seed``.

        Args:
            index: Number of the draw, from 0.
            seed: Which stream of draws.
            sampling: How the draws of a stream belong together.

        Returns:
            A value for every parameter of the adapter, float32 on the CPU.
        """

    @cached_property
    def kept(self) -> dict[tuple[int, int, Sampling], Params]:
        """Draws that one prediction keeps for the next, by index, seed and sampling; empty at first."""
        return {}

    @final
    @contextmanager
    def applied(self, model: nn.Module, draw: int | None, seed: int = 0) -> Iterator[None]:
        """Make the model *be* one draw for the length of a ``with`` block.

        Args:
            model: PEFT model whose active adapter has the posterior's parameters.
            draw: Number of the draw; None for the mean.
            seed: Which stream of draws.

        Yields:
            Nothing. Afterwards, and on any exception, the model is bit for bit what it was.
        """
        with swapped(model, self.mean if draw is None else self.draw(draw, seed)):
            yield

    @final
    def save_pretrained(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        evaluation: Evaluation | None = None,
        task: str = "",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Write the posterior to a folder: the mean as a plain PEFT adapter, the spread beside it, and a card.

        Args:
            folder: Where to; it appears all at once when everything is written.
            overwrite: Whether a folder that is there may be replaced.
            evaluation: Scores for the card.
            task: What they were measured on, such as ``openbookqa/test``.
            push_to_hub: Whether to upload the folder to the Hugging Face Hub when it is there; if that fails, the
                folder stays, and `bayeslora.hub.push` tries again.
            repo_id: Repository ``org/name``; None for the folder's name under the user's own.
            private: Whether a repository that is made is private; None for what the account makes by default.
            token: Token to write with; None for the one that the machine is logged in with.
            commit_message: The commit's message.
        """
        from bayeslora.hub import push
        from bayeslora.storage import save_posterior

        save_posterior(self, Path(folder), overwrite=overwrite, evaluation=evaluation, task=task)
        if push_to_hub:
            push(folder, repo_id, private=private, token=token, commit_message=commit_message)


@final
@dataclass(frozen=True)
class Point(Posterior):
    """A point estimate: every draw is the mean."""

    mean: Params
    origin: Origin | None = None

    @property
    def distinct(self) -> int:
        """One."""
        return 1

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return the mean."""
        return self.mean


def noise(seed: int, index: int, name: str, like: Tensor, sampling: Sampling = "independent") -> Tensor:
    """Return standard normal numbers that belong to one parameter of one draw.

    Args:
        seed: Which stream of draws.
        index: Number of the draw.
        name: Name of the parameter.
        like: A tensor of the wanted shape.
        sampling: How the draws of a stream belong together.

    Returns:
        Float32 on the CPU.
    """
    if sampling == "sobol":
        return torch.special.ndtri(_sobol(seed, index, name, like)).float()
    if sampling == "antithetic":
        even = torch.randn(like.shape, generator=generator(seed, index - index % 2, name))
        return -even if index % 2 else even
    if sampling == "simplex":
        return _simplex(seed, index, name, like)
    return torch.randn(like.shape, generator=generator(seed, index, name))


def uniform(seed: int, index: int, name: str, like: Tensor, sampling: Sampling = "independent") -> Tensor:
    """Return numbers uniform on [0, 1) that belong to one parameter of one draw; see `noise`.

    Args:
        seed: Which stream of draws.
        index: Number of the draw.
        name: Name of the parameter.
        like: A tensor of the wanted shape.
        sampling: How the draws of a stream belong together.

    Returns:
        Float32 on the CPU.
    """
    if sampling == "sobol":
        return _sobol(seed, index, name, like).float()
    if sampling == "simplex":
        return torch.special.ndtr(_simplex(seed, index, name, like))
    if sampling == "antithetic":
        even = torch.rand(like.shape, generator=generator(seed, index - index % 2, name))
        return 1 - even if index % 2 else even
    return torch.rand(like.shape, generator=generator(seed, index, name))


def _simplex(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return standard normal numbers that sum to zero over the draws of a group; any two correlate by -1/(K-1).

    z_i = √(K/(K−1)) (ε_i − ε̄), the most negative correlation that K exchangeable normal numbers can have (antithetic
    coupling of K processes: Craiu and Meng 2005, Annals of Statistics 33). A group's average of what is linear in the
    noise is exact, as with pairs that mirror each other. Its average of what is quadratic is worth K − 1 independent
    draws; a pair's is worth one.
    """
    group, own = divmod(index, _GROUP)
    every = torch.randn((_GROUP, *like.shape), generator=generator(seed, "simplex", group, name))
    return math.sqrt(_GROUP / (_GROUP - 1)) * (every[own] - every.mean(0))


_BITS = 30
"""Binary digits of torch's Sobol numbers."""


def _sobol(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return a point of Sobol's sequence in (0, 1), its digits shifted at random; float64.

    A parameter with more numbers than the sequence has dimensions takes it several times, with other shifts.
    """
    point = _sobol_digits(index, min(like.numel(), SobolEngine.MAXDIM))
    shift = torch.randint(0, 2**_BITS, (like.numel(),), generator=generator(seed, "sobol", name))
    digits = point.repeat(-(-like.numel() // len(point)))[: like.numel()] ^ shift
    return ((digits.double() + 0.5) / 2**_BITS).view(like.shape)


@lru_cache(maxsize=128)
def _sobol_digits(index: int, dimensions: int) -> Tensor:
    """Return the digits of a point of Sobol's sequence as integers."""
    engine: Any = SobolEngine(dimensions)  # type: ignore[no-untyped-call]
    point: Tensor = engine.fast_forward(index).draw(1, dtype=torch.float64)[0]
    return (point * 2**_BITS).long()
