"""`/v1/classify`: texts, or rows of columns, as examples of the task's format; and a prediction as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction
from bayeslora.tasks.columns import Columns, guess_columns
from bayeslora.tasks.files import Rows
from bayeslora.tasks.rows import split_from_rows
from bayeslora.tasks.templates import template_columns
from bayeslora.tasks.types import Example, Split


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
        columns = Columns(text_column if text_column in row else guess_columns(row).text, None)
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
            "index": i,
            "answer": choices[answer],
            "probs": dict(zip(choices, shares, strict=True)),
            **dict(zip(names, values, strict=True)),
        }
        for i, (answer, shares, values) in enumerate(zip(answers, probs, measures, strict=True))
    ]
