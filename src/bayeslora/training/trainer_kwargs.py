"""A method's arguments for Trainers that take fewer than the stock one, as some of TRL's do."""

from __future__ import annotations

import inspect

from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import Inference, TrainerKwargs
from bayeslora.params import require_lora


def kwargs_for(trainer: type, method: Inference, model: nn.Module, num_data: int) -> TrainerKwargs:
    """Return what `Method.trainer_kwargs` returns, in the form that a class of Trainers takes.

    TRL's DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer compute their own loss, and take an optimiser where the
    stock Trainer takes the class of one. For the stock Trainer, SFTTrainer and RewardTrainer nothing changes.

    Args:
        trainer: The class of the Trainer, ``DPOTrainer`` for example.
        method: How to train.
        model: The model that the Trainer will train.
        num_data: Number of training examples N; pairs where the Trainer compares two answers.

    Returns:
        Keyword arguments of the Trainer.

    Raises:
        InputError: If the method adds a term to the loss and the Trainer has no place for it, or the method brings its
            own optimiser and the model has no adapter yet.
    """
    kwargs = method.trainer_kwargs(model, num_data)
    known = inspect.signature(trainer).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return kwargs
    if "compute_loss_func" in kwargs and "compute_loss_func" not in known:
        raise InputError(
            f"{method.name} adds a KL term to the loss, and {trainer.__name__} computes a loss of its own; use kl=0"
        )
    if "optimizer_cls_and_kwargs" in kwargs and "optimizer_cls_and_kwargs" not in known:
        kind, settings = kwargs.pop("optimizer_cls_and_kwargs")
        trained = [p for p in require_lora(model).parameters() if p.requires_grad]
        kwargs["optimizers"] = (kind(trained, **settings), None)
    return kwargs
