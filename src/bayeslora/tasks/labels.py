"""What a row's label means: the index of the right choice, from any of the ways in which data sets write it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from bayeslora.errors import InputError, listed
from bayeslora.files import check_json
from bayeslora.tasks.templates import LETTERS


def plain(value: object) -> str | None:
    """Return a cell as text without spaces around it, empty for a blank, None or NaN; None for what is no text."""
    if value is None:
        return ""
    if not isinstance(value, (str, Real)):
        return None
    if value != value:  # NaN
        return ""
    text = str(value).strip()
    try:
        check_json(text)
    except ValueError:
        return None
    return text


def spell(value: object) -> str | None:
    """Return a label as text: a whole number without its fraction (1.0 is 1), None for a blank or what is no label."""
    text = plain(value) or ""
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        return str(int(number)) if text and number.is_integer() else text or None
    return re.sub(r"^(-?\d{1,18})\.0+$", r"\1", text) or None


def class_name(value: object, where: str) -> str | None:
    """Return the class that a label is the name of, None for a blank; refuse a measurement and what is no text."""
    text = spell(value)
    if plain(value) is None:
        raise InputError(f"{where}: the label {_shown(value)} is no text or number")
    if text is not None and _fraction(text):
        raise InputError(
            f"{where}: the label {text[:80]!r} is no whole number: classes are names or whole numbers; where it is a "
            "name, name all of them with columns={'classes': [...]}"
        )
    return text


def sorted_classes(labels: Iterable[object]) -> tuple[str, ...]:
    """Return the distinct labels in the order of numbers where all are whole numbers, else of text."""
    texts = {text for label in labels if (text := spell(label)) is not None}
    whole = all(_whole(text) for text in texts)
    return tuple(sorted(texts, key=lambda text: (int(text) if whole else 0, text)))  # 01 and 1 differ


def label_index(
    value: object, choices: Sequence[str], codes: Sequence[str], *, classes: bool, where: str
) -> int | None:
    """Return the index of the choice that a label names, None for a blank; ``where`` is the row in words."""
    exact, text = plain(value), spell(value)
    if exact is None:
        raise InputError(f"{where}: the label {_shown(value)} is no text or number")
    if text is None:
        return None
    # Declared names first: the codes and, for classification, the classes. Then an integer is an index, and text is a
    # letter, the text of a choice or an index, as long as these agree.
    declared = [codes, choices] if classes else [codes]
    for names, one in ((names, one) for names in declared for one in (exact, text)):
        if names.count(one) > 1:
            raise InputError(f"{where}: the label {one[:80]!r} is that of two choices: give each its own")
        if one in names:
            return names.index(one)
    if _whole(text) and any(_whole(name) for names in declared for name in names):
        shown = listed(codes or choices)
        raise InputError(f"{where}: the label {text[:80]!r} is out of range: it should be one of {shown}")
    indices = {index for index in _readings(value, text, choices) if 0 <= index < len(choices)}
    if len(indices) > 1:
        raise InputError(
            f"{where}: the label {text[:80]!r} is both the text of one choice and the index or letter of another: say "
            "what labels are with columns={'codes': [...]}"
        )
    if not indices:
        raise InputError(
            f"{where}: the label {text[:80]!r} is out of range: give an index from 0 to {len(choices) - 1}, a letter "
            f"or the text of one of {listed(map(repr, choices))}"
        )
    return indices.pop()


def _readings(value: object, text: str, choices: Sequence[str]) -> list[int]:
    """Return the indices that a label without a declared meaning could stand for."""
    if isinstance(value, Real):
        return [int(text)] if _whole(text) else [int(value)] if isinstance(value, bool) else []
    indices = [index for index, choice in enumerate(choices) if choice == text]
    if len(text) == 1 and text in LETTERS:
        indices.append(LETTERS.index(text))
    if _whole(text):
        indices.append(int(text))
    return indices


def _whole(text: str) -> bool:
    """Return whether a text is a whole number, as one can be written."""
    return len(text) < 20 and text.removeprefix("-").isdecimal()


def _fraction(text: str) -> bool:
    """Return whether a text is a number, NaN or infinity, and no whole number."""
    try:
        return not float(text).is_integer()
    except ValueError:
        return False


def _shown(value: object) -> str:
    """Return the beginning of a value for a message."""
    return repr(value)[:80]
