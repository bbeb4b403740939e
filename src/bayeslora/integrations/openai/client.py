"""Draws on a server: the adapters of `bayeslora export`, asked over OpenAI's ``/v1/completions`` and averaged here.

A text's log-likelihood under an adapter is the sum of its tokens' log-probabilities after the prompt, which the server
gives back for a prompt that holds both (``echo``, ``logprobs``). What is averaged over the adapters are probabilities:
of a task's choices, after a softmax over them, or of whole texts. vLLM answers so, and every server that echoes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.integrations.openai.echo import Query, Text, queries_of_split, query_of_texts
from bayeslora.integrations.openai.session import Connection
from bayeslora.metrics.prediction import Prediction
from bayeslora.prediction.generation.answers import Answers
from bayeslora.prediction.generation.semantic import Equivalence
from bayeslora.tasks.types import Split

__all__ = ["Adapters"]

Pairs = dict[tuple[Text, Text], Query]
"""Different pairs of a prompt and an answer, each with its query."""
FIXED_SETTINGS = ("model", "prompt", "echo", "stream", "logprobs")
"""Fields of a request that a caller's settings cannot change."""


@final
@dataclass(frozen=True)
class Adapters(Connection):
    """Draws of a posterior that a server holds as adapters; the arguments are the attributes of `Connection`."""

    def served(self) -> tuple[str, ...]:
        """Return the names of the adapters that the server holds, without its base model."""
        return self.run(lambda session: session.served())

    def predict(self, split: Split) -> Prediction:
        """Return every adapter's probabilities of the choices; see `bayeslora.predict`.

        Args:
            split: The N examples; their format's readout is ``letters``, ``likelihood`` or ``auto``.

        Returns:
            The prediction, a draw for each adapter; without a pass at the mean, and without a Monte Carlo error, for a
            server does not say how its adapters were drawn.
        """
        queries, neutral, readout, cut = queries_of_split(split, self.tokenizer)
        unique = {(query.prompt, a): Query(query.place, query.prompt, (a,)) for query in neutral for a in query.answers}
        began = time.perf_counter()
        draws = self.run(lambda session: session.log_likelihoods([*queries, *unique.values()]))
        scores = torch.stack([_scores(draw, queries, neutral, unique) for draw in draws])
        log_probs = scores.log_softmax(-1).float()
        return Prediction(log_probs, truncated=cut, readout=readout, seconds=time.perf_counter() - began)

    def log_likelihoods(self, prompt: str, texts: Sequence[str]) -> Float[Tensor, "S N"]:
        """Return each adapter's log-likelihood of texts after a prompt, the end of the text not counted.

        Args:
            prompt: What comes before.
            texts: The N texts, each with the space that it begins with.

        Returns:
            Natural logarithms.
        """
        query = query_of_texts(prompt, texts, self.tokenizer)
        return torch.tensor([draw[0] for draw in self.run(lambda session: session.log_likelihoods([query]))])

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
        draws = self.run(lambda session: session.texts(prompts, n, body, seed))
        numbers = tuple(k for k in range(len(draws)) for _ in range(n))
        return [
            Answers.of(tuple(answer for draw in draws for answer in draw[i]), numbers, same)
            for i in range(len(prompts))
        ]


def _scores(
    log_likelihoods: Sequence[Sequence[float]], queries: Sequence[Query], neutral: Sequence[Query], unique: Pairs
) -> Float[Tensor, "N C"]:
    """Return the choices' scores: log-likelihoods times their scales, less those after the neutral prompt."""
    known = {pair: value for pair, (value,) in zip(unique, log_likelihoods[len(queries) :], strict=True)}
    rows = []
    for number, (query, values) in enumerate(zip(queries, log_likelihoods, strict=False)):
        row = torch.tensor(values, dtype=torch.float64)
        if query.scales:
            row *= torch.tensor(query.scales, dtype=torch.float64)
        if neutral:
            row -= torch.tensor([known[neutral[number].prompt, a] for a in neutral[number].answers], dtype=row.dtype)
        rows.append(row)
    return pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
