"""Rows to examples: which columns are read, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bayeslora.errors import InputError, listed
from bayeslora.files import parse_json
from bayeslora.tasks.columns import Columns, guess_columns
from bayeslora.tasks.files import Rows
from bayeslora.tasks.labels import class_name, label_index, plain, sorted_classes
from bayeslora.tasks.templates import check_template, placeholders, template_columns
from bayeslora.tasks.types import Example, Format, Split

MAX_CLASSES = 1000
"""Most classes that are taken from labels; more are names or numbers of the rows rather than classes."""


@dataclass(frozen=True)
class _Row:
    """One row, with its place in words for messages."""

    values: Mapping[str, object]
    where: str

    def cell(self, column: str, reason: str = "") -> object:
        """Return a cell; ``reason`` says why the column is read."""
        if column not in self.values:
            raise self.lacks(column, reason)
        return self.values[column]

    def text(self, column: str, reason: str = "", *, blank: bool = False) -> str:
        """Return a cell's text without spaces around it, which may be empty if ``blank`` says so."""
        value = self.cell(column, reason)
        text = None if value is None else plain(value)
        if text is None or not (text or (blank and isinstance(value, str))):
            raise InputError(f"{self.where}: the column {column!r} is {repr(value)[:80]}: it should hold text")
        return text

    def choices(self, cells: Iterable[object]) -> tuple[str, ...]:
        """Return cells as texts; a blank one becomes the empty text, which `_check_choices` refuses."""
        texts = [(plain(cell), cell) for cell in cells]
        wrong = next((cell for text, cell in texts if text is None), None)
        if wrong is not None:
            raise InputError(f"{self.where}: the choice {repr(wrong)[:80]} should be text")
        return tuple(text or "" for text, _ in texts)

    def lacks(self, column: str, reason: str = "") -> InputError:
        """Return the error for a column that is not there."""
        return InputError(f"{self.where} has no column {column!r}{reason}: its columns are {listed(self.values)}")


def split_from_rows(
    rows: Rows | Iterable[Mapping[str, object]],
    fmt: Format | None = None,  # None: the default for the kind, question with choices and class with classes
    *,
    name: str = "rows",
    columns: Columns | None = None,  # None: as `guess_columns` finds them
    classes: Sequence[str] | None = None,  # None: those of the columns, or the sorted label values
    need_labels: bool = False,  # otherwise either all rows have a label or none has
    allow_duplicates: bool = False,  # whether a choice may be given twice, as in a few rows of published data sets
) -> Split:
    """Build a split from rows, such as those of `read_rows`; its classes are None for multiple choice."""
    table = rows if isinstance(rows, Rows) else Rows(name, tuple(rows))
    _refuse_empty(table)
    if columns is None:
        columns = guess_columns(table.columns)
        columns = Columns(text=columns.text) if classes is not None else columns
    numbered = [_Row(values, table.where(index)) for index, values in enumerate(table)]
    label = columns.label if any(columns.label in row for row in table) else None
    if label is None and need_labels:
        raise numbered[0].lacks(columns.label or "label")
    fixed = None
    if columns.choices is None:
        fixed = tuple(classes or columns.classes or find_classes(table, columns.label))
        _check_choices(numbered[0].choices(fixed), table.name, allow_duplicates=False)
    template = "" if fmt is None else fmt.template
    check_template(template, "auto" if fmt is None else fmt.readout)
    examples = tuple(_example(row, columns, label, template, fixed, allow_duplicates) for row in numbered)
    blank = next((row for row, example in zip(numbered, examples, strict=True) if example.label is None), None)
    if label is not None and blank is not None and (need_labels or any(e.label is not None for e in examples)):
        raise InputError(f"{blank.where}: the label in column {label!r} is blank: fill it in")
    return Split(name, examples, fmt or Format("", kind="question" if fixed is None else "class"), fixed)


def find_classes(rows: Rows, label: str | None) -> tuple[str, ...]:
    """Return the sorted values of the label column as class names, at least two."""
    _refuse_empty(rows)
    if label is None or not any(label in row for row in rows):
        raise InputError(
            f"{rows.name} has no label column {label!r} to take classes from (its columns are "
            f"{listed(rows.columns)}): name it with columns={{'label': ...}}, or the classes with 'classes'"
        )
    classes = sorted_classes(class_name(row.get(label), rows.where(index)) for index, row in enumerate(rows))
    if len(classes) > MAX_CLASSES:
        raise InputError(
            f"{rows.name} has {len(classes):,} different values in its label column {label!r}: name the column of the "
            "classes, or, if these are classes, all of them in columns={'classes': [...]}"
        )
    if len(classes) < 2:
        content = f"the one value {classes[0]!r}" if classes else "blanks only"
        raise InputError(
            f"{rows.name} has {content} in its label column {label!r}: name the classes in columns={{'classes': [...]}}"
        )
    return classes


def _example(
    row: _Row,
    columns: Columns,
    label: str | None,
    template: str,
    classes: tuple[str, ...] | None,
    allow_duplicates: bool,
) -> Example:
    """Return the example that a row holds."""
    named = template_columns(template)
    if columns.label in named:
        raise InputError(
            f"The template names {{{columns.label}}}, which is the column of the label: the prompt would tell the "
            "answer, so take it out"
        )
    values = {name: row.text(name, ", which the template names", blank=True) for name in named}
    if columns.text in row.values or "text" in placeholders(template):
        text = "\n".join(row.text(column) for column in (columns.context, columns.text) if column is not None)
    else:
        text = "\n".join(values.values())
    choices, codes = _choices(row, columns, classes)
    if classes is None:
        _check_choices(choices, row.where, allow_duplicates)
    value = None if label is None else row.cell(label)
    index = label_index(value, choices, codes, classes=classes is not None, where=row.where)
    return Example(text, choices, index, columns=tuple(values.items()))


def _choices(row: _Row, columns: Columns, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the choices of a row and how its label writes them."""
    codes = columns.codes or ()
    if classes is not None:
        return classes, codes if len(codes) == len(classes) else ()
    if isinstance(columns.choices, tuple):
        cells = [row.cell(column) for column in columns.choices]
        while cells and plain(cells[-1]) == "":
            cells.pop()
        return row.choices(cells), codes[: len(cells)]
    column = str(columns.choices)
    cell = row.cell(column)
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        try:
            cell = parse_json(cell)
        except ValueError as error:
            raise InputError(f"{row.where}: the column {column!r} is not a JSON list of choices: {error}") from None
    texts, names = (cell.get("text"), cell.get("label")) if isinstance(cell, Mapping) else (cell, None)
    if not isinstance(texts, (list, tuple)):
        raise InputError(f"{row.where}: the column {column!r} is {repr(cell)[:80]}: it should hold a list of choices")
    if not codes and isinstance(names, (list, tuple)) and len(names) == len(texts):
        codes = row.choices(names)
    return row.choices(texts), codes[: len(texts)]


def _refuse_empty(rows: Rows) -> None:
    """Refuse rows that are none."""
    if not len(rows):
        raise InputError(f"{rows.name} has no rows: give at least one")


def _check_choices(choices: tuple[str, ...], where: str, allow_duplicates: bool) -> None:
    """Refuse choices that cannot be told apart."""
    if len(choices) < 2:
        raise InputError(f"{where} has fewer than 2 choices: {str(list(choices))[:80]}")
    if not all(choices):
        raise InputError(f"{where} has an empty choice: {str(list(choices))[:80]}")
    if len(set(choices)) < len(choices) and not allow_duplicates:
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise InputError(f"{where} has the choice {twice[:80]!r} twice: make the choices differ")
