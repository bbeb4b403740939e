"""What a posterior asks for when it is to answer, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from bayeslora._typing import Float
from bayeslora.params import Params
from bayeslora.posteriors.sampling import Draws

if TYPE_CHECKING:
    from bayeslora.posteriors.base import Posterior
    from bayeslora.posteriors.linearised import Linearisable

LogProbs = tuple[Float[Tensor, "S N C"], Float[Tensor, "N C"] | None]
"""The log-probabilities of the draws, and those at the mean if they are asked for."""

Take = Callable[[Sequence[int], Float[Tensor, "B C"], Float[Tensor, "K B C C"]], object]
"""Takes the numbers of some examples, the means of their logits, and the covariances under each of K posteriors."""


class Engine(Protocol):
    """Passes of examples through a model, as prediction gives them to a posterior that is to answer."""

    @property
    def model(self) -> nn.Module:
        """The PEFT model."""

    @property
    def mean(self) -> bool:
        """Whether the answers at the mean are asked for too."""

    @property
    def contents(self) -> Sequence[object]:
        """What tells an example from others, wherever it stands among them."""

    def weights(self, posterior: Posterior, draws: Draws) -> LogProbs:
        """Return the answers of the model with drawn weights, and with the mean."""

    def once(self, params: Params) -> Float[Tensor, "N C"]:
        """Return the answers of the model with some weights, in one pass."""

    @property
    def classes(self) -> int:
        """The number C of choices of the example that has most."""

    def moments(self, posterior: Linearisable, take: Take) -> None:
        """Give mean and covariance of the logits of the model linearised at the mean, some examples at a time."""
