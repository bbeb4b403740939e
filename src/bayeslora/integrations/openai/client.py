"""Draws on a server: the adapters of `bayeslora export`, asked over OpenAI's ``/v1/completions`` and averaged here.

What is averaged over the adapters are probabilities: of a task's choices, after a softmax over them, or of whole texts.
A text's log-likelihood under an adapter is the sum of its tokens' log-probabilities after the prompt; how a server is
asked for them is in `bayeslora.integrations.openai.scoring`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from bayeslora._typing import Float, Tokenizer
from bayeslora.errors import InputError
from bayeslora.integrations.openai.catalogue import Catalogue
from bayeslora.integrations.openai.echo import Query, queries_of_split, query_of_texts
from bayeslora.integrations.openai.scoring import choice_scores, unique_pairs
from bayeslora.integrations.openai.session import Connection
from bayeslora.integrations.openai.verification import (
    Reference,
    Verification,
    named_draws,
    rows_to_verify,
    verification,
)
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Draws, Posterior
from bayeslora.prediction.generation.answers import Answers
from bayeslora.prediction.generation.semantic import Equivalence
from bayeslora.tasks.types import Split

__all__ = ["Adapters", "Reference", "Verification"]

FIXED_SETTINGS = ("model", "prompt", "echo", "stream", "logprobs")
"""Fields of a request that a caller's settings cannot change."""
ROWS_TO_CHECK = 8
"""How many rows the first prediction checks."""


