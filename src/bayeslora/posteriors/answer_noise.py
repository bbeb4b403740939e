"""A posterior whose noise is on the tokens of the answer only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from bayeslora.errors import InputError
from bayeslora.params import Params
from bayeslora.posteriors.base import Posterior
from bayeslora.posteriors.provenance import Origin
from bayeslora.posteriors.wrappers import Derived


@final
@dataclass(frozen=True)
class AnswerNoise(Derived):
    """A posterior whose draws apply from the last token of the prompt on; the mean applies to the tokens before.

    All draws go on from the keys and values that the prompt has under the mean, so S draws of m tokens after a prompt
    of n cost (n + S·m) / (n + m) passes. The adapter that starts at a token is activated LoRA's (Greenewald et al.
    2025, arXiv 2504.12397); that a draw does is ours.

    Attributes:
        posterior: Any posterior whose draws are weights, without a scaling of its log-probabilities.
    """

    description: ClassVar[str] = "a posterior whose noise is on the answer's tokens only, which no plain adapter does"

    posterior: Posterior
    origin: Origin | None = None

    def __post_init__(self) -> None:
        """Refuse draws that are no weights, and a scaling, which is to be the outermost."""
        if not self.posterior.draws_are_weights or self.posterior.unscaled is not self.posterior:
            raise InputError(
                f"the noise of a {type(self.posterior).__name__} cannot be kept to the answer's tokens, for its draws "
                "are no weights; use one whose draws are"
            )

    @property
    def before_answer(self) -> Params:
        """The mean."""
        return self.mean
