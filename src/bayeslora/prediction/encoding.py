"""Examples as token ids: prompts, answers found in context, and what had to be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError
from bayeslora.params import require_lora
from bayeslora.tasks.templates import CHARACTERS_PER_TOKEN, answer_text, neutral_prompt, render, resolve_format
from bayeslora.tasks.types import Example, Normalisation, Split


@dataclass(frozen=True)
class Encoded:
    """One example as token ids, ready to be batched."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]  # each may follow the prompt; none for a classification head
    label: int  # of the right answer; -1 where it is not known
    scales: tuple[float, ...] = ()  # a factor on the log-likelihood of each answer; empty: none
    neutral: tuple[int, ...] = ()  # a prompt without the question, whose log-likelihood of an answer is taken off
    neutral_answers: tuple[tuple[int, ...], ...] = ()

    @property
    def content(self) -> tuple[object, ...]:
        """What is put to the model: the same for the same example in any place of any split."""
        return self.prompt, self.answers


def tokenizer_of(model: nn.Module) -> Tokenizer:
    """Return the tokenizer that was saved under a model's name or path."""
    from transformers import AutoTokenizer

    name = require_lora(model).get_base_model().config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no tokenizer was found under the model's name {name!r}; pass tokenizer=...") from error


def encode(split: Split, tokenizer: Tokenizer, readout: str, limit: int | None) -> tuple[list[Encoded], int]:
    """Return a split's examples as token ids, and how many prompts lost their start; ``limit`` is the model's."""
    form = resolve_format(split.format, readout)
    prompts = [render(example, form) for example in split]
    prompt_ids = _ids(tokenizer, prompts)
    if readout == "head":
        answer_ids: list[tuple[tuple[int, ...], ...]] = [() for _ in prompts]
    else:
        answer_ids = _answers(split, prompts, prompt_ids, tokenizer, readout)
    cut = 0
    encoded = []
    for row, (ids, answers, example) in enumerate(zip(prompt_ids, answer_ids, split, strict=True)):
        room = None if limit is None else limit - max((len(a) - 1 for a in answers), default=0)
        longest = min((n for n in (form.max_length, room) if n is not None), default=None)
        if room is not None and room < 1:
            raise InputError(
                f"row {row} of {split.name} has a choice longer than the model's {limit} tokens; reword it"
            )
        if room is not None and len(ids) > room and form.max_length is None:
            raise InputError(
                f"row {row} of {split.name} has {len(ids)} tokens, and the model reads at most {room}; set max_length "
                "to cut the beginning of long prompts"
            )
        if longest is not None and len(ids) > longest:
            opening = [i for i in ids[:1] if i in tokenizer.all_special_ids]  # this one stays
            ids, cut = opening + ids[len(ids) - longest + len(opening) :], cut + 1
        if not ids:
            raise InputError(f"row {row} of {split.name} has a prompt without a token; give it a text or a template")
        scales = length_scales(example, answers, form.normalisation) if readout == "likelihood" else ()
        encoded.append(Encoded(tuple(ids), answers, -1 if example.label is None else example.label, scales))
    if form.normalisation == "unconditional" and readout == "likelihood":
        prompt, count = neutral_prompt(form), len(encoded)
        ids = _ids(tokenizer, [prompt])[0]
        after = _answers(split, [prompt] * count, [ids] * count, tokenizer, readout)
        pairs = zip(encoded, after, strict=True)
        encoded = [replace(row, neutral=tuple(ids), neutral_answers=answers) for row, answers in pairs]
    return encoded, cut


def length_scales(
    example: Example, answers: Sequence[Sequence[int]], normalisation: Normalisation
) -> tuple[float, ...]:
    """Return the factor on each choice's log-likelihood: one over its length in tokens, or in four characters.

    Both give nats a token. Divided by single characters the softmax would be nearly flat; times the mean length of the
    choices, about as sure as that of sums. Where all factors are 1 there are none.
    """
    if normalisation == "characters":
        scales = tuple(CHARACTERS_PER_TOKEN / max(1, len(choice)) for choice in example.choices)
    elif normalisation == "tokens":
        scales = tuple(1 / len(answer) for answer in answers)
    else:
        return ()
    return () if set(scales) == {1.0} else scales


def _answers(
    split: Split, prompts: Sequence[str], prompt_ids: Sequence[list[int]], tokenizer: Tokenizer, readout: str
) -> list[tuple[tuple[int, ...], ...]]:
    """Return each choice's tokens, as they follow the prompt."""
    answers = [[answer_text(example, i, readout) for i in range(len(example.choices))] for example in split]
    whole = iter(_ids(tokenizer, [p + a for p, group in zip(prompts, answers, strict=True) for a in group]))
    encoded = []
    for row, (ids, group) in enumerate(zip(prompt_ids, answers, strict=True)):
        tails = []
        for text in group:
            full = next(whole)
            if full[: len(ids)] != ids:
                raise InputError(
                    f"row {row} of {split.name}: the end of the prompt and the choice {text!r} become one token; end "
                    "the template with a sign such as ':'"
                )
            tail = tuple(full[len(ids) :])
            if not tail:
                raise InputError(f"row {row} of {split.name}: the choice {text!r} becomes no token; reword it")
            tails.append(tail)
        if readout == "letters" and (any(len(t) > 1 for t in tails) or len(set(tails)) < len(tails)):
            raise InputError(
                f"row {row} of {split.name}: the choices' letters are not one token each with this tokenizer; use "
                "readout='likelihood'"
            )
        encoded.append(tuple(tails))
    return encoded


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Tokenise, without an end-of-text token that a tokenizer may add."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    adds_end = end is not None and tokenizer("a")["input_ids"][-1:] == [end] and tokenizer.sep_token_id is None
    return [row[:-1] for row in rows] if adds_end else rows
