"""From words and YAML files to options; nothing here imports anything slow, so that help is there at once."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, cast, get_args, get_origin, get_type_hints

from bayeslora.cli.options import INHERITED, LEAST, SHARES, Options
from bayeslora.cli.runs import read_options, run_folder
from bayeslora.errors import InputError

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def parse(kind: type[Options], argv: Sequence[str], *, verb: str, examples: str) -> Options:
    """Read a verb's options: defaults, then those of the run it is given, then a YAML file, then flags.

    Args:
        kind: Dataclass of the options; its field ``run``, if it has one, is a first word without a dash.
        argv: Arguments after the verb.
        verb: The verb, for the help.
        examples: Examples for the help.

    Returns:
        The options. ``--help`` prints and exits with status 0, a flag that cannot be read with status 2.

    Raises:
        InputError: If the YAML file cannot be read or names an unknown option, or a number is out of range.
    """
    hints = {f.name: get_type_hints(kind)[f.name] for f in fields(cast(Any, kind))}
    parser = _parser(kind, hints, verb, examples)
    flags = [f"--{name.replace('_', '-')}" for name in hints if name != "run"]
    first = _read(parser, argv, flags)
    if "run" in hints and first.run:
        before = read_options(run_folder(Path(first.run)))
        own = {f.name for f in fields(cast(Any, kind)) if f.metadata["own"]}
        taken = ({f.name for group in INHERITED for f in fields(group)} & hints.keys() & before.keys()) - own
        parser.set_defaults(**{k: _checked(k, before[k], hints[k], first.run) for k in taken})
    if first.config:
        parser.set_defaults(**_yaml(Path(first.config), hints))
    found = vars(_read(parser, argv, flags))
    options, plain = kind(**{name: found[name] for name in hints}), kind()
    for name, least in LEAST.items():
        if name in hints and found[name] != getattr(plain, name):
            _in_range(name, found[name], least)
    return options


def fitted(value: object, hint: Any) -> Any:
    """Return a value from JSON or YAML as an annotation has it: a whole number as a float, a list as a tuple.

    Args:
        value: The value.
        hint: ``int``, ``float``, ``str``, ``bool``, ``None``, a ``Literal``, a list or tuple, or a union of these.

    Returns:
        The value; a whole number is a number, and true, false, NaN and infinity are none.

    Raises:
        ValueError: If it has another type.
    """
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in sorted(inside, key=lambda one: one is float):  # 3 stays whole where that is allowed
            with contextlib.suppress(ValueError):
                return fitted(value, each)
    elif origin is Literal:
        if any(value == each and type(value) is type(each) for each in inside):
            return value
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        each = inside[:1] * len(value) if origin is list or inside[-1] is Ellipsis else inside
        if len(each) == len(value):
            return origin(fitted(one, own) for one, own in zip(value, each, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif origin is None and hint is not float and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    raise ValueError(f"{value!r} is not {in_words(hint)}")


def fits(value: object, hint: Any) -> bool:
    """Say whether a value from JSON or YAML has the type of an annotation; see `fitted`."""
    try:
        fitted(value, hint)
    except ValueError:
        return False
    return True


def in_words(hint: Any) -> str:
    """Return what `fitted` asks for, in words."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}" if len(inside) > 1 else str(inside[0])
    if origin in (Union, UnionType):
        return " or ".join(in_words(each) for each in inside)
    if origin is tuple:
        return f"[{', '.join('…' if each is Ellipsis else in_words(each) for each in inside)}]"
    return f"a list, each {in_words(inside[0])}" if origin is list else _WORDS.get(hint, hint.__name__)


