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

from bayeslora.errors import InputError
from bayeslora.prediction.encoding import encode, length_scales
from bayeslora.prediction.generation.answers import Answer
from bayeslora.tasks.templates import answer_text, neutral_prompt, render, resolve_format
from bayeslora.tasks.types import Split

Text = str | tuple[int, ...]
"""A text, or its token ids."""


@final
@dataclass(frozen=True)
class Asked:
    """One prompt and what may follow it.

    Attributes:
        place: What it is called in messages.
        prompt: The prompt.
        answers: What may follow, in the prompt's form.
        scales: Factor on the log-likelihood of each answer; empty: none.
    """

    place: str
    prompt: Text
    answers: tuple[Text, ...]
    scales: tuple[float, ...] = ()

    @property
    def wholes(self) -> list[Any]:
        """The prompt with each answer, as a request holds it."""
        if isinstance(self.prompt, str):
            return [f"{self.prompt}{answer}" for answer in self.answers]
        return [[*self.prompt, *answer] for answer in self.answers]


def asked_of_split(split: Split, tokenizer: Any) -> tuple[list[Asked], list[Asked], str, int]:
    """Return a split's prompts with their choices.

    Args:
        split: The examples and their format.
        tokenizer: The base model's tokenizer; None for texts.

    Returns:
        The prompts; those whose likelihoods are taken off, one for each or none; the readout's name; and how many
        prompts lost their beginning.

    Raises:
        InputError: If the split is empty, or its format is for a classification head or needs a tokenizer.
    """
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
        pairs = list(zip(places, encoded, strict=True))
        neutral = [Asked("the neutral prompt", row.neutral, row.neutral_answers) for row in encoded if row.neutral]
        return [Asked(p, row.prompt, row.answers, row.scales) for p, row in pairs], neutral, readout, cut
    if split.format.max_length is not None:
        raise InputError(f"the format of {split.name} cuts prompts by tokens (max_length); pass the base's tokenizer=")
    form = resolve_format(split.format, readout)
    if form.normalisation == "tokens":
        raise InputError(f"the format of {split.name} counts tokens (normalisation); pass the base's tokenizer=")
    rows, neutral = [], []
    for place, example in zip(places, split, strict=True):
        texts = tuple(answer_text(example, i, readout) for i in range(len(example.choices)))
        rows.append(Asked(place, render(example, form), texts, length_scales(example, (), form.normalisation)))
        if form.normalisation == "unconditional":
            neutral.append(Asked("the neutral prompt", neutral_prompt(form), texts))
    return rows, neutral, readout, 0


def distinct(rows: Sequence[Asked]) -> tuple[list[Asked], list[list[int]]]:
    """Return each different pair of prompt and answer once, as a row of its own.

    Args:
        rows: Prompts and answers.

    Returns:
        The rows, and the number of the row of each answer.
    """
    known: dict[tuple[Text, Text], int] = {}
    numbers = [[known.setdefault((row.prompt, a), len(known)) for a in row.answers] for row in rows]
    return [Asked("the neutral prompt", prompt, (answer,)) for prompt, answer in known], numbers


def asked_of(prompt: str, texts: Sequence[str], tokenizer: Any) -> Asked:
    """Return a prompt with texts that may follow it.

    Args:
        prompt: The prompt.
        texts: The texts.
        tokenizer: The base model's tokenizer; None for texts.

    Returns:
        Both, as they are asked for.

    Raises:
        InputError: If one is empty, or the prompt's end and a text's beginning become one token.
    """
    if not prompt or not texts or not all(texts):
        raise InputError("to score texts takes a prompt and at least one text, none of them empty")
    if tokenizer is None:
        return Asked("the prompt", prompt, tuple(texts))
    end = tokenizer.eos_token_id
    rows = [list(tokenizer(text)["input_ids"]) for text in (prompt, *(prompt + text for text in texts))]
    first, *wholes = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]
    for text, whole in zip(texts, wholes, strict=True):
        if whole[: len(first)] != first or len(whole) == len(first):
            raise InputError(f"the prompt's end and the text {text!r} become one token; begin the text with a space")
    return Asked("the prompt", tuple(first), tuple(tuple(whole[len(first) :]) for whole in wholes))


def choices_of(value: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the choices of a completion in order.

    Args:
        value: What the server answered.
        count: How many there must be.

    Returns:
        The choices, each with its log-probabilities.

    Raises:
        InputError: If some are missing, or have no log-probabilities.
    """
    found = value.get("choices")
    if not isinstance(found, list) or len(found) != count:
        raise InputError(f"the server answers {len(found or [])} completions where {count} were asked for")
    found = sorted(found, key=lambda choice: int(choice.get("index", 0)))
    for choice in found:
        given = choice.get("logprobs") or {}
        if not given.get("tokens") or len(given["tokens"]) != len(given.get("token_logprobs") or []):
            raise InputError("the server gives no log-probabilities of tokens; use one that does, such as vLLM")
    return found


def after_prompt(row: Asked, choices: Sequence[Mapping[str, Any]], after: int) -> list[float]:
    """Return the log-likelihoods of the answers after their prompt.

    Args:
        row: What was asked.
        choices: The echo of the prompt with each answer.
        after: How many tokens the server wrote after the echo.

    Returns:
        Natural logarithms, one an answer.

    Raises:
        InputError: If a prompt was not echoed, or the answer's tokens cannot be told.
    """
    sums = []
    for answer, choice in zip(row.answers, choices, strict=True):
        tokens = [str(token) for token in choice["logprobs"]["tokens"]]
        values = choice["logprobs"]["token_logprobs"]
        end = len(tokens) - after
        if isinstance(row.prompt, str):
            echoed = str(choice.get("text")).startswith(row.prompt) and len(tokens) > 1
            start = _beginning(tokens[:end], row.prompt, str(answer)) if echoed else 0
        else:
            start, end = len(row.prompt), len(row.prompt) + len(answer)
            echoed = len(tokens) == end + after
        if not echoed:
            raise InputError(
                "the server does not give back the prompt's log-probabilities (echo with logprobs); use one that does, "
                "such as vLLM"
            )
        if start is None or None in values[start:end] or start >= end:
            raise InputError(
                f"{row.place}: the tokens do not tell where {answer!r} begins; pass the base's tokenizer=, or end "
                "the prompt with a sign such as ':'"
            )
        sums.append(float(sum(values[start:end])))
    return sums


def _beginning(tokens: Sequence[str], prompt: str, answer: str) -> int | None:
    """Return the first of the tokens that make up the answer; None if it cannot be told."""
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


def generated(choice: Mapping[str, Any]) -> Answer:
    """Return one generated text with what its draw thought of each token.

    Args:
        choice: One choice of a completion.

    Returns:
        The answer; its entropies are not a number, and its token ids -1 unless the server gives them.
    """
    given = choice["logprobs"]
    values = torch.tensor([float(value) for value in given["token_logprobs"]])
    tops = [sorted((top or {}).items(), key=lambda item: -item[1]) for top in given.get("top_logprobs") or []]
    unknown = torch.full_like(values, math.nan)
    return Answer(
        text=str(choice["text"]),
        token_ids=tuple(choice.get("token_ids") or [-1] * len(values)),
        tokens=tuple(map(str, given["tokens"])),
        log_probs=values,
        draw_log_probs=values[None],
        entropy=unknown,
        expected_entropy=unknown,
        alternatives=tuple(tuple((token, math.exp(p)) for token, p in top) for top in tops or [[]] * len(values)),
        finished="stop" if choice.get("finish_reason") == "stop" else "length",
    )
