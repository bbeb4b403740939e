"""How progress is shown: by a bar, or as a program that uses the library wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

Done = Callable[[int], object]
"""Is told how many more rows are done."""
Display = Callable[[str, int], AbstractContextManager[Done]]
"""Shows something by its name and its number of rows, for the length of a ``with`` block."""


@contextmanager
def bar(name: str, total: int) -> Iterator[Done]:
    """Show a bar with the time left."""
    with tqdm(total=total, desc=name, unit="row", dynamic_ncols=True) as shown_bar:
        yield shown_bar.update


_DISPLAY: ContextVar[Display] = ContextVar("display", default=bar)


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Let something else show all progress of a ``with`` block."""
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)


@contextmanager
def shown(name: str, total: int, wanted: bool) -> Iterator[Done]:
    """Show progress if it is wanted."""
    if not wanted:
        yield lambda count: None
        return
    with _DISPLAY.get()(name, total) as done:
        yield done
