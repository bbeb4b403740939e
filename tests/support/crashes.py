"""Processes that die, or whose disk fails, at one of their operations on files."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bayeslora.posteriors import folder as storage

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym")
READS = ("open", "os.scandir", "os.listdir")


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its operations on files, the inodes that it synchronised, and what it raised."""

    operations: int
    synced: frozenset[int]
    error: str | None
    died: bool


def broken_off(action: Callable[[], object], root: Path, at: int, *, fails: bool = False) -> Outcome:
    """Do something in a child process that dies at operation ``at`` below a folder, or whose operation then fails.

    A file that is being written is left half written.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(action, root, at, fails, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = json.load(pipe)
    os.waitpid(child, 0)
    return Outcome(told["operations"], frozenset(told["synced"]), told["error"], told["died"])


def _child(action: Callable[[], object], root: Path, at: int, fails: bool, writer: int) -> NoReturn:
    """Do it, count operations, and tell."""
    count, synced, real_sync, real_save = 0, set[int](), os.fsync, vars(storage)["save_file"]
    watching = True

    def tell(error: str | None, *, died: bool) -> NoReturn:
        nonlocal watching
        watching = False
        os.write(
            writer, json.dumps({"operations": count, "synced": list(synced), "error": error, "died": died}).encode()
        )
        os._exit(0)

    def operation(before: Callable[[], object] = lambda: None) -> None:
        nonlocal count, watching
        count += 1
        if count != at:
            return
        watching = False
        before()
        if not fails:
            tell(None, died=True)
        watching = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not watching or (event not in CHANGES and event not in READS):
            return
        path = str(args[0])
        if event in CHANGES or path.startswith(str(root)) or not path.startswith("/"):
            operation()

    def sync(handle: int) -> None:
        operation()
        real_sync(handle)
        synced.add(os.fstat(handle).st_ino)

    def save(tensors: Any, path: Path, **options: Any) -> None:
        operation(lambda: path.write_bytes(b"half"))
        real_save(tensors, path, **options)

    vars(os)["fsync"], vars(storage)["save_file"] = sync, save
    sys.addaudithook(hook)
    try:
        action()
    except BaseException as error:
        tell(f"{type(error).__name__}: {error}", died=False)
    tell(None, died=False)


def power_cut(root: Path, kept: set[int], synced: frozenset[int]) -> None:
    """Take from the disk what was never synchronised: the content of files and folders that are new."""
    for folder, _, names in os.walk(root, topdown=False):
        for path in (Path(folder, name) for name in names):
            if path.stat().st_ino not in kept | synced:
                os.truncate(path, 0)
            if Path(folder).stat().st_ino not in kept | synced:
                path.unlink()


def inodes(root: Path) -> set[int]:
    """Return what is on the disk below a folder, and the folder."""
    return {path.stat().st_ino for path in (root, *root.rglob("*"))}