def meant(word: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that helps with an unknown word: the close ones, else all."""
    close = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with the flag as it is to be typed, and with defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = next((s for s in action.option_strings if s.startswith("--")), "")
        takes = action.nargs != 0
        shown = self._format_args(action, self._get_default_metavar_for_optional(action)) if flag and takes else ""
        return f"{flag} {shown}".strip() if flag else super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in ("", [], None, False, argparse.SUPPRESS)
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return action.help if silent else f"{action.help} [{shown}]"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, without forty lines of usage."""

    def error(self, message: str) -> NoReturn:
        """End with the one sentence that says what is wrong."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser(kind: Any, hints: Mapping[str, Any], verb: str, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a verb, its own options first, then a group for each dataclass that it is made of."""
    positional = " RUN" if "run" in hints else ""
    parser = _Parser(
        prog=f"bayeslora {verb}",
        usage=f"bayeslora {verb}{positional} [options]",
        description=kind.__doc__,
        epilog=examples,
        formatter_class=lambda prog: _Formatter(prog, max_help_position=30),
        allow_abbrev=False,
    )
    every = {f.name: f for f in fields(kind)}
    for group in kind.__mro__[:-1]:
        own = [every[name] for name in inspect.get_annotations(group) if name in every]
        place = parser if group is kind else parser.add_argument_group(str(group.__doc__).rstrip("."))
        for f in own:
            _add(place, f, hints[f.name])
        if group is kind:
            parser.add_argument("--config", metavar="FILE", help="YAML file with these options; flags override it.")
    return parser


def _add(parser: Any, f: Field[Any], hint: Any) -> None:
    """Add one option: ``--learning-rate``, and ``--learning_rate`` for those who are used to it."""
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    if f.name == "run":
        parser.add_argument("run", nargs="?", default=default, metavar="RUN", help=f.metadata["help"])
        return
    flags = list(dict.fromkeys([f"--{f.name.replace('_', '-')}", f"--{f.name}"]))
    more: dict[str, Any] = {"dest": f.name, "default": default, "help": f.metadata["help"]}
    if hint is bool:
        parser.add_argument(*flags, action="store_true", **more)
    elif get_origin(hint) is Literal:
        parser.add_argument(*flags, choices=get_args(hint), **more)
    elif get_origin(hint) is list:
        parser.add_argument(*flags, nargs="*", type=get_args(hint)[0], metavar=f.name.upper(), **more)
    else:
        parser.add_argument(*flags, type=hint, metavar={str: "TEXT", int: "INT"}.get(hint, "NUMBER"), **more)


def _read(parser: argparse.ArgumentParser, argv: Sequence[str], flags: Sequence[str]) -> argparse.Namespace:
    """Return the flags' values, or exit with a sentence about the first that is unknown."""
    found, unknown = parser.parse_known_args(list(argv))
    if unknown:
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=2)
        parser.error(f"unknown option {unknown[0]}{', did you mean ' + ' or '.join(close) + '?' if close else ''}")
    return found


def _yaml(path: Path, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Read a YAML file of options."""
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"the configuration {path} cannot be read: {reason}") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} must hold options and their values, one a line, such as 'task: openbookqa'")
    found = {}
    for key, value in read.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise InputError(f"{path} names the unknown option {key!r}; {meant(name, sorted(hints))}")
        found[name] = _checked(name, value, hints[name], str(path))
    return found


def _checked(name: str, value: Any, hint: Any, where: str) -> Any:
    """Return a value from a file as the option wants it, or refuse it."""
    if hint is float and isinstance(value, str):  # YAML takes 2e-4 for text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, dict) and name == "trainer":
        value = json.dumps(value)
    if isinstance(value, dict) and name == "set":
        value = [f"{key}={json.dumps(each)}" for key, each in value.items()]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and hint == list[str]:
        value = [str(value)]
    if hint == list[str] and isinstance(value, list):
        value = [str(each) if isinstance(each, (int, float)) else each for each in value]
    if not fits(value, hint):
        raise InputError(f"{where}: {name} must be {in_words(hint)}, and it is {value!r}")
    return value


def _in_range(name: str, value: Any, least: float) -> None:
    """Refuse a number that has no meaning."""
    flag = f"--{name.replace('_', '-')}"
    for each in value if isinstance(value, list) else [value]:
        if not least <= each < math.inf:
            raise InputError(f"{flag} must be a number of at least {least}, and it is {each}")
        if name in SHARES and each > 1:
            raise InputError(f"{flag} is a share and must be at most 1, and it is {each}")
