"""An equal mixture of any posteriors: ensembles, MultiSWAG, ensembles of IVON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bayeslora.errors import InputError
from bayeslora.params import Params, generator
from bayeslora.posteriors.base import Posterior
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.sampling import Sampling


@final
@dataclass(frozen=True)
class Mixture(Posterior):
    """An equal mixture of any posteriors over the same parameters: ensembles, MultiSWAG, IVON ensembles.

    Draw k comes from member k mod M and is that member's draw k // M; members have independent streams. Averaging the
    weights of members that started apart means nothing, so ``mean`` is the first member's.

    Attributes:
        members: The M posteriors.
    """

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
        return self.members[member].draw(inner, member_seed(seed, member), sampling)


def member_seed(seed: int, member: int) -> int:
    """Return the stream of draws of a mixture's member.

    Args:
        seed: The mixture's stream.
        member: Number of the member.

    Returns:
        The seed; the first member has the mixture's own.
    """
    return seed if member == 0 else int(generator(seed, "member", member).initial_seed())
