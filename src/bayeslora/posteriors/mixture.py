"""An equal mixture of any posteriors: ensembles, MultiSWAG, ensembles of IVON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from bayeslora.errors import InputError
from bayeslora.params import Params, seed_of
from bayeslora.posteriors.base import Posterior, Rescaling
from bayeslora.posteriors.engine import Engine, LogProbs
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Draws, Sampling


@final
@dataclass(frozen=True)
class Mixture(Posterior):
    """An equal mixture of any posteriors over the same parameters: ensembles, MultiSWAG, IVON ensembles.

    Draw k comes from member k mod M and is that member's draw k // M; members have independent streams. Averaging the
    weights of members that started apart means nothing, so ``mean`` is the first member's.

    Attributes:
        members: The M posteriors.
    """

    description: ClassVar[str] = "an equal mixture of several ({members} members)"

    members: tuple[Posterior, ...]
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Check that there are members and that they have the same parameters."""
        if not self.members:
            raise InputError("a mixture needs at least one member")
        shapes = [{k: v.shape for k, v in m.mean.items()} for m in self.members]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise InputError(f"member {i} of the mixture has other parameters than member 0")
        if any(member.before_answer is not None for member in self.members):
            raise InputError("a member has noise on the answer's tokens only; restrict the mixture, not its members")

    @property
    def mean(self) -> Params:
        """The first member's mean."""
        return self.members[0].mean

    @property
    def distinct(self) -> int | None:
        """The sum over the members, if each has an end."""
        counts = [m.distinct for m in self.members]
        return None if None in counts else sum(c for c in counts if c is not None)

    def draw(self, index: int, seed: int = 0, sampling: Sampling = "independent") -> Params:
        """Return draw ``index // M`` of member ``index % M``."""
        inner, member = divmod(index, len(self.members))
        return self.members[member].draw(inner, self._seed(seed, member), sampling)

    def unit(self, sampling: Sampling = "independent") -> int:
        """Return how many draws belong together: whole groups of every member."""
        return len(self.members) * math.lcm(*(member.unit(sampling) for member in self.members))

    def count(self, draws: int | Draws) -> int:
        """Return how many draws serve a request: the members get equally many, and none is drawn twice."""
        draws, size = Draws.of(draws), len(self.members)
        each = max(member.count(-(-draws.count // size)) for member in self.members)
        return super().count(replace(draws, count=size * each))

    def components(self, count: int) -> tuple[int, ...]:
        """Return the member that each draw comes from."""
        return tuple(k % len(self.members) for k in range(count))

    def rescaled(self, noise: Rescaling, signal: Rescaling | None = None) -> Mixture | None:
        """Return the mixture of the rescaled members; None if one has no noise in the weights."""
        members = tuple(m for member in self.members if (m := member.rescaled(noise, signal)) is not None)
        return replace(self, members=members) if len(members) == len(self.members) else None

    def without_noise(self, point: Posterior) -> Posterior:
        """Return the point with the scaling of the first member's mean."""
        return self.members[0].without_noise(point)

    @property
    def draws_are_weights(self) -> bool:
        """Whether those of all members are, and none has a scaling of its own."""
        return all(member.draws_are_weights and member.unscaled is member for member in self.members)

    @property
    def minimum_draws(self) -> int:
        """The most that a member wants."""
        return max(member.minimum_draws for member in self.members)

    def answers(self, engine: Engine, draws: Draws) -> LogProbs:
        """Return the answers with drawn weights, or those of each member in turn where they are not all weights."""
        if self.draws_are_weights:
            return super().answers(engine, draws)
        size = len(self.members)
        each = [member.answers(engine, share) for member, share in self._shares(draws)]
        return torch.stack([each[k % size][0][k // size] for k in range(draws.count)]), each[0][1]

    def passes(self, draws: Draws, *, mean: bool) -> int:
        """As of any draws of weights, or the sum over the members where they are not all weights."""
        if self.draws_are_weights:
            return super().passes(draws, mean=mean)
        return sum(member.passes(share, mean=mean) for member, share in self._shares(draws))

    def _shares(self, draws: Draws) -> Iterator[tuple[Posterior, Draws]]:
        """Yield the members and what each gives of some draws; the last give none if there are fewer draws."""
        for k, member in enumerate(self.members[: draws.count]):
            count = len(range(k, draws.count, len(self.members)))
            yield member, replace(draws, count=count, seed=self._seed(draws.seed, k), tolerance=None)

    def _seed(self, seed: int, member: int) -> int:
        """Return the stream of draws of a member; the first has the mixture's own, and so its members' too."""
        before = sum(m.unit() for m in self.members[:member])  # no fewer than the posteriors inside those before
        return seed_of(seed, "member", before) if member else seed
