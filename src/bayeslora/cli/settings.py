"""From words to a method: its name, and ``key=value`` for each of its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast, get_type_hints

from bayeslora.cli.values import read
from bayeslora.errors import InputError, close_matches
from bayeslora.methods import METHODS, Ensemble, Inference

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def build_method(name: str, settings: Sequence[str] = ()) -> Inference:
    """Return a method by its name, such as ``swag``, ``ensemble:5`` or ``ivon:3``, with settings ``key=value``."""
    base, colon, members = name.partition(":")
    if base not in METHODS:
        raise InputError(f"unknown method {base!r}, {close_matches(base, METHODS)}")
    words: dict[str, str] = {}
    for item in settings:
        key, sign, text = item.partition("=")
        if not sign:
            raise InputError(f"the setting {item!r} has no value; write key=value")
        if key in words:
            raise InputError(f"the setting {key!r} is given a second time, as {item!r}; keep one of the two")
        words[key] = text.strip('"')
    plain = METHODS[base]()
    if colon:
        if not isinstance(plain, Ensemble):
            plain = Ensemble(member=plain)
        if not members.isdecimal():
            raise InputError(f"{name!r}: after the colon comes the number of members, such as {base}:5")
        words["members"] = members
    return _with(plain, words, base)


def _with(method: Inference, words: Mapping[str, str], name: str) -> Inference:
    """Return a method with other settings; what only its members know, also spelled ``member.key``, goes to them."""
    hints, settings = get_type_hints(type(method)), _settings(method)
    inner = {
        key: build_method(words[key]) if key in words else value
        for key, value in settings.items()
        if isinstance(value, Inference)
    }
    values: dict[str, object] = {}
    routed: dict[str, dict[str, str]] = {key: {} for key in inner}
    for key, text in words.items():
        part, dot, rest = key.partition(".")
        if key in settings.keys() - inner.keys():
            values[key] = read(text, hints[key], f"{name}'s setting {key}")
        elif dot and part in inner:
            routed[part][rest] = text
        elif key not in inner:
            part = next((part for part, member in inner.items() if key in _settings(member)), "")
            if not part:
                known = [
                    *(key for key in settings if key not in inner),
                    *(each for one in inner.values() for each in _settings(one)),
                ]
                raise InputError(f"{name} has no setting {key!r}, {close_matches(key, known)}")
            routed[part].setdefault(key, text)
    values |= {key: _with(one, routed[key], one.name if key in words else name) for key, one in inner.items()}
    return cast(Inference, dataclasses.replace(cast("DataclassInstance", method), **values))


def _settings(method: Inference) -> dict[str, object]:
    """Return the settings of a method by their names."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(cast("DataclassInstance", method))}
