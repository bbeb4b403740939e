"""The base of the callbacks by which a method learns a spread: float32, a record of the run, a file in checkpoints.

Steps at the small rates at which a spread is learned are lost in bfloat16, into which TRL casts the adapters of 8- and
4-bit bases; and PEFT reads a checkpoint into new float32 parameters, which the optimiser would not know. So the adapter
is put into float32 when the Trainer is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.files import atomic_file
from bayeslora.methods.records import Record, check_num_data, remember, require_record
from bayeslora.params import Params, check_finite, lora_parameters, require_lora

HALF = (torch.float16, torch.bfloat16)
"""Types that are put into float32."""


@dataclass(frozen=True)
class Run:
    """What a Trainer tells its callbacks: its arguments, its state, and the objects that it trains with."""

    args: TrainingArguments
    state: TrainerState
    model: PeftModel
    optimizer: Any
    scheduler: object
    loader: object

    @classmethod
    def of(cls, args: TrainingArguments, state: TrainerState, told: Mapping[str, Any]) -> Run:
        """Return the run that an event belongs to, or refuse a model without a LoRA adapter."""
        model = require_lora(told["model"])
        return cls(args, state, model, told.get("optimizer"), told.get("lr_scheduler"), told.get("train_dataloader"))


class MethodCallback(TrainerCallback, ABC):
    """What a method does inside a Trainer."""

    name: ClassVar[str]
    title: ClassVar[str]  # the method's name in messages
    file: ClassVar[str]  # what it writes into checkpoints

    def __init__(self, num_data: int) -> None:
        self.num_data = check_num_data(num_data)

    @abstractmethod
    def begin(self, run: Run) -> Record:
        """Make the model ready, go on from a checkpoint if the run does (`resume`), and return the run's record."""

    @abstractmethod
    def save(self, path: Path, run: Run) -> None:
        """Write what was learned beside the adapter into a checkpoint, where the run needs it."""

    def gather(self, model: nn.Module) -> None:
        """Note what is spread over processes, which all are here, before one of them saves it: nothing as a rule."""

    @abstractmethod
    def end(self, run: Run) -> None:
        """Do what comes after the last step, when nothing of the method is in the model any more."""

    def on_init_end(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Put the adapter into float32, before an optimiser knows it or a checkpoint is read into it."""
        widen(kwargs.get("model"), kwargs.get("optimizer"))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Begin, and put the run on record under the model that the Trainer really trains."""
        run = Run.of(args, state, kwargs)
        record = self.begin(run)
        record.gather, record.save = self.gather, self._save
        remember(run.model, record)

    def _save(self, folder: Path, run: Run) -> None:
        """Write into a checkpoint, which is not complete yet."""
        self.save(folder / self.file, run)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Take out of the model what the run put there, and end."""
        run = Run.of(args, state, kwargs)
        require_record(run.model, self.name).clear(run.model)
        self.end(run)

    def resume(self, run: Run, load: Callable[[Path], None]) -> None:
        """Load what `save` wrote into the checkpoint that the run goes on from, or refuse."""
        path = checkpoint_file(run.args, run.state, self.file)
        try:
            load(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint has no readable {path}, which {self.title} needs to go on; resume from an earlier "
                "checkpoint"
            ) from error

    def read_best(self, run: Run) -> Params | None:
        """Return what was learned in the best checkpoint, if the Trainer has put its adapter into the model."""
        if not run.args.load_best_model_at_end or run.state.best_model_checkpoint is None:
            return None
        PartialState().wait_for_everyone()  # the first process may still be writing
        folder = Path(run.state.best_model_checkpoint)
        if not any((folder / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            return None
        path = folder / self.file
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the best checkpoint has no readable {path}, which holds the spread that {self.title} had learned "
                "there; train with load_best_model_at_end=False, or from the start"
            ) from error


def checkpoint_file(args: TrainingArguments, state: TrainerState, name: str) -> Path:
    """Return a method's file in the present step's checkpoint, whose folder is there while it is saved or resumed."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / name


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, at once or not at all."""
    check_finite(tensors, f"{path} is not written")
    with atomic_file(path) as partial:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, partial, metadata)


def widen(model: nn.Module | None, optimizer: object = None) -> None:
    """Put the trained LoRA parameters of a model into float32, in place, if no step was taken with them yet."""
    # whole modules that are trained (a head) do not cast their input as LoRA layers do, and stay as they are
    if not isinstance(model, PeftModel) or getattr(getattr(optimizer, "optimizer", optimizer), "state", None):
        return
    for name, p in lora_parameters(model).items():
        if "lora_" in name and p.requires_grad and p.dtype in HALF and type(p) in (nn.Parameter, Tensor):
            p.data = p.data.float()
