"""What a run remembers between its training and its posterior, kept per model and in the run's checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.methods.guards import unpack_for_training
from bayeslora.params import require_lora


@dataclass
class Record:
    """What a training run leaves behind for `Method.posterior`.

    Attributes:
        method: Name of the method that trained.
        num_data: Number of training examples N.
        kept: What the method needs, in its own type.
        undo: Takes out what the run put into the model; None if it put nothing there.
    """

    method: str
    num_data: int
    kept: dict[Any, Any] = field(default_factory=dict)
    undo: Callable[[], None] | None = None

    def clear(self) -> None:
        """Take out what the run put into the model; once."""
        undo, self.undo = self.undo, None
        if undo is not None:
            undo()


_RECORDS: weakref.WeakKeyDictionary[nn.Module, dict[str, Record]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, record: Record) -> None:
    """Keep the record of a run that begins for as long as the model lives, and make the model ready for it.

    What earlier runs left that broke off is cleared, and a 4-bit base that was packed for inference is unpacked.

    Args:
        model: The model in training.
        record: What to keep; it replaces an earlier record of the same method.
    """
    unpack_for_training(model)
    records = _RECORDS.setdefault(model, {})
    for earlier in records.values():
        if earlier is not record:
            earlier.clear()
    records[record.method] = record


def recall(model: nn.Module, method: str) -> Record | None:
    """Return the record of the last run of a method on a model.

    Args:
        model: The model that was trained.
        method: Name of the method.

    Returns:
        The record; None if there was no run.
    """
    return _RECORDS.get(model, {}).get(method)


def require_record(model: nn.Module, method: str) -> Record:
    """Return the record of the last run of a method on a model, or refuse.

    Args:
        model: The model that was trained.
        method: Name of the method.

    Returns:
        The record.

    Raises:
        InputError: If there was no run.
    """
    record = recall(model, method)
    if record is None:
        raise InputError(
            f"this model was not trained with {method}: pass **method.trainer_kwargs(model, num_data) to its Trainer, "
            "train, and ask for method.posterior(trainer.model)"
        )
    return record


def check_num_data(num_data: int) -> int:
    """Return the number of training examples, or refuse it.

    Args:
        num_data: Number of training examples N.

    Returns:
        The same number.

    Raises:
        InputError: If it is not a positive whole number.
    """
    if not isinstance(num_data, int) or num_data < 1:
        raise InputError(f"num_data must be the number of training examples, at least 1, and it is {num_data!r}")
    return num_data


@final
class Recorder(TrainerCallback):
    """Puts a run on record when it begins, under the model that the Trainer really trains.

    Args:
        method: Name of the method.
        num_data: Number of training examples N.
    """

    def __init__(self, method: str, num_data: int) -> None:
        self.record = Record(method, check_num_data(num_data))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the model has a LoRA adapter, and keep the record."""
        remember(require_lora(kwargs["model"]), self.record)


def checkpoint_file(args: TrainingArguments, state: TrainerState, name: str) -> Path:
    """Return a file of a method's own in the checkpoint of the present step.

    Args:
        args: The Trainer's arguments.
        state: The Trainer's state.
        name: Name of the file.

    Returns:
        Its path; the checkpoint's folder is there while it is saved or resumed.
    """
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / name
