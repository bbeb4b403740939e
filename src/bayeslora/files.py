"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bayeslora.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside the file that takes the file's place when the block ends well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        if partial.exists():
            partial.unlink()


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the target's place when the block ends well, and vanishes otherwise."""
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise InputError(f"{target} is there already; choose another folder or pass overwrite=True")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from error
    try:
        work.chmod(0o755)
        yield work
        _take_place(work, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target} could not be written, and nothing of it was kept: {reason}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object of a posterior's folder; ``missing`` is the message where the file is not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(missing) from error
    except (OSError, ValueError) as error:
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


def _take_place(work: Path, target: Path) -> None:
    """Move a folder into the place of the target; the old target goes after that, and stays if the move fails."""
    if not target.exists():
        os.replace(work, target)
        return
    old = work.with_name(work.name + "-old")
    os.replace(target, old)
    try:
        os.replace(work, target)
    except OSError:
        os.replace(old, target)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()
