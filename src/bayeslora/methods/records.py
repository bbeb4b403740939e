"""What a run remembers between its training and its posterior, kept per model for as long as the model lives."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn
from transformers import TrainerCallback

from bayeslora.errors import InputError
from bayeslora.params import require_lora


@dataclass
class Record:
    """What a training run leaves behind for `Method.posterior`."""

    method: str
    num_data: int
    learned: Any = None  # what the method needs, in its own type
    undo: Callable[[nn.Module], None] | None = None  # takes out what the run put into the model
    gather: Callable[[nn.Module], None] | None = None  # in all processes, before one of them saves
    save: Callable[[Path, Any], None] | None = None  # writes what was learned into a checkpoint of a run

    def clear(self, model: nn.Module) -> None:
        """Take out what the run put into the model; once."""
        undo, self.undo, self.gather, self.save = self.undo, None, None, None
        if undo is not None:
            undo(model)


_RECORDS: weakref.WeakKeyDictionary[nn.Module, dict[str, Record]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, record: Record) -> None:
    """Keep the record of a run that begins, clear what earlier ones left that broke off, and unpack a 4-bit base."""
    _unpack_for_training(model)
    records = _RECORDS.setdefault(model, {})
    for earlier in records.values():
        if earlier is not record:
            earlier.clear(model)
    records[record.method] = record


def records(model: nn.Module) -> list[Record]:
    """Return the records of the last runs of all methods on a model."""
    return list(_RECORDS.get(model, {}).values())


def recall(model: nn.Module, method: str) -> Record | None:
    """Return the record of the last run of a method on a model; None if there was no run."""
    return _RECORDS.get(model, {}).get(method)


def require_record(model: nn.Module, method: str) -> Record:
    """Return the record of the last run of a method on a model, or refuse."""
    record = recall(model, method)
    if record is None:
        raise InputError(
            f"this model was not trained with {method}: pass **method.trainer_kwargs(model, num_data) to its Trainer, "
            "train, and ask for method.posterior(trainer.model)"
        )
    return record


def check_num_data(num_data: int) -> int:
    """Return the number of training examples N, or refuse what is not a positive whole number."""
    if not isinstance(num_data, int) or num_data < 1:
        raise InputError(f"num_data must be the number of training examples, at least 1, and it is {num_data!r}")
    return num_data


def _unpack_for_training(model: nn.Module) -> None:
    """Undo bitsandbytes' packing of 4-bit weights on the CPU, and keep it from packing them again."""
    # ``Linear4bit`` packs its weight at the first pass in evaluation mode, where the CPU has bfloat16 instructions, and
    # a product with a packed weight has no gradient: the layers below would silently stop learning.
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # saving unpacks in place


@final
class Recorder(TrainerCallback):
    """Puts a run on record when it begins, under the model that the Trainer really trains."""

    def __init__(self, method: str, num_data: int) -> None:
        self.record = Record(method, check_num_data(num_data))

    def on_train_begin(self, args: object, state: object, control: object, *, model: nn.Module, **_: object) -> None:
        """Check that the model has a LoRA adapter, and keep the record."""
        remember(require_lora(model), self.record)
