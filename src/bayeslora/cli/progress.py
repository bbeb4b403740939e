"""Progress of training and fits: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from bayeslora.cli.terminal import say, watched
from bayeslora.prediction.progress import Done, bar, shown_by
from bayeslora.training.trainer import displayed_by

LINE_SECONDS = 10.0
"""Least time between two lines about the same thing."""


@contextmanager
def own_progress() -> Iterator[None]:
    """Show our progress in the place of the Trainer's, and no bars for what takes a second."""
    bars, mapping_bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()  # its import took back the level that `terminal.quiet` sets and restores
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with displayed_by(Progress), shown_by(bar if watched() else lines):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if mapping_bars:
            datasets.enable_progress_bars()


@contextmanager
def lines(name: str, total: int) -> Iterator[Done]:
    """Print a line at most every `LINE_SECONDS` while something goes on, with the time left."""
    began = last = time.monotonic()
    rows = 0

    def done(count: int) -> None:
        """Go on by so many rows."""
        nonlocal last, rows
        rows, now = rows + count, time.monotonic()
        if now - last >= LINE_SECONDS and rows < total:
            say(f"  {name}: {rows} of {total} rows, {(now - began) / rows * (total - rows):.0f} s left")
            last = now

    yield done


@final
class Progress(TrainerCallback):
    """Takes the place of the Trainer's own display: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)
        self.began, self.first = 0.0, 0

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Begin at the step that training goes on from."""
        self.began, self.first = time.monotonic(), state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit=" steps",
            dynamic_ncols=True,
            disable=not watched(),
        )

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Go on by a step."""
        self.bar.update()

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: object,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the loss."""
        losses = {k: f"{float(v):.3f}" for k, v in (logs or {}).items() if k in ("loss", "eval_loss")}
        if not losses or not self.began:
            return
        if watched():
            self.bar.set_postfix(losses)
            return
        done = max(1, state.global_step - self.first)
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step)
        text = ", ".join(f"{key.replace('_', ' ')} {loss}" for key, loss in losses.items())
        say(f"  step {state.global_step} of {state.max_steps}, {text}, {left:.0f} s left")

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Leave the bar as it is."""
        self.bar.close()
