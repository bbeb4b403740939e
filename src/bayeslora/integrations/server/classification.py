"""`/v1/classify`: texts, or rows of columns, as examples of the task's format; and a prediction as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from bayeslora.errors import InputError
from bayeslora.integrations.server.served import Served
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors import Draws
from bayeslora.prediction import predict
from bayeslora.prediction.memory import default_token_budget
from bayeslora.tasks.columns import Columns, guess_columns
from bayeslora.tasks.files import Rows
from bayeslora.tasks.rows import split_from_rows
from bayeslora.tasks.templates import template_columns
from bayeslora.tasks.types import Example, Split

CHARACTERS = 4
"""Of an average token."""


@final
@dataclass(frozen=True)
class Asked:
    """What a request wants classified: by which model and draws, and into which choices."""

    served: Served
    model: str
    draws: int
    choices: tuple[str, ...]
    characters: int  # most of a text

    def parts(self, inputs: Sequence[str | Mapping[str, object]]) -> list[Callable[[], Prediction]]:
        """Return the work for inputs, in parts of about as many tokens as a batch has."""
        split = split_of(self.served.like, inputs, self.choices, self.served.text_column)
        room, each = CHARACTERS * default_token_budget(self.served.model), sum(map(len, self.choices))
        groups, left = list[list[int]](), 0
        for row, example in enumerate(split):
            length = len(example.text) + sum(len(text) for _, text in example.columns)
            if length > self.characters:
                raise InputError(f"input {row} has {length} characters, more than this server's {self.characters}")
            cost = max(1, self.draws) * (length + each)
            if cost > left:
                groups.append([])
                left = room
            groups[-1].append(row)
            left -= cost
        return [partial(self._predict, split.take(rows)) for rows in groups]

    def _predict(self, split: Split) -> Prediction:
        """Return the prediction of some inputs."""
        served = self.served
        posterior, draws = served.posterior_of(self.model), Draws(self.draws, served.seed)
        return predict(served.model, posterior, split, draws, tokenizer=served.tokenizer, mean=False)


def split_of(
    like: Split, inputs: Sequence[str | Mapping[str, object]], choices: tuple[str, ...], text_column: str
) -> Split:
    """Return inputs as examples of an empty split's format; a row's text is in ``text_column`` or the usual columns."""
    named = template_columns(like.format.template)
    examples = []
    for number, row in enumerate(inputs):
        if isinstance(row, str):
            if named:
                raise InputError(
                    f"input {number} is a text, and this model's template names the columns "
                    f"{', '.join(named)}; give an object with them"
                )
            examples.append(Example(row, choices))
            continue
        columns = Columns(text_column if text_column and text_column in row else guess_columns(row).text, None)
        one = split_from_rows(Rows(f"input {number}", (row,)), like.format, columns=columns, classes=choices)
        examples += one.examples
    return replace(like, name="input", examples=tuple(examples))


def prediction_json(prediction: Prediction, choices: tuple[str, ...]) -> list[dict[str, object]]:
    """Return a prediction as JSON holds it, one object a row."""
    names = ("confidence", "entropy", "mutual_information", "disagreement")
    measures = zip(*(getattr(prediction, name).tolist() for name in names), strict=True)
    answers, probs = prediction.answer.tolist(), prediction.probs[:, : len(choices)].tolist()
    return [
        {
            "answer": choices[answer],
            "probs": dict(zip(choices, shares, strict=True)),
            **dict(zip(names, values, strict=True)),
        }
        for answer, shares, values in zip(answers, probs, measures, strict=True)
    ]
