"""Rows to examples: which columns are read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from bayeslora.errors import InputError
from bayeslora.tasks.columns import Columns, guess_columns
from bayeslora.tasks.files import Rows
from bayeslora.tasks.labels import label_index, sorted_classes
from bayeslora.tasks.templates import own_columns, placeholders
from bayeslora.tasks.types import Example, Format, Split


def split_from_rows(
    rows: Rows | Iterable[Mapping[str, object]],
    fmt: Format | None = None,
    *,
    name: str = "rows",
    columns: Columns | None = None,
    classes: Sequence[str] | None = None,
    need_labels: bool = False,
    allow_duplicates: bool = False,
) -> Split:
    """Build a split from rows, such as those of ``read_rows``.

    Args:
        rows: The rows, each a mapping from column to value.
        fmt: How the examples are put to a model, such as the format of the task that was trained on. None: the default
            for the kind, question where there are choices and class where there are classes.
        name: Name of the split.
        columns: Where text, choices and label are. None: ``text``, ``question`` or ``sentence``; ``choices`` if there
            is such a column; ``label`` if there is such a column.
        classes: Class names, such as those of the split that was trained on. None: those of the columns, or the sorted
            label values.
        need_labels: Whether rows without a label are refused. Otherwise either all rows have one or none has.
        allow_duplicates: Whether a choice may be given twice, as in a few rows of published data sets.

    Returns:
        The split; its classes are None for multiple choice.

    Raises:
        InputError: There are no rows, a column is missing, or a row's text, choices or label cannot be used.
    """
    table = rows if isinstance(rows, Rows) else Rows(name, tuple(rows))
    if not len(table):
        raise InputError(f"{table.name} has no rows: give at least one.")
    if columns is None:
        columns = guess_columns(table.columns)
        columns = Columns(text=columns.text) if classes is not None else columns
    label = columns.label
    if label is None or not any(label in row for row in table):
        if need_labels:
            raise InputError(_missing(table, 0, label or "label"))
        label = None
    fixed = None if columns.choices is not None else tuple(classes or columns.classes or ())
    if fixed is not None and not fixed:
        fixed = find_classes(table, columns.label)
    template = "" if fmt is None else fmt.template
    named, needed = own_columns(template), "text" in placeholders(template)
    examples: list[Example] = []
    for index in range(len(table)):
        own = tuple((name, _named(table, index, name, columns.label)) for name in named)
        text, (choices, codes) = _text(table, index, columns, own, needed), _choices(table, index, columns, fixed)
        _check_choices(choices, table.where(index), allow_duplicates)
        value = None if label is None else _cell(table, index, label)
        found = label_index(value, choices, codes, classes=fixed is not None, where=table.where(index))
        if found is None and label is not None and (need_labels or (examples and examples[0].label is not None)):
            raise InputError(f"{table.where(index)}: the label in column {label!r} is blank: fill it in.")
        if found is not None and examples and examples[0].label is None:
            raise InputError(f"{table.where(0)}: the label in column {label!r} is blank: fill it in.")
        examples.append(Example(text, choices, found, columns=own))
    if fmt is None:
        fmt = Format("", kind="question" if fixed is None else "class")
    return Split(name, tuple(examples), fmt, fixed)


def find_classes(rows: Rows, label: str | None) -> tuple[str, ...]:
    """Return the sorted label values as class names.

    Args:
        rows: The rows.
        label: The label column; None where there is none.

    Returns:
        At least two class names.

    Raises:
        InputError: There are no labels, or all are the same.
    """
    if label is None or not any(label in row for row in rows):
        raise InputError(
            f"{rows.name} has no label column {label!r} to take classes from (its columns are "
            f"{', '.join(rows.columns)}): name it with columns={{'label': ...}}, or the classes with 'classes'."
        )
    found = sorted_classes(row.get(label) for row in rows)
    if len(found) < 2:
        had = f"the one value {found[0]!r}" if found else "blanks only"
        raise InputError(
            f"{rows.name} has {had} in its label column {label!r}: name the classes in columns={{'classes': [...]}}."
        )
    return found


def _missing(rows: Rows, index: int, column: str) -> str:
    """Return the message for a column that a row lacks."""
    return f"{rows.where(index)} has no column {column!r}: its columns are {', '.join(rows.values[index])}."


def _cell(rows: Rows, index: int, column: str) -> object:
    """Return one cell."""
    if column not in rows.values[index]:
        raise InputError(_missing(rows, index, column))
    return rows.values[index][column]


def _named(rows: Rows, index: int, column: str, label: str | None) -> str:
    """Return the text of a column that the template names."""
    if column == label:
        raise InputError(
            f"The template names {{{column}}}, which is the column of the label: the prompt would tell the answer, so "
            "take it out."
        )
    if column not in rows.values[index]:
        raise InputError(
            f"{rows.where(index)} has no column {column!r}, which the template names: its columns are "
            f"{', '.join(rows.values[index])}."
        )
    value = rows.values[index][column]
    if not isinstance(value, (str, int, float)):
        raise InputError(f"{rows.where(index)}: the column {column!r} is {value!r}: it should hold text.")
    return str(value).strip()


def _text(rows: Rows, index: int, columns: Columns, own: Sequence[tuple[str, str]], needed: bool) -> str:
    """Return the text of a row, after its passage if it has one; without a column of text, what the template names."""
    if not needed and columns.text not in rows.values[index]:
        return "\n".join(value for _, value in own)
    parts = []
    for column in (columns.context, columns.text):
        if column is None:
            continue
        value = _cell(rows, index, column)
        if not isinstance(value, (str, int, float)) or not str(value).strip():
            raise InputError(f"{rows.where(index)}: the column {column!r} is {value!r}: it should hold text.")
        parts.append(str(value).strip())
    return "\n".join(parts)


def _choices(
    rows: Rows, index: int, columns: Columns, fixed: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the choices of a row and how its label writes them."""
    codes = columns.codes or ()
    if fixed is not None:
        return fixed, codes if len(codes) == len(fixed) else ()
    if isinstance(columns.choices, tuple):
        cells = [_cell(rows, index, column) for column in columns.choices]
        while cells and (cells[-1] is None or not str(cells[-1]).strip()):
            cells.pop()
        return _strings(cells), codes[: len(cells)]
    column = str(columns.choices)
    cell = _cell(rows, index, column)
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{rows.where(index)}: the column {column!r} is not a JSON list of choices: {error.msg}."
            ) from None
    texts, own = (cell.get("text"), cell.get("label")) if isinstance(cell, Mapping) else (cell, None)
    if not isinstance(texts, (list, tuple)):
        raise InputError(f"{rows.where(index)}: the column {column!r} is {cell!r}: it should hold a list of choices.")
    if not codes and isinstance(own, (list, tuple)) and len(own) == len(texts):
        codes = _strings(own)
    return _strings(texts), codes[: len(texts)]


def _strings(cells: Iterable[object]) -> tuple[str, ...]:
    """Return cells as text; a blank cell becomes the empty text, which is refused where choices are checked."""
    return tuple("" if cell is None else str(cell).strip() for cell in cells)


def _check_choices(choices: tuple[str, ...], where: str, allow_duplicates: bool) -> None:
    """Refuse choices that cannot be told apart."""
    if len(choices) < 2:
        raise InputError(f"{where} has fewer than 2 choices: {list(choices)}.")
    if not all(choices):
        raise InputError(f"{where} has an empty choice: {list(choices)}.")
    if len(set(choices)) < len(choices) and not allow_duplicates:
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise InputError(f"{where} has the choice {twice!r} twice: make the choices differ.")
