"""What a model allows is found out by trying it on a few tokens, once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

from accelerate.utils.memory import clear_device_cache
from torch import nn

from bayeslora.prediction.memory import lacks_memory

logger = logging.getLogger(__name__)

_VERDICTS: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def tried(model: nn.Module, what: Hashable, trial: Callable[[], bool], *, needed: bool = False) -> bool:
    """Return the outcome of a trial, made once for each model and ``what``, which names all that it depends on."""
    # An exception that says that shapes or arguments do not fit is a failure. A lack of memory says nothing about the
    # model: the trial is made again with the cache cleared, and if that does not help, the answer is no for this time
    # and is not kept, or, where the outcome is needed to go on, the error is raised.
    verdicts = _VERDICTS.setdefault(model, {})
    if what in verdicts:
        return verdicts[what]
    verdict: bool | None
    for again in (False, True):
        try:
            verdict = trial()
        except (ValueError, IndexError, TypeError, KeyError, AttributeError):
            verdict = False
        except RuntimeError as error:
            if needed and again and lacks_memory(error):
                raise
            verdict = None if lacks_memory(error) else False
        if verdict is not None:
            verdicts[what] = verdict
            return verdict
        clear_device_cache(garbage_collection=True)
    logger.warning("memory does not suffice to try whether passes can be shared; they are made one by one this time")
    return False
