"""Values of options and settings, read by their type's annotation from a flag, a YAML file, ``--set`` or JSON."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from bayeslora.errors import InputError
from bayeslora.files import parse_json, read_bytes

MAX_YAML = 2**18
"""Most bytes of a configuration."""
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
        raise InputError(f"{what} must be {in_words(hint)}, and it is {_as_json(value)!r:.80}") from None


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
        if re.search("[\0\ud800-\udfff]", text := str(value)):
            raise ValueError  # no file can be called so, and none can hold it
        return text
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
        return parse_json(value)
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


def load_yaml(path: Path, typed: str = "") -> object:
    """Read a YAML file: words as they are typed (``[yes, 1]`` are two texts) but null, and below the key ``typed``."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node, index: object) -> yaml.Node:
            """Refuse what makes other values, or much, of few words."""
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) not in (None, "!"):
                what = "an alias" if isinstance(event, yaml.AliasEvent) else f"the tag {event.tag[:40]}"
                raise InputError(f"{path} line {event.start_mark.line + 1} has {what}; write the value itself")
            return super().compose_node(parent, index)

        def words(self, node: yaml.Node) -> object:
            """Return a node's value."""
            if isinstance(node, yaml.ScalarNode):
                return None if node.tag.endswith(":null") else node.value
            if isinstance(node, yaml.SequenceNode):
                return [self.words(each) for each in node.value]
            found: dict[str, object] = {}
            for name, value in node.value:
                line = f"{path} line {name.start_mark.line + 1}"
                if not isinstance(name, yaml.ScalarNode):
                    raise InputError(f"{line} has a key that is no word; write one word before the colon")
                if name.value in found:
                    raise InputError(f"{line} gives {name.value[:80]!r} a second time; keep one of the two")
                found[name.value] = self.words(value)
                if node is root and name.value == typed and isinstance(value, yaml.MappingNode):
                    found[name.value] = self.construct_object(value, deep=True)
            return found

    try:
        loader = Loader(read_bytes(path, MAX_YAML).decode())
        root = loader.get_single_node()
        return None if root is None else loader.words(root)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"the configuration {path} cannot be read: it is nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"the configuration {path} cannot be read: {' '.join(str(error).split())}") from error
