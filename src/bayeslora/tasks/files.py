"""Rows from files and streams: JSON lines, JSON, CSV, TSV and parquet, each row with the line it stands on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO, get_args

from bayeslora.errors import InputError

FileFormat = Literal["jsonl", "json", "csv", "tsv", "parquet"]


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, before they become examples.

    Attributes:
        name: File or data set they came from; used in messages.
        values: The rows, each a mapping from column to value.
        lines: Line of the file on which each row ends; None where rows have no lines.
    """

    name: str
    values: tuple[Mapping[str, object], ...]
    lines: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        """Return an iterator over the rows."""
        return iter(self.values)

    def where(self, index: int) -> str:
        """Return the place of a row in words, such as ``train.jsonl line 7``."""
        return f"{self.name} row {index + 1}" if self.lines is None else f"{self.name} line {self.lines[index]}"

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the first row."""
        return list(self.values[0]) if self.values else []


def read_rows(source: str | Path | TextIO, *, file_format: FileFormat | None = None, name: str | None = None) -> Rows:
    """Read the rows of a file or of an open text stream.

    Args:
        source: Path of a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, or a stream such as standard
            input.
        file_format: The format; None takes it from the file's ending, and for a stream from its first character:
            ``{`` means JSON lines, ``[`` a JSON list, anything else CSV.
        name: What to call the source in messages; None takes the file's path or ``standard input``.

    Returns:
        The rows, in order; blank lines are skipped.

    Raises:
        InputError: The file cannot be read, its ending is unknown, or a line is malformed.
    """
    if file_format is not None and file_format not in get_args(FileFormat):
        raise InputError(f"The file format {file_format!r} is unknown: give one of {', '.join(get_args(FileFormat))}.")
    if not isinstance(source, (str, Path)):
        return _parse(_decoded(source, name or "standard input"), file_format, name or "standard input")
    path = Path(source).expanduser()
    name = name or str(path)
    ending = path.suffix.lower().removeprefix(".")
    if file_format is None and ending not in get_args(FileFormat):
        raise InputError(f"The file {name} ends in none of {', '.join('.' + e for e in get_args(FileFormat))}.")
    if not path.is_file():
        raise InputError(f"There is no file {name}.")
    if (file_format or ending) == "parquet":
        return _parquet(path, name)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        text = _decoded(stream, name)
    # A .json file may hold a list or JSON lines: its first character says which.
    chosen = file_format or next((f for f in get_args(FileFormat) if f == ending and f != "json"), None)
    if chosen is None and text.lstrip()[:1] not in {"[", "{"}:
        raise InputError(f"The file {name} is not JSON: it should hold a list of rows or one row a line.")
    return _parse(text, chosen, name)


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the data file with the first of the stems that is there.

    Args:
        folder: Folder to look in.
        stems: File names without their ending, in order of preference.

    Returns:
        The file's path, or None where there is none.

    Raises:
        InputError: One stem has files with different endings.
    """
    for stem in stems:
        paths = [path for ending in get_args(FileFormat) if (path := folder / f"{stem}.{ending}").is_file()]
        if len(paths) > 1:
            raise InputError(f"{folder} holds both {paths[0].name} and {paths[1].name}: keep one of them.")
        if paths:
            return paths[0]
    return None


def _decoded(stream: TextIO, name: str) -> str:
    """Return the whole text of a stream."""
    try:
        return stream.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): convert it to UTF-8.") from None


def _parse(text: str, file_format: FileFormat | None, name: str) -> Rows:
    """Return the rows of a text."""
    first = text.lstrip()[:1]
    chosen = file_format or ("jsonl" if first == "{" else "json" if first == "[" else "csv")
    if chosen == "parquet":
        raise InputError(f"{name} cannot be read as parquet from a stream: give the path of the file.")
    if chosen == "jsonl":
        return _collect(name, _json_lines(text, name))
    if chosen == "json":
        return _json_list(text, name)
    return _collect(name, _separated(text, name, "\t" if chosen == "tsv" else ","))


def _collect(name: str, numbered: Iterable[tuple[int, Mapping[str, object]]]) -> Rows:
    """Return numbered rows as Rows."""
    pairs = tuple(numbered)
    return Rows(name, tuple(row for _, row in pairs), tuple(line for line, _ in pairs))


def _json_lines(text: str, name: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the object on each line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{name} line {number} is not valid JSON: {error.msg} at column {error.colno}.") from None
        if not isinstance(row, dict):
            raise InputError(f"{name} line {number} holds {line.strip()[:40]!r}: each line should be a JSON object.")
        yield number, row


def _json_list(text: str, name: str) -> Rows:
    """Return the objects of a JSON list."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} line {error.lineno} is not valid JSON: {error.msg}.") from None
    if not isinstance(rows, list):
        raise InputError(f"{name} is not a JSON list: give a list of rows.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{name} row {index + 1} is {row!r}: each row should be a JSON object.")
    return Rows(name, tuple(rows))


def _separated(text: str, name: str, delimiter: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the rows of a CSV or TSV text."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise InputError(f"{name} line {reader.line_num} names a column twice: {', '.join(header)}.")
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{name} line {reader.line_num} has {len(cells)} cells where the header has {len(header)}: quote "
                    "text that holds the separator."
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num} is malformed: {error}.") from None


def _parquet(path: Path, name: str) -> Rows:
    """Return the rows of a parquet file."""
    import datasets

    try:
        # Streaming leaves no copy in the cache of the data sets.
        streamed = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        return Rows(name, tuple(dict(row) for row in streamed))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(f"{name} is not a readable parquet file: {str(error).splitlines()[0]}.") from None
