"""Rows from files and streams: JSON lines, JSON, CSV, TSV and parquet, each row with the line it stands on.

Not by `datasets`, which takes ``NA`` and ``null`` in text files for missing, gives every row the columns of all, asks
the network for parquet, and has neither line numbers for what is refused nor streams such as standard input.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO, get_args

from bayeslora.errors import InputError
from bayeslora.files import check_json, decode_json, parse_json, read_bytes

FileFormat = Literal["jsonl", "json", "csv", "tsv", "parquet"]
ENDINGS = ".jsonl, .json, .csv, .tsv or .parquet"
_FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
MAX_BYTES = 2**31
"""Most bytes of a file or stream: rows are held in memory, where they take several times as much."""
_NO_UTF8 = {
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save the sheet as CSV",
}
"""How files begin that are taken for text, and what they are."""
_Numbered = Iterator[tuple[int, Mapping[str, object]]]


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
    """Read the rows of a file by its ending, or of an open text stream by its first character, without blank lines."""
    if file_format is not None and file_format not in _FORMATS:
        raise InputError(f"The file format {file_format!r} is unknown: give one of {', '.join(_FORMATS)}")
    if not isinstance(source, (str, Path)):
        name = name or "standard input"
        return _parse(read_text(source, name), file_format, name)
    path = Path(os.path.expanduser(source))
    name = name or str(path)
    chosen = file_format or next((known for known in _FORMATS if known == path.suffix.lower().removeprefix(".")), None)
    if chosen is None:
        raise InputError(f"The file {name} ends in none of {ENDINGS}")
    if chosen == "parquet" and os.path.isfile(path):
        return _parquet(path, name)
    text = read_text(path, name)
    if chosen == "json" and file_format is None:  # a list or JSON lines: the first character says which
        if text.lstrip()[:1] not in {"[", "{"}:
            raise InputError(f"The file {name} is not JSON: it should hold a list of rows or one row a line")
        chosen = None
    return _parse(text, chosen, name)


def read_text(source: Path | TextIO, name: str) -> str:
    """Return the whole text of a file or stream, which is UTF-8 whatever the locale."""
    content = read_bytes(source, MAX_BYTES) if isinstance(source, Path) else _streamed(source, name)
    for start, what in _NO_UTF8.items():
        if content.startswith(start):
            raise InputError(f"{name} is {what}")
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name} line {line} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{name} line {line} holds a NUL character: save it as UTF-8 text")
    return text


def find_file(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the data file with the first of the stems that is there; refuse one stem with two endings."""
    for stem in stems:
        paths = [path for ending in _FORMATS if (path := folder / f"{stem}.{ending}").exists() and not path.is_dir()]
        if len(paths) > 1:
            raise InputError(f"{folder} holds both {paths[0].name} and {paths[1].name}: keep one of them")
        if paths:
            return paths[0]
    return None


def _streamed(stream: TextIO, name: str) -> bytes:
    """Return the bytes of a stream, as far as it is not too long."""
    binary = getattr(stream, "buffer", None)
    content = bytearray()
    while part := (stream if binary is None else binary).read(2**20):
        content += part.encode(errors="surrogatepass") if isinstance(part, str) else part
        if len(content) > MAX_BYTES:
            raise InputError(f"{name} has more than {MAX_BYTES:,} bytes: give it in parts")
    return bytes(content)


def _parse(text: str, file_format: FileFormat | None, name: str) -> Rows:
    """Return the rows of a text, whose first character says the format where none is given."""
    if file_format is None:
        first = text.lstrip()[:1]
        file_format = "jsonl" if first == "{" else "json" if first == "[" else "csv"
    if file_format == "parquet":
        raise InputError(f"{name} cannot be read as parquet from a stream: give the path of the file")
    if file_format == "json":
        return Rows(name, tuple(_json_list(text, name)))
    separator = "\t" if file_format == "tsv" else ","
    numbered = tuple(_json_lines(text, name) if file_format == "jsonl" else _separated(text, name, separator))
    return Rows(name, tuple(row for _, row in numbered), tuple(line for line, _ in numbered))


def _json_lines(text: str, name: str) -> _Numbered:
    """Yield the object on each line."""
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{name} line {number} is not valid JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise InputError(f"{name} line {number} cannot be used: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{name} line {number} holds {line.strip()[:40]!r}: each line should be a JSON object")
        yield number, row


def _json_list(text: str, name: str) -> Iterable[Mapping[str, object]]:
    """Return the objects of a JSON list."""
    try:
        rows = decode_json(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}"
        raise InputError(f"{name} {place}") from None
    except ValueError as error:
        raise InputError(f"{name} cannot be used: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{name} is not a JSON list: give a list of rows")
    for number, row in enumerate(rows, start=1):
        try:
            check_json(row)
        except ValueError as error:
            raise InputError(f"{name} row {number} cannot be used: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{name} row {number} is {repr(row)[:40]}: each row should be a JSON object")
    return rows


def _separated(text: str, name: str, separator: str) -> _Numbered:
    """Yield the rows of a CSV or TSV text."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    begun = 1
    try:
        for cells in reader:
            begun, line = reader.line_num + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(cells, f"{name} line {line}")
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{name} line {line} has {len(cells)} cells where the header has {len(header)}: quote text that "
                    "holds the separator"
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{name} line {begun}: the row is malformed ({error}); is a quote left open?") from None


def _header(cells: Sequence[str], where: str) -> list[str]:
    """Return the names of the columns."""
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise InputError(f"{where} names a column twice: {Counter(names).most_common(1)[0][0][:80]!r}")
    other = next((sign for sign in ";\t|" if sign in names[0]), None)
    if len(names) == 1 and other is not None:
        raise InputError(f"{where} is one column, {names[0][:80]!r}: separate columns by commas, not by {other!r}")
    return names


def _parquet(path: Path, name: str) -> Rows:
    """Return the rows of a parquet file."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{name} is not a readable parquet file: {' '.join(str(error).split())[:200]}") from None
    return Rows(name, tuple({key: _known(value) for key, value in row.items()} for row in rows))


def _known(value: object) -> object:
    """Return a cell of a parquet file; a number that is none as None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
