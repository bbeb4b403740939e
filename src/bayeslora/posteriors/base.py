"""What a posterior is, and the simplest: a point.

A draw is a function of (index, seed, parameter name) and of nothing else: draw k is the same weights for the whole data
set, on every device, in any batch order and in any process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

from torch import nn

from bayeslora.params import Params, swapped
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Sampling

if TYPE_CHECKING:
    from bayeslora.metrics.evaluation import Evaluation


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
                folder stays, and `bayeslora.posteriors.hub.push` tries again.
            repo_id: Repository ``org/name``; None for the folder's name under the user's own.
            private: Whether a repository that is made is private; None for what the account makes by default.
            token: Token to write with; None for the one that the machine is logged in with.
            commit_message: The commit's message.
        """
        from bayeslora.posteriors.hub import push
        from bayeslora.posteriors.loading import save_posterior

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
