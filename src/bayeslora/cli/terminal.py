"""What a run shows: our own words, and none of the notices that other libraries give to programmers."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from bayeslora.cli.launch import is_first

NOISY = ("transformers", "peft", "datasets", "accelerate", "bitsandbytes", "kernels", "torchao", "httpx", "lm_eval")
"""Libraries of which only errors are shown."""
HIDDEN: tuple[type[Warning], ...] = (FutureWarning, DeprecationWarning)
"""Categories of warnings that are for programmers, wherever they come from."""


def say(line: str) -> None:
    """Print one line about what goes on, on standard error: standard output is for results."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def watched() -> bool:
    """Return whether somebody looks on, so that bars make sense."""
    return is_first() and sys.stderr.isatty()


@contextmanager
def quiet() -> Iterator[None]:
    """Show this library's messages and only errors of others, which need not be imported yet."""
    own, handler = logging.getLogger("bayeslora"), logging.StreamHandler()
    levels = {own: logging.INFO} | {logging.getLogger(name): logging.ERROR for name in NOISY}
    before = {logger: logger.level for logger in levels}
    with warnings.catch_warnings():
        for category in HIDDEN:
            warnings.simplefilter("ignore", category)
        for category in (UserWarning, RuntimeWarning):
            warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(NOISY)}|torch)(\.|$)")
        try:
            if is_first():
                own.addHandler(handler)
            for logger, level in levels.items():
                logger.setLevel(level)
            yield
        finally:
            own.removeHandler(handler)
            for logger, level in before.items():
                logger.setLevel(level)
