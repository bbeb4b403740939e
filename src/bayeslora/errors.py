"""What the library raises when the caller can mend the cause."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence: what is wrong, where, what to do.

    The command line prints the message alone and exits with status 2.
    """


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user after a checkpoint was written; the same call with ``resume=True`` goes on."""
