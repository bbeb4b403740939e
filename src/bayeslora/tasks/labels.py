"""What a row's label means: the index of the right choice, from any of the ways in which data sets write it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral

from bayeslora.errors import InputError
from bayeslora.tasks.templates import LETTERS


def spell(value: object) -> str | None:
    """Return a label as text: a whole float without its fraction, None for a blank cell, None or NaN."""
    if value is None:
        return None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return str(value).strip() or None


def sorted_classes(labels: Iterable[object]) -> tuple[str, ...]:
    """Return the distinct labels in the order of numbers where all are whole numbers, else of text."""
    texts = {text for label in labels if (text := spell(label)) is not None}
    return tuple(sorted(texts, key=int) if all(_whole(text) for text in texts) else sorted(texts))


def label_index(
    value: object, choices: Sequence[str], codes: Sequence[str], *, classes: bool, where: str
) -> int | None:
    """Return the index of the choice that a label names, None for a blank; ``where`` is the row in words."""
    text = spell(value)
    if text is None:
        return None
    # Declared names first: the codes and, for classification, the classes. Then an integer is an index, and text is a
    # letter, the text of a choice or an index, as long as these agree.
    declared = [codes, choices] if classes else [codes]
    for names in declared:
        if text in names:
            return list(names).index(text)
    if _whole(text) and any(_whole(name) for names in declared for name in names):
        shown = ", ".join(codes or choices)
        raise InputError(f"{where}: the label {text!r} is out of range: it should be one of {shown}")
    indices = {index for index in _readings(value, text, choices) if 0 <= index < len(choices)}
    if len(indices) > 1:
        raise InputError(
            f"{where}: the label {text!r} is both the text of one choice and the index or letter of another: say what "
            "labels are with columns={'codes': [...]}"
        )
    if not indices:
        raise InputError(
            f"{where}: the label {text!r} is out of range: give an index from 0 to {len(choices) - 1}, a letter or the "
            f"text of one of {', '.join(repr(choice[:40]) for choice in choices)}"
        )
    return indices.pop()


def _readings(value: object, text: str, choices: Sequence[str]) -> list[int]:
    """Return the indices that a label without a declared meaning could stand for."""
    if isinstance(value, (Integral, float)):
        return [int(text)] if _whole(text) else [int(value)] if isinstance(value, bool) else []
    indices = [index for index, choice in enumerate(choices) if choice == text]
    if len(text) == 1 and text in LETTERS:
        indices.append(LETTERS.index(text))
    if _whole(text):
        indices.append(int(text))
    return indices


def _whole(text: str) -> bool:
    """Return whether a text is a whole number."""
    return text.removeprefix("-").isdecimal()
