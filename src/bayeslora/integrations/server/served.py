"""What a server answers with, and what it allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import nn

from bayeslora._typing import Tokenizer
from bayeslora.params import Params, require_lora
from bayeslora.posteriors import Draws, Point, Posterior
from bayeslora.prediction.memory import draws_for
from bayeslora.tasks.types import Split

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names of the machine itself."""


@final
@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        waiting: Most requests in the queue; further requests get HTTP 429.
        rows: Most rows of a batch.
        tokens: Most new tokens of an answer.
        timeout: Most seconds of a request, in the queue and in the model.
        body: Most bytes of a request.
        api_key: What clients have to send as ``Authorization: Bearer``; empty for nothing.
        context: Most tokens of a prompt with its answer; a model's own limit counts too.
        characters: Most characters, or token ids, of a text in a request.
        texts: Most texts to classify in one request.
        choices: Most choices to classify a text into.
        connections: Most connections; what comes on further ones gets HTTP 503.
        patience: Seconds that a connection waits for its client: to send a request, the next one, or to read on.
        hosts: Names that clients may call the server by, in ``Host``; ``*`` for any.
    """

    waiting: int = 64
    rows: int = 16
    tokens: int = 1024
    timeout: float = 120.0
    body: int = 2**20
    api_key: str = ""
    context: int = 32768
    characters: int = 2**18
    texts: int = 1024
    choices: int = 256
    connections: int = 256
    patience: int = 20
    hosts: tuple[str, ...] = LOOPBACK


@final
@dataclass(frozen=True)
class Served:
    """What a server answers with.

    Attributes:
        name: Name of the model that averages the draws; ``name/mean`` and ``name/draw-000`` … are its parts.
        model: PEFT model.
        tokenizer: Its tokenizer.
        posterior: What was learned.
        draws: Draws unless a request says otherwise; 0 for the mean.
        most_draws: Most draws of a request.
        like: An empty split with the task's format and classes, for `/v1/classify`.
        seed: Which stream of draws.
        text_column: Column of the text in rows that `/v1/classify` is given; empty: the usual names.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    posterior: Posterior
    draws: int
    most_draws: int
    like: Split
    seed: int = 0
    text_column: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the models, the average first; a draw that is only the answer's has none."""
        parts = range(self.most_draws if self.posterior.before_answer is None else 0)
        return [self.name, f"{self.name}/mean", *(f"{self.name}/draw-{k:03d}" for k in parts)]

    @property
    def generates(self) -> bool:
        """Whether the model is a language model."""
        return require_lora(self.model).get_base_model().get_output_embeddings() is not None

    def posterior_of(self, name: str) -> Posterior:
        """Return the posterior that a model's name stands for."""
        part = name.removeprefix(self.name).lstrip("/")
        if not part:
            return self.posterior
        return Point(self.posterior.mean if part == "mean" else self._draws([int(part.removeprefix("draw-"))])[0])

    def draws_of(self, name: str, count: int) -> list[Params]:
        """Return the draws that a model of this name averages."""
        if name != self.name or not count:
            return [self.posterior_of(name).mean]
        return self._draws(range(count))

    def before(self, name: str, count: int) -> Params | None:
        """Return the weights for the prompt but its last token; None where they are each draw's."""
        return draws_for(self.model, self.posterior).before_answer if name == self.name and count else None

    def _draws(self, numbers: Iterable[int]) -> list[Params]:
        """Return draws by their numbers."""
        posterior = draws_for(self.model, self.posterior)
        return [posterior.cached_draw(k, Draws(seed=self.seed)) for k in numbers]
