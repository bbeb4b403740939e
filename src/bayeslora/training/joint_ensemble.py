"""Several members of an ensemble trained in one pass over the base.

The members' adapters lie side by side, and a batch holds each member's rows of this step, member after member. Each
has the start, the order of rows, the clipping and the optimiser state that it has in a run of its own, so the result is
that of separate runs up to rounding; with dropout the masks are others, from the same distribution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.params import Params, evaluating, lora_parameters, read, stack_across, write
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.memory import default_token_budget
from bayeslora.prediction.passes import Passes
from bayeslora.prediction.stacking import side_by_side
from bayeslora.training.rounds import MemberSampler
from bayeslora.training.trainer import Rows, TrainerRun, run_trainer

FOLDER = "together"
"""Where the joint run has its checkpoints, beside the members' folders."""

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimisers of the Trainer that treat each number by itself, so that members do not touch each other."""


def train_jointly(
    run: TrainerRun, starts: Sequence[Params], args: Sequence[TrainingArguments], *, resume: bool
) -> list[Params]:
    """Return the adapters that separate runs would give, each from its start and with its seeds, trained in one.

    ``run.args`` are the joint run's but for its folder; the model ends with the last member's adapter.
    """
    _check(run)
    seeds = [each.seed if each.data_seed is None else each.data_seed for each in args]
    sampler, max_grad_norm = MemberSampler(len(run.rows), seeds), run.args.max_grad_norm
    joint = copy.copy(run.args)
    joint.output_dir, joint.max_grad_norm = str(Path(args[0].output_dir).parent / FOLDER), 0.0

    def collate(rows: Sequence[Rows]) -> Batch:
        """Return a batch of the members' rows, member after member, or of rows that all members are to answer."""
        return run.readout.collate(
            [row[k] if isinstance(row, tuple) else row for k in range(len(starts)) for row in rows]
        )

    callbacks = [_MemberGradients(len(starts), max_grad_norm), *run.kwargs.get("callbacks", ())]
    with side_by_side(run.model, starts):
        joint_run = replace(run, args=joint, kwargs={**run.kwargs, "callbacks": callbacks})
        run_trainer(joint_run, resume=resume, sampler=sampler, collate=collate)
        trained = read(run.model)
    members = [{name: value[k] for name, value in trained.items()} for k in range(len(starts))]
    write(run.model, members[-1])
    return members


def _check(run: TrainerRun) -> None:
    """Refuse what would not be the same as separate runs."""
    model, readout, rows, args = run.model, run.readout, run.rows, run.args
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
class _MemberGradients(TrainerCallback):
    """Gives each of M members the gradient of its own mean loss, clipped by its own norm; 0 for no clipping."""

    def __init__(self, members: int, max_grad_norm: float) -> None:
        self.members, self.max_grad_norm = members, max_grad_norm
        self._params: list[nn.Parameter] = []

    def on_train_begin(self, args: object, state: object, control: object, *, model: nn.Module, **_: object) -> None:
        """Note the members' parameters."""
        self._params = list(lora_parameters(model).values())

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: object, state: object, control: object, **_: object) -> None:
        """Scale and clip."""
        grads = [p.grad for p in self._params if p.grad is not None]
        for grad in grads:
            grad.mul_(self.members)  # the loss is the mean over the rows of all members
        if not grads or not self.max_grad_norm:
            return
        squares = stack_across([grad.flatten(1).float().square().sum(1) for grad in grads])
        factor = (self.max_grad_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(factor.to(grad).view(-1, *[1] * (grad.ndim - 1)))
