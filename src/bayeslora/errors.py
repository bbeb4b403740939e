"""What the library raises when the caller can mend the cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from signal import SIGINT


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence: what is wrong, where, what to do.

    The command line prints the message alone and exits with status 2.
    """


class SharedError(InputError):
    """What one process of a run has refused, raised in all of them."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a checkpoint was written; the same call with ``resume=True`` goes on.

    Attributes:
        signal: Number of the signal: ``SIGINT`` (Ctrl-C) or ``SIGTERM``.
    """

    def __init__(self, message: str, signal: int = SIGINT) -> None:
        super().__init__(message)
        self.signal = signal


def close_matches(word: str, known: Iterable[str], otherwise: str | None = None, also: str = "") -> str:
    """Suggest close matches for an unknown name; without any say ``otherwise``, None for a list of all known names."""
    every = list(known)
    close = difflib.get_close_matches(word, every, n=3)
    if close:
        return f"did you mean {' or '.join(close)}{also}?"
    return (f"known: {', '.join(every)}" if otherwise is None else otherwise) + also


def listed(names: Iterable[object]) -> str:
    """Return names for a message, neither too many nor too long."""
    every = [" ".join(str(name).split()) for name in names]
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in every[:20]]
    return ", ".join(shown + ["…"] * (len(every) > 20))
