"""Folders of results: their options, and the rule that nothing is overwritten silently."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayeslora.cli.launch import is_first, once
from bayeslora.errors import InputError
from bayeslora.files import read_object, standing, write_json

_FILE = "options.json"


def check_folder(folder: Path, options: object, *, resume: bool, free: tuple[str, ...] = ()) -> None:
    """Refuse a folder that is there, unless it is to be gone on with, with the same options but the ``free`` ones."""
    once(lambda: _check_folder(folder, options, resume, free))  # before one of several processes makes it


def _check_folder(folder: Path, options: object, resume: bool, free: tuple[str, ...]) -> None:
    """Refuse a folder as `check_folder` says."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if folder.is_file() or not (folder / _FILE).exists():
        raise InputError(f"{folder} holds other files; choose another --out")
    if not resume:
        raise InputError(f"{folder} is there already; add --resume to go on with it, or choose another --out")
    # options may have come since the folder was begun; earlier versions had no normalisation but the sum
    before = recorded(type(options)()) | {"normalisation": "sum"} | read_options(folder)
    for key, value in recorded(options).items():
        if key not in ("out", "resume", *free) and before.get(key) != value:
            raise InputError(
                f"{folder} was begun with {key}={before.get(key)!r}, and now it is {value!r}; leave it as it was, or "
                "choose another --out"
            )


@contextmanager
def opened(folder: Path, options: object) -> Iterator[None]:
    """Keep a verb's options in its folder of results; on an `InputError` a new folder without weights goes."""
    fresh = is_first() and (not folder.exists() or not any(folder.iterdir()))

    def begin() -> None:
        """Make the folder."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be made: {error.strerror}") from error
        write_json(folder / _FILE, recorded(options))

    try:
        once(begin)
        yield
    except InputError:
        if fresh and not any(folder.rglob("*.safetensors")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options that a folder of results was made with; none if it has none."""
    return read_object(folder / _FILE, missing="") if (folder / _FILE).exists() else {}


def run_folder(path: Path) -> Path:
    """Return the folder of the run that a path names: itself, or the one that its posterior is in."""
    inside = path.name == "posterior" and not (path / _FILE).exists() and (path.parent / _FILE).exists()
    return path.parent if inside else path


def posterior_name(name: str) -> str:
    """Return what to load a posterior from: the one inside a run's folder, else the folder or repository itself."""
    folder = Path(name)
    if standing(folder / "posterior").is_dir():
        return str(folder / "posterior")
    if (folder / _FILE).exists():
        raise InputError(f"{folder} holds no posterior; finish its training with bayeslora train … --resume")
    return name


def recorded(options: object) -> dict[str, object]:
    """Return options as they are kept, local paths in full so that they hold from anywhere."""
    recorded = dict(vars(options))
    for key in ("model", "data"):
        if recorded.get(key) and Path(recorded[key]).exists():
            recorded[key] = str(Path(recorded[key]).resolve())
    return recorded
