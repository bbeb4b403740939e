"""Likelihoods of answers out of echoed prompts, as OpenAI's ``/v1/completions`` gives them.

The answer's tokens are those at the end of the echo whose texts make up the answer. They are not looked for by
``text_offset``: vLLM counts in it the token that opens a text and is not part of it, and each piece of a letter that
takes several tokens as a letter of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError
from bayeslora.prediction.encoding import encode, length_scales
from bayeslora.prediction.generation.answers import Answer
from bayeslora.tasks.templates import answer_text, neutral_prompt, render, resolve_format
from bayeslora.tasks.types import Split

Text = str | tuple[int, ...]
"""A text, or its token ids."""
Choice = Mapping[str, Any]
"""A choice of a completion, as a server answers it; its ``logprobs`` have lists with one entry a token."""


@final
@dataclass(frozen=True)
class Query:
    """A prompt and the answers to score after it: ``place`` names it in messages, ``scales`` (empty: 1) are factors."""

    place: str
    prompt: Text
    answers: tuple[Text, ...]
    scales: tuple[float, ...] = ()

    @property
    def whole_prompts(self) -> list[str] | list[list[int]]:
        """The prompt with each answer, as a request holds it."""
        if isinstance(self.prompt, str):
            return [f"{self.prompt}{answer}" for answer in self.answers]
        return [[*self.prompt, *(int(token) for token in answer)] for answer in self.answers]


def queries_of_split(split: Split, tokenizer: Tokenizer | None) -> tuple[list[Query], list[Query], str, int]:
    """Return a split's queries, its neutral ones (one each or none), the readout, and how many prompts were cut."""
    if not len(split):
        raise InputError(f"{split.name} has no examples")
    readout: str = split.format.readout
    if readout == "auto":
        readout = "likelihood" if split.classes else "letters"
    if readout == "head":
        raise InputError("a classification head cannot be read from completions; use readout='likelihood'")
    places = [f"row {number} of {split.name}" for number in range(len(split))]
    if tokenizer is not None:
        encoded, cut = encode(split, tokenizer, readout, None)
        neutral = [Query("the neutral prompt", row.neutral, row.neutral_answers) for row in encoded if row.neutral]
        pairs = zip(places, encoded, strict=True)
        return [Query(place, row.prompt, row.answers, row.scales) for place, row in pairs], neutral, readout, cut
    if split.format.max_length is not None:
        raise InputError(f"the format of {split.name} cuts prompts by tokens (max_length); pass the base's tokenizer=")
    form = resolve_format(split.format, readout)
    if form.normalisation == "tokens":
        raise InputError(f"the format of {split.name} counts tokens (normalisation); pass the base's tokenizer=")
    queries, neutral = [], []
    for place, example in zip(places, split, strict=True):
        texts = tuple(answer_text(example, i, readout) for i in range(len(example.choices)))
        queries.append(Query(place, render(example, form), texts, length_scales(example, (), form.normalisation)))
        if form.normalisation == "unconditional":
            neutral.append(Query("the neutral prompt", neutral_prompt(form), texts))
    return queries, neutral, readout, 0


def query_of_texts(prompt: str, texts: Sequence[str], tokenizer: Tokenizer | None) -> Query:
    """Return a prompt with texts that may follow it, as token ids where there is a tokenizer."""
    if not prompt or not texts or not all(texts):
        raise InputError("to score texts takes a prompt and at least one text, none of them empty")
    if tokenizer is None:
        return Query("the prompt", prompt, tuple(texts))
    end = tokenizer.eos_token_id
    rows = [list(tokenizer(text)["input_ids"]) for text in (prompt, *(prompt + text for text in texts))]
    first, *wholes = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]
    for text, whole in zip(texts, wholes, strict=True):
        if whole[: len(first)] != first or len(whole) == len(first):
            raise InputError(f"the prompt's end and the text {text!r} become one token; begin the text with a space")
    return Query("the prompt", tuple(first), tuple(tuple(whole[len(first) :]) for whole in wholes))


