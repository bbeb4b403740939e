"""The spread that belongs to the best checkpoint, where a Trainer ends with that one's adapter.

With ``load_best_model_at_end`` the Trainer puts the adapter of its best checkpoint into the model before it ends. What
a method has learned besides is then of a later step, and is read from the same checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.files import atomic_file


def best_checkpoint(args: TrainingArguments, state: TrainerState) -> Path | None:
    """Return the checkpoint whose adapter the Trainer has put into the model; to be asked when training ends.

    Args:
        args: The Trainer's arguments.
        state: The Trainer's state.

    Returns:
        Its folder; None if the model is in its last state: where that was not asked for, nothing was evaluated, or the
        checkpoint is gone, which the Trainer says in its log.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    PartialState().wait_for_everyone()  # the first process may still be writing
    folder = Path(state.best_model_checkpoint)
    return folder if any((folder / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)) else None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, at once or not at all.

    Args:
        path: The file.
        tensors: What to write.
    """
    with atomic_file(path) as partial:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, partial)


def read_best(path: Path, method: str) -> dict[str, Tensor]:
    """Return what a method wrote into the best checkpoint.

    Args:
        path: The file.
        method: The method's name, for the message.

    Returns:
        The tensors, on the CPU.

    Raises:
        InputError: If they cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the best checkpoint has no readable {path}, which holds the spread that {method} had learned there; "
            "train with load_best_model_at_end=False, or from the start"
        ) from error
