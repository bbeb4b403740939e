"""Prompts that are given back before their answers, with the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from bayeslora._typing import Tokenizer
from bayeslora.integrations.server.decoding import Echo, LogProbs
from bayeslora.integrations.server.served import Served
from bayeslora.integrations.server.text import Text
from bayeslora.prediction.likelihoods import Likelihoods
from bayeslora.prediction.memory import default_token_budget
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Format, Split

Scores = list[tuple[float, dict[int, float]]]
"""log p̄ of each token, and of the most probable ones in its place."""
PART = 512
"""Tokens that are scored at once: the distributions at all places of a long prompt do not fit into memory."""


def scoring(served: Served, model: str, draws: int, ids: Sequence[int], top: int) -> list[Callable[[], Scores]]:
    """Return the parts of the work that scores each token of a prompt but the first, averaged over draws."""
    return [partial(_scores, served, model, draws, ids[: at + PART], at, top) for at in range(1, len(ids), PART)]


def _scores(served: Served, model: str, draws: int, ids: Sequence[int], start: int, top: int) -> Scores:
    """Return the scores of the tokens from ``start`` on."""
    readout = readout_for(served.model, Split("prompt", (), Format("", "likelihood")), served.tokenizer)
    budget = default_token_budget(served.model)
    before = served.before(model, draws)  # where the prompt has no noise
    weights = served.draws_of(model, draws) if before is None else [before]
    scorer = Likelihoods(served.model, weights, readout, budget)
    log_p = scorer.average(ids[:start], ids[start:])
    values = log_p.gather(1, torch.tensor(ids[start:])[:, None])[:, 0].tolist()
    best = log_p.topk(top)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(value, dict(zip(*pair, strict=True))) for value, pair in zip(values, tops, strict=True)]


def echo_of(tokenizer: Tokenizer, prompt: str | list[int], ids: Sequence[int], scores: Scores | None) -> Echo:
    """Return a prompt's text and, with the scores of its tokens but the first, its log-probabilities."""
    if isinstance(prompt, str) and tokenizer.is_fast:
        spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        text, starts = prompt, [start for start, _ in spans[: len(ids)]]
    else:
        text, starts = _placed(tokenizer, ids)
    if scores is None:
        return Echo(text)
    tops = [{tokenizer.decode([i]): p for i, p in top.items()} for _, top in scores]
    log_probs: LogProbs = {
        "tokens": [tokenizer.decode([i]) for i in ids],
        "token_logprobs": [None, *(value for value, _ in scores)],
        "top_logprobs": [None, *tops],
        "text_offset": list(starts),
    }
    return Echo(text, log_probs)


def _placed(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Return the text of token ids, and where in it each begins."""
    text, starts = Text(), list[int]()
    for token in ids:
        starts.append(len(text.settled))
        text.add(tokenizer, token)
    text.close(tokenizer)
    return text.settled, starts
