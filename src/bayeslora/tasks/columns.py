"""Which columns of a row hold the text, the choices and the label."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from bayeslora.errors import InputError

TEXT_COLUMNS = ("text", "question", "sentence")
"""Usual names of the text's column, the first that there is."""


@dataclass(frozen=True)
class Columns:
    """Where a row's text, choices and label are found.

    Attributes:
        text: Column of the question or text.
        label: Column of the right answer; None where there is none. Its values may be a 0-based index, a letter from
            ``A``, the exact text of a choice or class, one of ``codes``, or a label that the row gives its choices.
        choices: Multiple choice only: the column that holds a list of choices (or a JSON list, or a mapping of ``text``
            and ``label`` lists), or one column for each choice, of which the last may be blank.
        classes: Classification only: the class names in the order of their indices. None: the sorted label values.
        codes: How the label column writes the choices or classes, in their order; it then comes before every other
            reading.
        context: Column of a passage that is put before the text, on a line of its own.
    """

    text: str = "text"
    label: str | None = "label"
    choices: str | tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    codes: tuple[str, ...] | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        """Refuse a contradiction."""
        if self.choices is not None and self.classes is not None:
            raise InputError("columns names both choices and classes: give choices for questions, classes for texts")
        listed = self.choices if isinstance(self.choices, tuple) else self.classes
        what = "choices" if isinstance(self.choices, tuple) else "classes"
        if listed is not None and len(listed) < 2:
            raise InputError(f"columns gives {len(listed)} {what}: give at least two")
        for key, names in ((what, listed), ("codes", self.codes)):
            if names is not None and (len(set(names)) < len(names) or not all(names)):
                raise InputError(f"columns gives the {key} {list(names)}, of which one is empty or given twice")
        if self.codes is not None and listed is not None and len(self.codes) != len(listed):
            raise InputError(f"columns gives {len(self.codes)} codes for {len(listed)} {what}: give one for each")

    def needed(self, *, label: bool = True) -> set[str]:
        """Return the columns that rows must have, with or without that of the label."""
        choices = self.choices if isinstance(self.choices, tuple) else (self.choices,)
        columns = (self.text, self.context, *choices, self.label if label else None)
        return {column for column in columns if column is not None}


def make_columns(description: Columns | Mapping[str, object], base: Columns) -> Columns:
    """Return columns as they are, or a mapping of some of their fields with the other fields of ``base``."""
    if isinstance(description, Columns):
        return description
    known = [field.name for field in fields(Columns)]
    unknown = [key for key in description if key not in known]
    if unknown:
        raise InputError(f"columns has the unknown key {unknown[0]!r}: the keys are {', '.join(known)}")
    values = {key: _names(key, value) for key, value in description.items()}
    if values.get("choices") is not None:
        base = replace(base, classes=None, codes=None)
    if values.get("classes") is not None:
        base = replace(base, choices=None, codes=None)
    return replace(base, **values)  # type: ignore[arg-type]  # each is checked by its key


def guess_columns(names: Collection[str]) -> Columns:
    """Return the columns of rows whose user named none, by the usual names for text, choices and label."""
    text = next((name for name in TEXT_COLUMNS if name in names), "text")
    return Columns(text=text, choices="choices" if "choices" in names else None)


def _names(key: str, value: object) -> str | tuple[str, ...] | None:
    """Return one value of the mapping, checked to be what its key needs."""
    single, several = key not in {"classes", "codes"}, key in {"choices", "classes", "codes"}
    if value is None and key != "text":
        return None
    if isinstance(value, str) and value and single:
        return value
    if several and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(str(item).strip() for item in value)
    wanted = "a list of names" if not single else "a column name or a list of them" if several else "a column name"
    raise InputError(f"columns[{key!r}] is {value!r}: give {wanted}")
