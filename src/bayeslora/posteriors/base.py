"""What a posterior is: what every family gives, and what it may leave as it is.

A draw is a function of (index, seed, parameter name) and of nothing else: draw k is the same weights for the whole data
set, in any batch order and in any process, and on every device up to the last bits.

A new family is one file: a frozen dataclass that extends `Posterior` and has ``mean`` and ``draw``. The
rest has a default that is right for draws of weights. Its fields are what is saved: parameters by name are tensors, a
field ``members`` (a tuple) or ``posterior`` (one) is what it is made of, and everything else is a scalar.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, final

import torch
from torch import Tensor, nn

from bayeslora.errors import InputError
from bayeslora.files import atomic_folder
from bayeslora.params import Params, swapped
from bayeslora.posteriors.card import DESCRIPTIONS, card
from bayeslora.posteriors.engine import Engine, LogProbs
from bayeslora.posteriors.folder import Content, member_folder, write_folder
from bayeslora.posteriors.hub import push
from bayeslora.posteriors.keeping import Kept
from bayeslora.posteriors.noise import Noise
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import GROUPS, Draws, Sampling

if TYPE_CHECKING:
    from bayeslora.metrics.evaluation import Evaluation

FAMILIES: dict[str, type[Posterior]] = {}
"""The families by the names that they are saved under; each is entered when its class is defined."""


class Posterior(ABC):
    """A distribution over adapter parameters."""

    description: ClassVar[str] = "a posterior"
    """The family in words, for the card; ``{members}`` is replaced by the number of posteriors that it is made of."""

    if TYPE_CHECKING:  # a run-time property here would become the default of the families' fields

        @property
        def origin(self) -> Origin | None:
            """Base model, adapter configuration and method; None for one built by hand, which cannot be saved."""

        @property
        def mean(self) -> Params:
            """The one adapter that stands for the posterior: what is saved as the plain PEFT adapter."""

    def __init_subclass__(cls) -> None:
        """Enter the family under its name, unless it is abstract, with `ABC` among its bases."""
        if ABC in cls.__bases__:
            return
        FAMILIES[cls.__name__] = cls
        DESCRIPTIONS[cls.__name__] = cls.description

    @property
    def distinct(self) -> int | None:
        """How many different draws there are; None where there is no limit."""
        return None

    @abstractmethod
    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return draw number ``index`` of the stream ``seed``.

        Args:
            index: Number of the draw, from 0.
            seed: Which stream of draws.
            sampling: How the draws of a stream belong together.

        Returns:
            A value for every parameter of the adapter, float32, where the mean is: on the CPU, or see `placed`.

        Raises:
            InputError: If a draw of the family is no adapter.
        """

    def unit(self, sampling: Sampling = "independent") -> int:
        """Return how many draws belong together: those of a group of the sampling."""
        return GROUPS[sampling] if self.distinct is None else 1

    def count(self, draws: int | Draws) -> int:
        """Return how many draws serve a request: rounded up to a multiple of `unit`, and none is drawn twice."""
        draws = Draws.of(draws)
        if self.distinct is not None:
            return min(draws.count, self.distinct)
        unit = self.unit(draws.sampling)
        return -(-draws.count // unit) * unit

    def components(self, count: int) -> tuple[int, ...] | None:
        """Return the member that each draw comes from; None where there are no members."""
        return None

    def standard_deviation(self) -> Params | None:
        """Return the marginal σ of each parameter that has one, by name; None where the family has none."""
        return None

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> Posterior | None:
        """Return the posterior with its noise multiplied parameter by parameter, and its mean if ``signal`` is given.

        None where there is no noise in the weights.
        """
        return None

    @property
    def unscaled(self) -> Posterior:
        """The posterior without a scaling of its log-probabilities: itself."""
        return self

    def scaled(self, log_probs: Tensor, of: str) -> Tensor:
        """Return log-probabilities ``of`` the ``draws`` or of the ``mean`` with the posterior's scaling."""
        return log_probs

    def without_noise(self, point: Posterior) -> Posterior:
        """Return a point at the mean, with the scaling that the posterior has for its mean: as it is."""
        return point

    @property
    def draws_are_weights(self) -> bool:
        """Whether predictions are those of the model with drawn weights, scaled or not."""
        return True

    @property
    def noise_in_logits(self) -> bool:
        """Whether draws are the mean's logits plus noise that grows in proportion to the noise of the weights."""
        return False

    @property
    def before_answer(self) -> Params | None:
        """The weights for all tokens before the answer; None where they are each draw's."""
        return None

    @property
    def minimum_draws(self) -> int:
        """Least number of draws of a prediction."""
        return 1

    def answers(self, engine: Engine, draws: Draws) -> LogProbs:
        """Return the log-probabilities of examples, by the passes that an engine makes."""
        return engine.weights(self, draws)

    def passes(self, draws: Draws, *, mean: bool) -> int:
        """Return how many passes over all examples the answers take at most, with those at the mean or without."""
        # where draws end, the mean is draw 0: a point's, or that of points' first member
        return draws.count + int(mean and self.distinct is None)

    @cached_property
    def noise(self) -> Noise:
        """What draws are made of: what it was when the posterior was first written."""
        return Noise() if self.origin is None else Noise(self.origin.noise)

    @cached_property
    def kept(self) -> Kept:
        """What one prediction keeps for the next."""
        return Kept()

    @final
    def cached_draw(self, index: int, draws: Draws) -> Params:
        """Return a draw, and keep it for the next prediction while there is room; it is not to be changed."""
        return self.kept.draw(self, index, draws)

    @final
    def placed(self, devices: Mapping[str, torch.device]) -> Self:
        """Return the posterior with the tensors of each parameter on a device, where its draws are then made.

        The copy is kept until other devices are asked for; draws take as much again as they have numbers.
        """
        return self.kept.placed(self, devices)

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
    @classmethod
    def from_parts(cls, content: Content, members: tuple[Posterior, ...]) -> Self:
        """Return a posterior of this family from what a folder holds and the posteriors that it is made of."""
        parts: dict[str, object] = {"mean": content.mean, "members": members, "origin": content.origin}
        if members:
            parts["posterior"] = members[0]
        taken = {field.name: parts[field.name] for field in fields(cast(Any, cls)) if field.name in parts}
        return cls(**content.scalars, **content.tensors, **taken)

    @final
    def require_origin(self) -> Origin:
        """Return the origin, or refuse to write a posterior that has none."""
        if self.origin is None:
            raise InputError("a posterior without an origin cannot be written; build it with origin=origin_of(model)")
        return self.origin

    @final
    def write(self, folder: Path) -> None:
        """Write the posterior into a folder that is there, and what it is made of below it."""
        values = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        origin = self.require_origin()
        members = values.get("members") or ([values["posterior"]] if "posterior" in values else [])
        tensors: dict[str, Params] = {}
        scalars: dict[str, object] = {}
        for name, value in values.items():
            if name in ("mean", "origin", "members", "posterior"):
                continue
            if isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values()):
                tensors[name] = dict(value)
            else:
                scalars[name] = dict(value) if isinstance(value, Mapping) else value
        for i, member in enumerate(members):
            member_folder(folder, i).mkdir()
            member.write(member_folder(folder, i))
        write_folder(folder, Content(type(self).__name__, self.mean, origin, tensors, scalars, len(members)))

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
            private: As `bayeslora.push` takes it.
            token: As `bayeslora.push` takes it.
            commit_message: The commit's message.
        """
        target = Path(folder)
        with atomic_folder(target, overwrite=overwrite) as work:
            self.write(work)
            text = card(work, target.resolve().name, evaluation, task)
            (work / "README.md").write_text(text, encoding="utf-8")
        if push_to_hub:
            push(folder, repo_id, private=private, token=token, commit_message=commit_message)


Factor = float | Tensor
Rescaling = Callable[[str, Posterior], Factor]
"""The factor on a parameter, by its name and the posterior that it is a parameter of."""


def rescaled_mean(posterior: Posterior, signal: Rescaling | None) -> Params:
    """Return a posterior's mean multiplied parameter by parameter, or as it is."""
    if signal is None:
        return posterior.mean
    return {name: value * signal(name, posterior) for name, value in posterior.mean.items()}
