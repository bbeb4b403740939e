"""Files: JSON that can be trusted, and what appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.errors import InputError
from bayeslora.files.atomic import atomic_file, atomic_folder, standing, undisturbed

__all__ = ["atomic_file", "atomic_folder", "standing", "undisturbed"]


def read_bytes(path: Path, most: int = 2**24) -> bytes:
    """Read a regular file of at most so many bytes; a pipe or a device, which may never end, is not opened."""
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file" if os.path.lexists(path) else f"There is no file {path}")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise InputError(f"{path} has {size:,} bytes, and at most {most:,} are read")
            return file.read(size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def parse_json(text: str, *, finite: bool = True) -> object:
    """Return the value of a JSON text; a ValueError says what is wrong with it, be it what `check_json` refuses."""
    value = decode_json(text)
    check_json(value, finite=finite)
    return value


def decode_json(text: str) -> object:
    """Return the value of a JSON text, of which `check_json` is to be asked, as a whole or part by part."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_json(value: object, depth: int = 32, *, finite: bool = True) -> None:
    """Refuse, by a ValueError, what programs read in different ways or cannot write again, anywhere in a value."""
    if isinstance(value, _Repeated):
        raise ValueError(f"the key {value.key[:80]!r} is given twice")
    if finite and isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it holds NaN, Infinity or a number that is too large")
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError("it holds a half of a surrogate pair, which is no character")
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError("it is nested too deeply")
        for each in value if isinstance(value, list) else (*value, *value.values()):
            check_json(each, depth - 1, finite=finite)


@dataclass(frozen=True)
class _Repeated:
    """An object with a key that is given twice."""

    key: str


def _object(pairs: list[tuple[str, object]]) -> dict[str, object] | _Repeated:
    """Return a JSON object as a dictionary, if its keys differ."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    return _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])


def _whole(digits: str) -> int | float:
    """Return a whole number; one beyond the largest float as infinity, which is refused."""
    return int(digits) if len(digits) < 309 else math.inf


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object of a posterior's folder; ``missing`` is the message where the file is not there."""
    if not os.path.lexists(path):
        raise InputError(missing)
    content = read_bytes(path)
    try:
        value = parse_json(content.decode(), finite=False)  # a setting may be infinite
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; copy the folder again")
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON at once or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all; one that is there is replaced."""
    try:
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
