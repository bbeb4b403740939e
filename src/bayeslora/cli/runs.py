"""Folders of results: their options, and the rule that nothing is overwritten silently."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar, cast

from bayeslora.cli.options import given
from bayeslora.errors import InputError

_FILE = "options.json"
Options = TypeVar("Options")


def open_folder(folder: Path, options: Any, *, resume: bool, free: tuple[str, ...] = ()) -> None:
    """Make a folder of results, or take up one that was begun with the same options.

    Args:
        folder: The folder.
        options: The verb's options, kept in the folder.
        resume: Whether to go on if the folder is there.
        free: Options that may differ when it is taken up.

    Raises:
        InputError: If the folder is there and is not to be gone on with, or was begun with other options.
    """
    now = json.loads(json.dumps(given(options)))
    path = folder / _FILE
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        if not path.exists():
            raise InputError(f"{folder} holds other files; choose another --out")
        if not resume:
            raise InputError(f"{folder} is there already; add --resume to go on with it, or choose another --out")
        before = read_options(folder)
        for key, value in now.items():
            if key not in ("out", "resume", *free) and before.get(key) != value:
                raise InputError(
                    f"{folder} was begun with {key}={before.get(key)!r}, and now it is {value!r}; choose another --out"
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options that a folder of results was made with.

    Args:
        folder: The folder.

    Returns:
        Option to value; empty if the folder has none.

    Raises:
        InputError: If they cannot be read.
    """
    try:
        return dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _FILE} cannot be read: {error}") from error


def posterior_folder(folder: Path) -> Path:
    """Return the posterior inside a run's folder, or the folder itself."""
    return folder / "posterior" if (folder / "posterior").is_dir() else folder


def filled(options: Options, folder: Path) -> Options:
    """Return options with what was left at its default taken from the run that the folder holds.

    Args:
        options: A verb's options.
        folder: Folder of a run.

    Returns:
        A changed copy.
    """
    before = read_options(folder)
    changes = {}
    for f in dataclasses.fields(cast(Any, options)):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if f.name in before and getattr(options, f.name) == default:
            changes[f.name] = before[f.name]
    return dataclasses.replace(cast(Any, options), **changes)


def write_json(path: Path, value: Any) -> None:
    """Write JSON at once or not at all.

    Args:
        path: The file.
        value: What to write.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
