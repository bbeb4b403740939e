"""From words and YAML files to options; nothing here imports anything slow, so that help is there at once."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from bayeslora.cli.options import INHERITED
from bayeslora.cli.runs import posterior_name, read_options, run_folder
from bayeslora.cli.values import load_yaml, read
from bayeslora.errors import InputError, close_matches

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_METAVARS: dict[object, str] = {str: "TEXT", int: "INT", float: "NUMBER"}
Options = TypeVar("Options", bound="DataclassInstance")


def parse(kind: type[Options], argv: Sequence[str], *, verb: str, examples: str) -> Options:
    """Return a verb's options: defaults, then those of its RUN, then a YAML file, then flags."""
    options = {f.name: f for f in fields(kind)}
    for name, hint in get_type_hints(kind).items():
        options[name].type = hint  # the type itself in the place of its words
    parser = _parser(options, kind, verb, examples)
    typed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        close = close_matches(unknown[0].partition("=")[0], map(_flag, options), "")
        parser.error(f"unknown option {unknown[0]}{close and f', {close}'}")
    flags = vars(typed)
    config = flags.pop("config", None)
    values = {} if config is None else _from_yaml(Path(config), options)
    values |= {name: read(value, options[name].type, _flag(name)) for name, value in flags.items()}
    run = str(values.get("run", ""))
    if run:
        values = _from_run(run, options) | values
    for name, value in values.items():
        _check_limits(name, value, options[name])
    for name, f in options.items():
        if f.metadata["required"] and not values.get(name):
            raise InputError(f.metadata["required"])
    if run:
        posterior_name(run)  # refuses an unfinished run before anything slow is imported
    return kind(**values)


def _flag(name: str) -> str:
    """Return an option's flag as it is to be typed."""
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, without forty lines of usage."""

    def error(self, message: str) -> NoReturn:
        """End with the one sentence that says what is wrong."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser(options: Mapping[str, Field[object]], kind: type, verb: str, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a verb: its own options first, then a group for each dataclass that it is made of."""
    parser = _Parser(
        prog=f"bayeslora {verb}",
        usage=f"bayeslora {verb}{' RUN' if 'run' in options else ''} [options]",
        description=kind.__doc__,
        epilog=examples,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
        add_help=False,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    help_action = parser.add_argument("--help", "-h", action="help", help="show this help message and exit")
    help_action.option_strings = help_action.option_strings[:1]
    for group in kind.__mro__[:-1]:
        place = parser if group is kind else parser.add_argument_group(str(group.__doc__).rstrip("."))
        for name in inspect.get_annotations(group):
            if name in options:
                _add(place, options[name])
        if group is kind:
            parser.add_argument("--config", metavar="FILE", help="YAML file with these options; flags override it.")
    return parser


def _add(place: argparse._ActionsContainer, f: Field[object]) -> None:
    """Add one option: ``--learning-rate``, and ``--learning_rate`` for those who are used to it."""
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    text = f.metadata["help"] if default in ("", [], False) else f"{f.metadata['help']} [{shown}]"
    if f.name == "run":
        place.add_argument("run", nargs="?", metavar="RUN", help=text)
        return
    flags = [spelling for name in (f.name, f.metadata["former"]) if name for spelling in (_flag(name), f"--{name}")]
    if f.type is bool:
        action = place.add_argument(*flags, dest=f.name, action="store_true", help=text)
    elif get_origin(f.type) is list:
        action = place.add_argument(*flags, dest=f.name, nargs="*", metavar=f.name.upper(), help=text)
    else:
        choices = get_args(f.type) if get_origin(f.type) is Literal else ()
        metavar = f"{{{','.join(choices)}}}" if choices else _METAVARS[f.type]
        action = place.add_argument(*flags, dest=f.name, metavar=metavar, help=text)
    action.option_strings = flags[:1]  # what help and complaints show


def _from_run(run: str, options: Mapping[str, Field[object]]) -> dict[str, object]:
    """Return the options that a verb takes from the run that it is given."""
    recorded = read_options(run_folder(Path(run)))
    inherited = {f.name for group in INHERITED for f in fields(group)} & options.keys() & recorded.keys()
    own = {name for name, f in options.items() if f.metadata["own"]}
    return {name: read(recorded[name], options[name].type, f"{run}: {name}") for name in inherited - own}


def _from_yaml(path: Path, options: Mapping[str, Field[object]]) -> dict[str, object]:
    """Return the options of a YAML file."""
    content = load_yaml(path, typed="trainer") or {}
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold options and their values, one a line, such as 'task: openbookqa'")
    names = {f.metadata["former"] or name: name for name, f in options.items()} | {name: name for name in options}
    values: dict[str, object] = {}
    for key, value in content.items():
        name = names.get(str(key).replace("-", "_"), "")
        if not name:
            shown = str(key)[:80]
            raise InputError(f"{path} names the unknown option {shown!r}; {close_matches(shown, sorted(options))}")
        if name in values:
            raise InputError(f"{path} gives {name} a second time, as {key}; keep one of the two")
        if isinstance(value, dict) and name == "trainer":
            value = json.dumps(value, default=str)
        if isinstance(value, dict) and name == "set":
            value = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in value.items()]
        values[name] = read(value, options[name].type, f"{path}: {name}")
    return values


def _check_limits(name: str, value: object, f: Field[object]) -> None:
    """Refuse a number that has no meaning."""
    least, most = f.metadata["least"], f.metadata["most"]
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, bool) or not isinstance(each, int | float):
            continue
        if not least <= each < math.inf:
            raise InputError(f"{_flag(name)} must be a number of at least {least}, and it is {each}")
        if each > most:
            raise InputError(f"{_flag(name)} is a share and must be at most {most}, and it is {each}")
