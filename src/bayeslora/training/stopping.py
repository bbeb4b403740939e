"""When a run is saved and stopped from outside: by the clock, by Ctrl-C and by SIGTERM, which schedulers send."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from bayeslora.errors import InputError
from bayeslora.processes import sums

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class TimedCheckpoints(TrainerCallback):
    """Saves a checkpoint every so many minutes, in any Trainer, beside those of its ``save_strategy``.

    A checkpoint holds the adapter, its optimiser and what the method has learned; ``save_total_limit`` says how many
    are kept. With several processes the clock of the first one counts.

    Attributes:
        minutes: Minutes of wall time since the last checkpoint.

    Raises:
        InputError: If the minutes are not positive.
    """

    def __init__(self, minutes: float = 10.0) -> None:
        if not minutes > 0:
            raise InputError(f"the minutes between checkpoints must be positive, and they are {minutes}")
        self.minutes = minutes
        self._last = time.monotonic()

    def on_train_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_save(self, args: object, state: object, control: object, **_: object) -> None:
        """Start the clock anew."""
        self._last = time.monotonic()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Save if it is time."""
        due = state.is_world_process_zero and time.monotonic() - self._last >= 60 * self.minutes
        if in_any_process(due):
            control.should_save = True


@final
class Stop(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that came."""
        self.saved = False
        """Whether it ended the training."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals for the length of a ``with`` block, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, owner = {number: signal.getsignal(number) for number in SIGNALS}, os.getpid()

        def note(number: int, frame: FrameType | None) -> None:
            """Note that a signal came; a second one has its usual effect, as SIGTERM in a child has."""
            if os.getpid() != owner and number == signal.SIGINT:
                return  # a terminal sends it to workers too, which the first process still needs
            for each, handler in before.items():
                signal.signal(each, handler)
            if os.getpid() != owner:
                signal.raise_signal(number)
            self.signal = number

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
        """Save and stop if asked, in all processes at the same step."""
        if in_any_process(self.signal is not None):
            self.signal = self.signal or signal.SIGTERM
            self.saved = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
        """Save and stop if asked since the end of the step."""
        if not self.saved:
            self.on_step_end(args, state, control)


def in_any_process(flag: bool) -> bool:
    """Return whether a flag is set in any process of the run; all processes must ask."""
    return sums(torch.tensor([float(flag)]))[0] > 0
