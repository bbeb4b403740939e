"""From words to a method: its name, and ``key=value`` for each of its settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_type_hints

from bayeslora.cli.parse import fitted, in_words, meant
from bayeslora.errors import InputError
from bayeslora.methods import METHODS, Ensemble, Inference

_SPECIAL = {"none": None, "null": None, "true": True, "false": False}
"""Words that are no text where an annotation has what they mean."""


def build_method(name: str, settings: Sequence[str] = ()) -> Inference:
    """Return a method by its name on the command line.

    Args:
        name: Such as ``map``, ``swag``, or ``ensemble:5`` with the number of members; ``ivon:3`` is an ensemble of
            three runs of IVON.
        settings: ``key=value`` for the method's settings, values as in JSON: ``betas=[0.9,0.999]``, ``rank=null``,
            ``kind=diagonal``. What an ensemble does not know is a setting of its members, also spelled
            ``member.key=value``; ``member=swag`` says what they are.

    Returns:
        The method.

    Raises:
        InputError: If the method or a setting is unknown, or a value has the wrong form.
    """
    base, colon, members = name.partition(":")
    if base not in METHODS:
        raise InputError(f"unknown method {base!r}, {meant(base, list(METHODS))}")
    words: dict[str, str] = {}
    for item in settings:
        key, sign, text = item.partition("=")
        if not sign:
            raise InputError(f"the setting {item!r} has no value; write key=value")
        words[key] = text
    plain = METHODS[base]()
    if colon:
        if not isinstance(plain, Ensemble):
            plain = Ensemble(member=plain)
        if not members.isdecimal():
            raise InputError(f"{name!r}: after the colon comes the number of members, such as {base}:5")
        words["members"] = members
    return _with(plain, words, base)


def _with(method: Inference, words: Mapping[str, str], name: str) -> Inference:
    """Return a method with other settings, each checked; what only a method inside it knows goes to that one."""
    hints = get_type_hints(type(method))
    inner = {f.name: getattr(method, f.name) for f in dataclasses.fields(cast(Any, method))}
    own = [key for key, value in inner.items() if not isinstance(value, Inference)]
    inner = {key: value for key, value in inner.items() if isinstance(value, Inference)}
    for key in inner.keys() & words.keys():
        inner[key] = build_method(words[key])
    values: dict[str, Any] = {}
    deeper: dict[str, dict[str, str]] = {key: {} for key in inner}
    for key, text in words.items():
        part, dot, rest = key.partition(".")
        if key in own:
            values[key] = _value(text, hints[key], f"{name}'s setting {key}")
        elif dot and part in inner:
            deeper[part][rest] = text
        elif key not in inner:
            known = [part for part, one in inner.items() if key in _names(one)]
            if not known:
                every = [*own, *(each for one in inner.values() for each in _names(one))]
                raise InputError(f"{name} has no setting {key!r}, {meant(key, every)}")
            deeper[known[0]].setdefault(key, text)
    values |= {key: _with(one, deeper[key], one.name if key in words else name) for key, one in inner.items()}
    return dataclasses.replace(cast(Any, method), **values)


def _names(method: Inference) -> list[str]:
    """Return the names of a method's settings."""
    return [f.name for f in dataclasses.fields(cast(Any, method))]


def _value(text: str, hint: Any, what: str) -> Any:
    """Return the value that a text stands for, by the annotation of its setting."""
    readings: list[Any] = [_SPECIAL[text.lower()]] if text.lower() in _SPECIAL else []
    inside = text.removeprefix("(").removesuffix(")") if text.startswith("(") else text
    for each in (text, f"[{inside}]" if "," in inside and not inside.startswith("[") else ""):
        try:
            readings.append(json.loads(each))
        except ValueError:
            continue
    for reading in [*readings, text]:
        try:
            return fitted(reading, hint)
        except ValueError:
            continue
    raise InputError(f"{what} must be {in_words(hint)}, and it is {(readings or [text])[0]!r}")