@final
@dataclass(frozen=True)
class Adapters(Connection):
    """Draws of a posterior that a server holds as adapters; further arguments are the attributes of `Connection`.

    Attributes:
        reference: Model and posterior against which the first prediction is verified on its first rows, see `verify`.
        check: Whether the first prediction is checked: against the reference if there is one, and without one whether
            every adapter changes what the base model answers.
    """

    reference: Reference | None = field(default=None, repr=False)
    check: bool = True
    _first: dict[str, Catalogue] = field(default_factory=dict, init=False, repr=False, compare=False)

    def served(self) -> tuple[str, ...]:
        """Return the names of the adapters that the server holds, without its base model."""
        return self.run(lambda session: session.catalogue()).chosen((), self.server)

    def predict(self, split: Split, *, base: bool = False) -> Prediction:
        """Return every adapter's probabilities of the choices; see `bayeslora.predict`.

        Args:
            split: The N examples; their format's readout is ``letters``, ``likelihood`` or ``auto``.
            base: Whether to ask the server's base model too.

        Returns:
            The prediction, a draw for each adapter; without a pass at the mean, and without a Monte Carlo error, for a
            server does not say how its adapters were drawn.

        Raises:
            InputError: If the split cannot be asked, the server cannot answer or has no base model, or its first
                answers are not those of the draws.
        """
        began = time.perf_counter()
        catalogue = self._catalogue()
        if base and not catalogue.base:
            raise InputError(f"{self.server} does not say which model is its adapters' base; leave base=True out")
        if self.check and "checked" not in self._first:
            self._check_first(catalogue, split)
            self._first["checked"] = catalogue
        asked = (*[catalogue.base] * base, *self._names(catalogue))
        every, readout, cut = self._log_probs(catalogue, asked, split)
        self._catalogue()
        untuned, seconds = every[0] if base else None, time.perf_counter() - began
        return Prediction(every[int(base) :], truncated=cut, readout=readout, seconds=seconds, base_log_probs=untuned)

    def verify(
        self,
        model: nn.Module,
        posterior: Posterior,
        rows: int = ROWS_TO_CHECK,
        *,
        draws: Draws | None = None,
        split: Split | None = None,
    ) -> tuple[Verification, ...]:
        """Compare the server's answers on a few rows with those of the draws here.

        Args:
            model: PEFT model with the base that the posterior was trained on; its adapter is unchanged afterwards.
            posterior: What was exported. An adapter whose name ends in a number is the draw of that number, one that is
                called the mean is the mean, and any other is the draw of its place among the names.
            rows: How many rows.
            draws: Seed and sampling of the export; None for those of `Draws`.
            split: Where the rows come from; None for questions about odds.

        Returns:
            How far each adapter is from its draw: for the split's readout, or for letters and for likelihoods.

        Raises:
            InputError: If the posterior has not as many draws as the server has adapters, or the server cannot answer.
        """
        catalogue, reference = self._catalogue(), Reference(model, posterior, draws or Draws())
        asked = rows_to_verify(rows, posterior.require_origin()) if split is None else [split]
        splits = [each.take(range(min(rows, len(each)))) for each in asked]
        return tuple(self._verified(catalogue, reference, each) for each in splits)

    def log_likelihoods(self, prompt: str, texts: Sequence[str]) -> Float[Tensor, "S N"]:
        """Return each adapter's log-likelihood of texts after a prompt, the end of the text not counted.

        Args:
            prompt: What comes before.
            texts: The N texts, each with the space that it begins with.

        Returns:
            Natural logarithms.
        """
        catalogue = self._catalogue()
        query = query_of_texts(prompt, texts, self._tokenizer(catalogue))
        draws = self._log_likelihoods(catalogue, self._names(catalogue), [query])
        self._catalogue()
        return torch.tensor([values for (values,) in draws])

    def score(self, prompt: str, texts: Sequence[str]) -> Float[Tensor, " N"]:
        """Return log (1/S) Σ_k p_k(text | prompt) of each text under S adapters; see `log_likelihoods`."""
        each = self.log_likelihoods(prompt, texts)
        return each.logsumexp(0) - math.log(len(each))

    def generate_each(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        n: int = 1,
        seed: int | None = None,
        same: Equivalence | None = None,
        **settings: object,
    ) -> list[Answers]:
        """Return answers of each adapter to each prompt, and which of them say the same.

        Args:
            prompts: Texts.
            max_tokens: Most tokens of an answer.
            temperature: Of the tokens; 1 samples from each draw, 0 takes its most probable tokens.
            n: Answers of each adapter.
            seed: Seed of the tokens; adapter k has ``seed + k``. None leaves it to the server.
            same: Whether two texts say the same; see `bayeslora.generate_each`.
            **settings: More of the request, such as ``top_p`` or ``stop``.

        Returns:
            The answers to each prompt, adapter after adapter. A server gives no entropies (they are not a number), and
            mostly no token ids (-1).

        Raises:
            InputError: If a setting is not the caller's, or a number makes no sense.
        """
        for key in settings.keys() & set(FIXED_SETTINGS):
            raise InputError(f"generate_each sets {key!r} itself; leave it out")
        if n < 1 or max_tokens < 1:
            raise InputError(f"n and max_tokens must be at least 1, and they are {n} and {max_tokens}")
        body = {"max_tokens": max_tokens, "temperature": temperature, **settings}
        names = self._names(self._catalogue())
        draws = self.run(lambda session: session.texts(names, prompts, n, body, seed))
        self._catalogue()
        numbers = tuple(k for k in range(len(draws)) for _ in range(n))
        return [
            Answers.of(tuple(answer for draw in draws for answer in draw[i]), numbers, same)
            for i in range(len(prompts))
        ]

    def _catalogue(self) -> Catalogue:
        """Return what the server serves now; refuse adapters that are not those of the first request."""
        now = self.run(lambda session: session.catalogue())
        now.check_same(self._first.setdefault("catalogue", now), self.names, self.server)
        return now

    def _names(self, catalogue: Catalogue) -> tuple[str, ...]:
        """Return the adapters that are asked."""
        return catalogue.chosen(self.names, self.server)

    def _echoes(self, catalogue: Catalogue) -> bool:
        """Return whether texts are scored out of echoes."""
        return not catalogue.counts_by_tokens if self.echo is None else self.echo

    def _tokenizer(self, catalogue: Catalogue) -> Tokenizer | None:
        """Return the tokenizer with which prompts are sent, if they are sent as tokens."""
        if self.tokenizer is not None or self._echoes(catalogue):
            return self.tokenizer
        return catalogue.tokenizer(self.server)

    def _log_likelihoods(
        self, catalogue: Catalogue, names: Sequence[str], queries: Sequence[Query]
    ) -> list[list[list[float]]]:
        """Return natural logarithms by adapter, query and answer."""
        echo, batches = self._echoes(catalogue), catalogue.bears_batches
        # two echoes in one step end vLLM's engine on CPUs
        connection = replace(self, concurrency=1) if echo and catalogue.counts_by_tokens else self
        return connection.run(lambda session: session.log_likelihoods(names, queries, echo=echo, batches=batches))

    def _log_probs(
        self, catalogue: Catalogue, names: Sequence[str], split: Split
    ) -> tuple[Float[Tensor, "S N C"], str, int]:
        """Return the log-probabilities of a split's choices, the readout, and how many prompts were cut."""
        queries, neutral, readout, cut = queries_of_split(split, self._tokenizer(catalogue))
        draws = self._log_likelihoods(catalogue, names, [*queries, *unique_pairs(neutral).values()])
        scores = torch.stack([choice_scores(draw, queries, neutral) for draw in draws])
        return scores.log_softmax(-1).float(), readout, cut

    def _verified(self, catalogue: Catalogue, reference: Reference, split: Split) -> Verification:
        """Return how far each adapter is from its draw on a split."""
        base = catalogue.base
        names = (*filter(None, [base]), *self._names(catalogue))
        draws = named_draws(reference, names, base)
        log_probs, _, _ = self._log_probs(catalogue, names, split)
        return verification(log_probs, reference.model, draws, names, base, split, self.tokenizer)

    def _check_first(self, catalogue: Catalogue, split: Split) -> None:
        """Refuse a server whose first answers are not those of the draws, or those of its base model."""
        names = self._names(catalogue)
        if self.reference is not None:
            rows = split.take(range(min(ROWS_TO_CHECK, len(split))))
            self._verified(catalogue, self.reference, rows).check(self.server)
        elif catalogue.base and len(split):
            rows = split.take(range(min(2, len(split))))
            log_probs, _, _ = self._log_probs(catalogue, (catalogue.base, *names), rows)
            idle = [name for name, own in zip(names, log_probs[1:], strict=True) if torch.equal(own, log_probs[0])]
            if idle:
                raise InputError(
                    f"{self.server} answers under {idle[0]!r} as its base model does, bit for bit; it does not apply "
                    "the adapter, or that has learned nothing (then check=False)"
                )
