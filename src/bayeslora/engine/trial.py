"""What a model allows is found out by trying it on a few tokens, once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

from torch import nn

_VERDICTS: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def tried(model: nn.Module, what: Hashable, trial: Callable[[], bool]) -> bool:
    """Return the outcome of a trial with a model; it is made once and kept with the model.

    Args:
        model: The model.
        what: What is tried, and all that the outcome depends on besides the model.
        trial: Tries it. An exception that says that shapes or arguments do not fit counts as a failure.

    Returns:
        Whether it can be done.
    """
    verdicts = _VERDICTS.setdefault(model, {})
    if what not in verdicts:
        try:
            verdicts[what] = trial()
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError):
            verdicts[what] = False
    return verdicts[what]
