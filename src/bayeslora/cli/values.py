"""Values of options and settings, read by their type's annotation from a flag, a YAML file, ``--set`` or JSON."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin

from bayeslora.errors import InputError

_NAMES: dict[object, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null",
}  # fmt: skip
_CONSTANTS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}
_ANSWERS = {"yes": True, "on": True, "no": False, "off": False}


def read(value: object, hint: object, what: str) -> object:
    """Return what a text or JSON value is by a type: ``.02`` a number, ``null`` None, ``.9,.99`` a tuple."""
    try:
        return _read(value, hint)
    except (ValueError, OverflowError):
        raise InputError(f"{what} must be {in_words(hint)}, and it is {_as_json(value)!r}") from None


def _read(value: object, hint: object) -> object:
    """Return a value as one type has it; ValueError if it is none."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in sorted(inside, key=lambda one: (one is str, one is float)):  # 3 stays whole, null is no text
            with contextlib.suppress(ValueError, OverflowError):
                return _read(value, each)
    elif origin is Literal:
        for each in inside:
            if value == (str(each) if isinstance(value, str) else each):
                return each
    elif origin is list:
        return [_read(each, inside[0]) for each in (value if isinstance(value, list) else [value])]
    elif origin is tuple:
        return _tuple(value, inside)
    elif hint in (bool, NoneType):
        constant = (_CONSTANTS | _ANSWERS).get(value.lower(), value) if isinstance(value, str) else value
        if isinstance(constant, bool if hint is bool else NoneType):
            return constant
    elif isinstance(value, bool):
        raise ValueError
    elif hint is str and isinstance(value, str | int | float):
        return str(value)
    elif hint is int and isinstance(value, str | int):
        return int(value)
    elif hint is float and isinstance(value, str | int | float) and not math.isnan(number := float(value)):
        return number
    raise ValueError


def _tuple(value: object, inside: tuple[object, ...]) -> tuple[object, ...]:
    """Return a list, or a text with commas, as a tuple of the types inside."""
    parts = [part.strip(" \"'") for part in value.strip("[]() ").split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError
    hints = inside[:1] * len(parts) if inside[-1] is Ellipsis else inside
    return tuple(_read(part, hint) for part, hint in zip(parts, hints, strict=True))


def _as_json(value: object) -> object:
    """Return what a text says, for a message: a number without quotes, ``none`` as None, any other text as it is."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        return json.loads(value)
    return _CONSTANTS.get(value.lower(), value)


def in_words(hint: object) -> str:
    """Return in words what `read` takes."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}" if len(inside) > 1 else str(inside[0])
    if origin in (Union, UnionType):
        return " or ".join(in_words(each) for each in inside)
    if origin is tuple:
        return f"[{', '.join('…' if each is Ellipsis else in_words(each) for each in inside)}]"
    return f"a list, each {in_words(inside[0])}" if origin is list else _NAMES.get(hint, str(hint))


def load_yaml(path: Path) -> object:
    """Read a YAML file: its words as they are typed (``[yes, 1]`` are two texts) but null, and no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar = {
            first: [pair for pair in pairs if pair[0].endswith((":null", ":merge"))]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
            keys = [key.value for key, _ in node.value]
            for row, key in enumerate(keys):
                if key in keys[:row]:
                    line = node.value[row][0].start_mark.line + 1
                    raise InputError(f"{path} line {line} gives {key!r} a second time; keep one of the two")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"the configuration {path} cannot be read: {reason}") from error
