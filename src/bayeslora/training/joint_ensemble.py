"""Several members of an ensemble trained in one pass over the base.

The members' adapters lie side by side, and a batch holds each member's rows of this step, member after member. Each
has the start, the order of rows, the clipping and the optimiser state that it has in a run of its own, so the result is
that of separate runs up to rounding; with dropout the masks are others, from the same distribution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.params import Params, evaluating, lora_parameters, read, write
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.memory import default_token_budget
from bayeslora.prediction.passes import Passes
from bayeslora.prediction.readouts import Readout
from bayeslora.prediction.stacking import side_by_side

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimisers of the Trainer that treat each number by itself, so that members do not touch each other."""


def train_together(
    model: nn.Module,
    readout: Readout,
    rows: Sequence[Encoded],
    starts: Sequence[Params],
    args: Sequence[TrainingArguments],
    train: Callable[[TrainingArguments, Lanes], object],
) -> list[Params]:
    """Return the adapters that separate runs would give, trained in one.

    Args:
        model: PEFT model; it ends with the last member's adapter.
        readout: How answers are read.
        rows: The training examples.
        starts: Where each of the M members starts.
        args: Each member's arguments; they differ in seeds and folders.
        train: Trains the model with the arguments and the data order that it is given.

    Returns:
        Each member's parameters.

    Raises:
        InputError: If the model, the readout, the optimiser or the precision does not allow it.
    """
    _check(model, readout, rows, args[0])
    seeds = [own.seed if own.data_seed is None else own.data_seed for own in args]
    lanes = Lanes(len(rows), seeds, args[0].max_grad_norm)
    joint = copy.copy(args[0])
    joint.output_dir, joint.max_grad_norm = str(Path(args[0].output_dir).parent / "together"), 0.0
    with side_by_side(model, starts):
        train(joint, lanes)
        trained = read(model)
    members = [{name: value[k] for name, value in trained.items()} for k in range(len(starts))]
    write(model, members[-1])
    return members


def _check(model: nn.Module, readout: Readout, rows: Sequence[Encoded], args: TrainingArguments) -> None:
    """Refuse what would not be the same as separate runs."""
    optimiser = getattr(args.optim, "value", args.optim)
    if optimiser not in ELEMENTWISE:
        raise InputError(
            f"members cannot share a pass with the optimiser {optimiser}, which looks across parameters; use one of "
            f"{', '.join(ELEMENTWISE)}, or together=False"
        )
    if args.fp16:
        raise InputError("members cannot share a pass with fp16's loss scaling; use bf16, or together=False")
    if args.train_sampling_strategy != "random":
        raise InputError(
            f"members that share a pass need train_sampling_strategy='random', and it is "
            f"{args.train_sampling_strategy!r}; change it, or use together=False"
        )
    if not readout.shared and any(len(answer) > 1 for row in rows for answer in row.answers):
        raise InputError(
            "on this model the choices do not share their prompt's pass, so members cannot share one either; use "
            "together=False"
        )
    names, classes = frozenset(lora_parameters(model)), max((len(row.answers) for row in rows), default=0)
    passes = Passes(model, readout, rows, classes, default_token_budget(model), lambda _: None)
    with torch.inference_mode(), evaluating(model), readout.attached(model):
        apart = passes.stacks(names, share=False, needed=True)
    if not apart:
        raise InputError(
            "a trial showed that this model does not keep the rows of a batch apart, or has adapters outside of linear "
            "layers, so members cannot share a pass; use together=False"
        )


@final
class Lanes(torch.utils.data.Sampler[tuple[int, ...]]):
    """The rows of each step for several members: the order that each has in a run of its own.

    Args:
        rows: Number of training examples.
        seeds: The seed of each member's order.
        max_grad_norm: Largest norm of a member's gradient; 0 for any.
    """

    def __init__(self, rows: int, seeds: Sequence[int], max_grad_norm: float) -> None:
        self.own = [SeedableRandomSampler(range(rows), data_seed=seed) for seed in seeds]
        self.max_grad_norm = max_grad_norm

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Yield the number of a row for each member."""
        yield from zip(*self.own, strict=True)

    def __len__(self) -> int:
        return len(self.own[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the orders of an epoch."""
        for sampler in self.own:
            sampler.set_epoch(epoch)

    def collator(self, collate: Callable[[Sequence[Encoded]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """Return what makes a batch of the members' rows, or of rows that all members are to answer.

        Args:
            collate: Makes a batch of examples.

        Returns:
            The function for the Trainer.
        """

        def joint(found: list[Any]) -> dict[str, Any]:
            """Return a batch, member after member."""
            apart = isinstance(found[0], tuple)
            return collate([rows[k] if apart else rows for k in range(len(self.own)) for rows in found])

        return joint

    def callback(self) -> TrainerCallback:
        """Return what keeps the members' gradients apart."""
        return _OwnGradients(len(self.own), self.max_grad_norm)


@final
class _OwnGradients(TrainerCallback):
    """Gives each member the gradient of its own mean loss, clipped by its own norm.

    Args:
        members: Number M of members. The loss is the mean over all rows, so a member's own is M times its part.
        max_grad_norm: Largest norm of a member's gradient; 0 for any.
    """

    def __init__(self, members: int, max_grad_norm: float) -> None:
        self.members, self.max_grad_norm = members, max_grad_norm
        self._own: list[nn.Parameter] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the members' parameters."""
        self._own = list(lora_parameters(kwargs["model"]).values())

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scale and clip."""
        grads = [p.grad for p in self._own if p.grad is not None]
        for grad in grads:
            grad.mul_(self.members)
        if not self.max_grad_norm:
            return
        squares = torch.stack([grad.flatten(1).float().square().sum(1) for grad in grads])
        factor = (self.max_grad_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(factor.to(grad).view(-1, *[1] * (grad.ndim - 1)))
