"""From words to methods: a name, and ``key=value`` for each of its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_type_hints

from bayeslora.cli.values import read
from bayeslora.errors import InputError, close_matches, listed
from bayeslora.methods import METHODS, Ensemble, Inference

EVERY = tuple(f"{name}:3" if isinstance(make(), Ensemble) else name for name, make in METHODS.items())
"""What ``--methods all`` stands for."""


def build_method(
    name: str, settings: Sequence[str] = (), methods: Mapping[str, Callable[..., Inference]] = METHODS
) -> Inference:
    """Return a method by its name, such as ``swag``, ``ensemble:5`` or ``ivon:3``, with settings ``key=value``."""
    base, colon, members = name.partition(":")
    if base not in methods:
        raise InputError(f"unknown method {base[:80]!r}, {close_matches(base[:80], methods)}")
    words: dict[str, str] = {}
    for item in settings:
        key, sign, text = item.partition("=")
        if not sign:
            raise InputError(f"the setting {item[:80]!r} has no value; write key=value")
        if key in words:
            raise InputError(f"the setting {key[:80]!r} is given a second time, as {item[:80]!r}; keep one of the two")
        words[key] = text.strip('"')
    plain = methods[base]()
    if colon:
        if not isinstance(plain, Ensemble):
            plain = Ensemble(member=plain)
        if not members.isdecimal():
            raise InputError(f"{name[:80]!r}: after the colon comes the number of members, such as {base}:5")
        words["members"] = members
    return _with(plain, words, base)


def build_methods(names: Sequence[str], given: Sequence[str]) -> dict[str, Inference]:
    """Return methods by their labels, ``name`` or ``label=name``, with settings ``label.key=value``."""
    pairs = [(label, method) for label, _, method in (word.rpartition("=") for word in _words(names))]
    settings: dict[str, list[str]] = {label or method.partition(":")[0]: [] for label, method in pairs}
    for item in given:
        label, dot, setting = item.partition(".")
        if not dot or label not in settings:
            raise InputError(
                f"--set {item[:80]!r} names none of the methods {listed(settings)}; write method.key=value, such as "
                "swag.rank=10"
            )
        settings[label].append(setting)
    methods: dict[str, Inference] = {}
    for label, method in pairs:
        name = label or method
        if "/" in name:
            raise InputError(f"a method's label names a file, and {name[:80]!r} cannot; write it without a slash")
        if name in methods:
            raise InputError(f"two methods are called {name[:80]}; give each a label of its own, label={method[:80]}")
        methods[name] = build_method(method, settings[label or method.partition(":")[0]])
    return methods


def labelled(names: Sequence[str]) -> dict[str, str]:
    """Return methods as they were typed, by what ``--set`` and the table call them."""
    return {word.rpartition("=")[0] or word: word for word in _words(names)}


def _words(names: Sequence[str]) -> list[str]:
    """Return the methods, each by itself."""
    return [word for name in names for word in (EVERY if name == "all" else (name,))]


def _with(method: Inference, words: Mapping[str, str], name: str) -> Inference:
    """Return a method with other settings; what only its members know, also spelled ``member.key``, goes to them."""
    hints, settings = get_type_hints(type(method)), vars(method)
    inner = {
        key: build_method(words[key]) if key in words else value
        for key, value in settings.items()
        if isinstance(value, Inference)
    }
    values: dict[str, object] = {}
    routed: dict[str, dict[str, str]] = {key: {} for key in inner}
    for key, text in words.items():
        part, dot, rest = key.partition(".")
        if key in inner:
            continue
        if key in settings:
            values[key] = read(text, hints[key], f"{name}'s setting {key}")
        elif dot and part in inner:
            routed[part][rest] = text
        else:
            part = next((part for part, member in inner.items() if key in vars(member)), "")
            if not part:
                known = [each for owner in (method, *inner.values()) for each in vars(owner) if each not in inner]
                raise InputError(f"{name} has no setting {key[:80]!r}, {close_matches(key[:80], known)}")
            routed[part].setdefault(key, text)
    values |= {key: _with(one, routed[key], one.name if key in words else name) for key, one in inner.items()}
    return type(method)(**(settings | values))