def choices_of(completion: Mapping[str, object], count: int) -> list[Choice]:
    """Return the choices of a completion in order, checked to be as many as requested and to have log-probabilities."""
    choices = completion.get("choices")
    if not isinstance(choices, list) or len(choices) != count:
        there = len(choices) if isinstance(choices, list) else 0
        raise InputError(f"the server answers {there} completions where {count} were asked for")
    for choice in choices:
        log_probs = choice.get("logprobs") or {}
        tokens, values = log_probs.get("tokens") or [], log_probs.get("token_logprobs") or []
        if not tokens or not values:
            raise InputError("the server gives no log-probabilities of tokens; use one that does, such as vLLM")
        if len(tokens) != len(values):
            raise InputError(
                f"the server truncates log-probabilities: it gives {len(values)} for {len(tokens)} tokens; use one "
                "that gives all, such as vLLM"
            )
    return sorted(choices, key=lambda choice: int(choice.get("index", 0)))


def echoed_log_likelihoods(query: Query, choices: Sequence[Choice], after: int) -> list[float]:
    """Return the log-likelihoods of a query's answers out of echoes, after which the server wrote ``after`` tokens."""
    sums = []
    for answer, choice in zip(query.answers, choices, strict=True):
        tokens = [str(token) for token in choice["logprobs"]["tokens"]]
        values = choice["logprobs"]["token_logprobs"]
        end = len(tokens) - after
        if isinstance(query.prompt, str):
            echoed = str(choice.get("text")).startswith(query.prompt) and len(tokens) > 1
            start = _answer_start(tokens[:end], query.prompt, str(answer)) if echoed else 0
        else:
            start, end = len(query.prompt), len(query.prompt) + len(answer)
            echoed = len(tokens) == end + after
        if not echoed:
            raise InputError(
                "the server does not give back the prompt's log-probabilities (echo with logprobs); use one that does, "
                "such as vLLM"
            )
        if start is None or None in values[start:end] or start >= end:
            raise InputError(
                f"{query.place}: the tokens do not tell where {answer!r} begins; pass the base's tokenizer=, or end "
                "the prompt with a sign such as ':'"
            )
        sums.append(float(sum(values[start:end])))
    return sums


def _answer_start(tokens: Sequence[str], prompt: str, answer: str) -> int | None:
    """Return the index of the answer's first token; None if it cannot be told."""
    rest = answer
    for number in range(len(tokens) - 1, -1, -1):
        if not rest.endswith(tokens[number]):
            break
        rest = rest[: len(rest) - len(tokens[number])]
        if not rest:
            return number
    if not prompt.startswith(tokens[0]):  # it opens the text and is not part of it
        prompt = tokens[0] + prompt
    length = 0
    for number, token in enumerate(tokens):
        if length == len(prompt) and "".join(tokens[:number]) == prompt:
            return number
        length += len(token)
    return None


def answer_of(choice: Choice) -> Answer:
    """Return a generated text; its entropies are not a number, and its ids -1 unless the server gives them."""
    log_probs = choice["logprobs"]
    values = torch.tensor([float(value) for value in log_probs["token_logprobs"]])
    tops = [sorted((top or {}).items(), key=lambda item: -item[1]) for top in log_probs.get("top_logprobs") or []]
    unknown = torch.full_like(values, math.nan)
    return Answer(
        text=str(choice["text"]),
        token_ids=tuple(choice.get("token_ids") or [-1] * len(values)),
        tokens=tuple(map(str, log_probs["tokens"])),
        log_probs=values,
        draw_log_probs=values[None],
        entropy=unknown,
        expected_entropy=unknown,
        alternatives=tuple(tuple((token, math.exp(p)) for token, p in top) for top in tops or [[]] * len(values)),
        finished="stop" if choice.get("finish_reason") == "stop" else "length",
    )
