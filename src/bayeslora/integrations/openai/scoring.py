"""Log-likelihoods of answers out of generated tokens, and the choices' scores out of them.

A generated token's log-probabilities are right wherever sampling is. On vLLM this can be said of no other path: echoed
prompts are its ``prompt_logprobs``, which leave out the part of an adapter that belongs to the head (vllm issue 51594)
and end the engine on CPUs where two prompts meet in one step. An answer of several tokens takes one request for each
different beginning of the choices; choices that are single tokens, as letters are, take one in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.integrations.openai.echo import Choice, Query, Text

MAX_TOKENS_AT_ONCE = 128
"""How many tokens vLLM reads in one place (its MAX_LOGPROB_TOKEN_IDS)."""
Ids = tuple[int, ...]
LogProbs = Mapping[tuple[Ids, int], float]
"""Log-probability of a token after the beginning of an answer."""


def reads(query: Query) -> list[tuple[Ids, Ids]]:
    """Return each beginning of the answers with the tokens that go on from it, no more than one request holds."""
    wanted: dict[Ids, dict[int, None]] = {}
    for answer in map(_ids, query.answers):
        for place, token in enumerate(answer):
            wanted.setdefault(answer[:place], {})[token] = None
    return [
        (beginning, tuple(tokens)[start : start + MAX_TOKENS_AT_ONCE])
        for beginning, tokens in wanted.items()
        for start in range(0, len(tokens), MAX_TOKENS_AT_ONCE)
    ]


def read_request(query: Query, beginning: Ids, tokens: Ids) -> dict[str, object]:
    """Return the fields of a request that generates one token and shows the log-probabilities of some."""
    ids = [*_ids(query.prompt), *beginning]
    shown = {"logprobs": 1, "logprob_token_ids": list(tokens), "return_tokens_as_token_ids": True}
    return {"prompt": [ids], "max_tokens": 1, "temperature": 0, **shown}


def shown_log_probs(choice: Choice, tokens: Ids) -> list[float]:
    """Return the log-probabilities of the tokens that were asked for."""
    top = (choice["logprobs"].get("top_logprobs") or [None])[0] or {}
    values = [top.get(f"token_id:{token}") for token in tokens]
    if None in values:
        raise InputError(
            f"the server truncates log-probabilities: it gives {len(values) - values.count(None)} of the {len(values)} "
            "that were asked for (logprob_token_ids); use a newer vLLM, or score by echo=True"
        )
    return [float(value) for value in values if value is not None]


def log_likelihoods_of(query: Query, log_probs: LogProbs) -> list[float]:
    """Return the log-likelihood of each answer, the sum over its tokens."""
    answers = map(_ids, query.answers)
    return [sum(log_probs[answer[:place], token] for place, token in enumerate(answer)) for answer in answers]


def choice_scores(
    log_likelihoods: Sequence[Sequence[float]], queries: Sequence[Query], neutral: Sequence[Query]
) -> Float[Tensor, "N C"]:
    """Return the choices' scores: log-likelihoods times their scales, less those after the neutral prompt.

    The log-likelihoods are those of the queries and, after them, of `unique_pairs` of the neutral ones.
    """
    pairs = unique_pairs(neutral)
    known = {pair: value for pair, (value,) in zip(pairs, log_likelihoods[len(queries) :], strict=True)}
    rows = []
    for number, (query, values) in enumerate(zip(queries, log_likelihoods, strict=False)):
        row = torch.tensor(values, dtype=torch.float64)
        if query.scales:
            row *= torch.tensor(query.scales, dtype=torch.float64)
        if neutral:
            row -= torch.tensor([known[neutral[number].prompt, a] for a in neutral[number].answers], dtype=row.dtype)
        rows.append(row)
    return pad_sequence(rows, batch_first=True, padding_value=-torch.inf)


def unique_pairs(queries: Iterable[Query]) -> dict[tuple[Text, Text], Query]:
    """Return the different pairs of a prompt and an answer, each with its query."""
    return {(query.prompt, a): Query(query.place, query.prompt, (a,)) for query in queries for a in query.answers}


def _ids(text: Text) -> Ids:
    """Return token ids, which the tokenizer has made of all texts that are scored by tokens."""
    assert not isinstance(text, str)
    return tuple(int(token) for token in text)
