"""Files and folders that appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from bayeslora.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside the file that takes the file's place when the block ends well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        _make(path.parent)
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes the target's place when the block ends well, and vanishes otherwise."""
    # At every moment the old folder or the new one is there, whole, also after a power cut: under its name, or where
    # the system cannot exchange two names, as what `standing` returns. What killed processes left is removed.
    try:
        _make(target.parent)
        with _locked(target.parent):
            _tidy(target)
            _refuse(target, overwrite)
        work, lock = _begun(target)
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from error
    try:
        work.chmod(0o755)
        yield work
        for folder, _, names in os.walk(work, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        with _locked(target.parent):
            _refuse(target, overwrite)  # another process may have been faster
            _take_place(work, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target} could not be written, and nothing of it was kept: {reason}") from error
    finally:
        _remove(work)
        _unlock(lock)


def standing(folder: Path) -> Path:
    """Return a folder, or the old one under its other name where the process that replaced it was killed."""
    return _former(folder) if _former(folder).is_dir() and not os.path.lexists(folder) else folder


def undisturbed(folder: Path, read: Callable[[Path], T]) -> T:
    """Return what is read from a folder, all of it from the same one: anew where another took its place meanwhile."""
    while True:
        place = standing(folder)
        before = _identity(place)
        try:
            result = read(place)
        except InputError:
            if _identity(place) == before:
                raise
        else:
            if _identity(place) == before:
                return result


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another of its name; None where there is none."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _refuse(target: Path, overwrite: bool) -> None:
    """Refuse a target that is there, unless it is an empty folder or may be replaced."""
    if not overwrite and target.exists() and (target.is_file() or any(target.iterdir())):
        raise InputError(f"{target} is there already; choose another folder or pass overwrite=True")


def _begun(target: Path) -> tuple[Path, int | None]:
    """Return a new folder beside the target, and its lock, by which `_tidy` knows that its process lives."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
        lock = _lock(work)
        if work.exists():  # else another process took it for a left-over, before it was locked
            return work, lock
        _unlock(lock)


def _tidy(target: Path) -> None:
    """Put the target back where a replacement of it broke off, and remove what killed processes left beside it."""
    former = _former(target)
    if os.path.lexists(former):
        if os.path.lexists(target):
            _remove(former)
        else:
            os.replace(former, target)
    for left in target.parent.glob(f".{glob.escape(target.name)}-*.partial"):
        if left.is_symlink() or not left.is_dir():  # what an exchange left
            _remove(left)
        elif (lock := _lock(left, wait=False)) is not None:
            _remove(left)
            _unlock(lock)


def _take_place(work: Path, target: Path) -> None:
    """Move a folder into the place of the target, whose old content goes when the new one is on the disk."""
    former = _former(target)
    if not os.path.lexists(target):
        os.replace(work, target)
    elif not _exchange(work, target):
        os.replace(target, former)
        try:
            os.replace(work, target)
        except OSError:
            os.replace(former, target)
            raise
    _sync(target.parent)
    if os.path.lexists(former):
        _remove(former)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange what two names stand for in one step; False where the system or the file system cannot."""
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return ctypes.CDLL(None).renamex_np(first, second, 2) == 0  # RENAME_SWAP
        if sys.platform == "linux":
            return ctypes.CDLL(None).renameat2(-100, first, -100, second, 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:  # a C library without it
        pass
    return False


def _former(target: Path) -> Path:
    """Return the name that a folder has for the moment between two renames."""
    return target.with_name(f".{target.name}.former")


def _make(folder: Path) -> None:
    """Make a folder, and those that it lies in, so that a power cut does not take them away."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in new:
        _sync(each.parent)


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk itself."""
    if path.is_dir():
        with suppress(OSError):  # some systems do not open folders, or do not serve them
            _flush(path, os.O_RDONLY)
    else:
        _flush(path, os.O_RDWR)


def _flush(path: Path, mode: int) -> None:
    """Open a file or folder and have it written to the disk."""
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process replaces anything in a folder; where there are no locks, go on."""
    lock = _lock(folder)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, wait: bool = True) -> int | None:
    """Return a handle that locks a folder until it is closed; None where another has it, or there are no locks."""
    if fcntl is None:
        return None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            os.close(handle)
    return None


def _unlock(handle: int | None) -> None:
    """Close the handle of a lock."""
    if handle is not None:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or link itself, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
