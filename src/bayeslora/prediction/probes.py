"""What a model allows is found out by trying it on a few tokens, once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

logger = logging.getLogger(__name__)

_VERDICTS: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def tried(model: nn.Module, what: Hashable, trial: Callable[[], bool], *, needed: bool = False) -> bool:
    """Return the outcome of a trial with a model; it is made once and kept with the model.

    A lack of memory says nothing about the model: the trial is made again with the cache cleared, and if that does not
    help, the answer is no for this time and is not kept.

    Args:
        model: The model.
        what: What is tried, and all that the outcome depends on besides the model.
        trial: Tries it. An exception that says that shapes or arguments do not fit counts as a failure.
        needed: Whether there is no other way to go on without it: a lack of memory is then raised.

    Returns:
        Whether it can be done.

    Raises:
        RuntimeError: If memory does not suffice and the outcome is needed.
    """
    verdicts = _VERDICTS.setdefault(model, {})
    if what in verdicts:
        return verdicts[what]
    for again in (False, True):
        try:
            verdicts[what] = trial()
            return verdicts[what]
        except (ValueError, IndexError, TypeError, KeyError, AttributeError):
            verdicts[what] = False
            return False
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                verdicts[what] = False
                return False
            if needed and again:
                raise
        clear_device_cache(garbage_collection=True)
    logger.warning("memory does not suffice to try whether passes can be shared; they are made one by one this time")
    return False
