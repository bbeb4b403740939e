"""What `/v1/classify` is asked: texts, or rows of columns, as examples of the task's format; and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction
from bayeslora.tasks.columns import Columns, guess_columns
from bayeslora.tasks.files import Rows
from bayeslora.tasks.rows import split_from_rows
from bayeslora.tasks.templates import template_columns
from bayeslora.tasks.types import Example, Split


def split_of(
    like: Split, asked: Sequence[str | Mapping[str, Any]], choices: tuple[str, ...], text_column: str = ""
) -> Split:
    """Return a request's texts and rows as examples.

    Args:
        like: An empty split with the format of the task.
        asked: Texts, or rows of columns by name.
        choices: What can be answered.
        text_column: The rows' column of the text; empty: ``text``, ``question`` or ``sentence``.

    Returns:
        The split.

    Raises:
        InputError: If a row lacks a column, or a text is given where the template names columns.
    """
    named = template_columns(like.format.template)
    examples = []
    for number, row in enumerate(asked):
        if isinstance(row, str):
            if named:
                raise InputError(
                    f"input {number} is a text, and this model's template names the columns {', '.join(named)}; give "
                    "an object with them"
                )
            examples.append(Example(row, choices))
            continue
        columns = Columns(text_column if text_column in row else guess_columns(row).text, None)
        one = split_from_rows(Rows(f"input {number}", (row,)), like.format, columns=columns, classes=choices)
        examples += one.examples
    return replace(like, name="input", examples=tuple(examples))


def answers(found: Prediction, choices: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a prediction as the server gives it.

    Args:
        found: The prediction of some rows.
        choices: What could be answered.

    Returns:
        One object a row.
    """
    return [
        {
            "index": i,
            "answer": choices[int(found.answer[i])],
            "probs": dict(zip(choices, found.probs[i, : len(choices)].tolist(), strict=True)),
            "confidence": float(found.confidence[i]),
            "entropy": float(found.entropy[i]),
            "mutual_information": float(found.mutual_information[i]),
            "disagreement": float(found.disagreement[i]),
        }
        for i in range(len(found.answer))
    ]
