"""What a posterior is, and the simplest: a point.

A draw is a function of (index, seed, parameter name) and of nothing else: draw k is the same weights for the whole data
set, on every device, in any batch order and in any process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from bayeslora.origin import Origin
from bayeslora.params import Params, generator, swapped


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
    def draw(self, index: int, seed: int = 0) -> Params:
        """Return draw number ``index`` of the stream ``seed``.

        Args:
            index: Number of the draw, from 0.
            seed: Which stream of draws.

        Returns:
            A value for every parameter of the adapter, float32 on the CPU.
        """

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
    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the posterior to a folder: the mean as a plain PEFT adapter, and the spread beside it.

        Args:
            folder: Where to; it appears all at once when everything is written.
            overwrite: Whether a folder that is there may be replaced.
        """
        from bayeslora.storage import save_posterior

        save_posterior(self, Path(folder), overwrite=overwrite)


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

    def draw(self, index: int, seed: int = 0) -> Params:
        """Return the mean."""
        return self.mean


def noise(seed: int, index: int, name: str, like: Tensor) -> Tensor:
    """Return standard normal numbers that belong to one parameter of one draw.

    Args:
        seed: Which stream of draws.
        index: Number of the draw.
        name: Name of the parameter.
        like: A tensor of the wanted shape.

    Returns:
        Float32 on the CPU.
    """
    return torch.randn(like.shape, generator=generator(seed, index, name))
