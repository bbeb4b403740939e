"""Steps are looked at before they are taken, and evaluations on the way leave the training as it was.

A loss or gradient with a NaN or an infinity ends the run, or its step is left out: no parameter, no state of the
optimiser and none of a method changes. The device is waited for once a step.
"""

from __future__ import annotations

import logging
import math
import random
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from bayeslora.errors import InputError
from bayeslora.methods.checkpoints import CheckpointState
from bayeslora.methods.records import records
from bayeslora.params import check_finite, largest, non_finite
from bayeslora.processes import sums

logger = logging.getLogger(__name__)

OnNonFinite = Literal["stop", "skip"]
"""What is done about a step whose loss or gradient is not finite."""

SKIPPED = "skipped_steps"
"""How many steps were left out so far, in the Trainer's log."""


@final
class FiniteSteps(TrainerCallback):
    """Looks at loss and gradient before each optimiser step, and at all that is trained before each checkpoint.

    Every method gives one to its Trainer, first of its callbacks; another in its place changes what is done:
    ``kwargs["callbacks"][0] = FiniteSteps("skip")``, or ``bayeslora.fit(..., callbacks=[FiniteSteps("skip")])``.

    A step that is left out counts as one of the run's steps and moves its learning rate on; it is counted as
    ``skipped_steps`` in the Trainer's log, in which the loss of its interval is NaN. Under fp16 an overflow with a
    finite loss is left to the loss scaling as long as its scale is above 1.

    Args:
        on_non_finite: ``stop`` raises before the step is taken, ``skip`` leaves it out.
        max_in_a_row: Most steps in a row that are left out.
        max_share: Most steps that are left out in all, as a share of the run's; but ``max_in_a_row`` at least.

    Raises:
        InputError: If a setting has no meaning; in training, naming the step, if it is not finite and not to be left
            out.
    """

    def __init__(self, on_non_finite: OnNonFinite = "stop", max_in_a_row: int = 5, max_share: float = 0.1) -> None:
        if on_non_finite not in ("stop", "skip"):
            raise InputError(f"on_non_finite must be stop or skip, and it is {on_non_finite!r}")
        if max_in_a_row < 1 or not 0 <= max_share <= 1:
            raise InputError(
                f"max_in_a_row must be at least 1 and max_share in [0, 1]; they are {max_in_a_row}, {max_share}"
            )
        self.skips = on_non_finite == "skip"
        self.max_in_a_row, self.max_share = max_in_a_row, max_share
        self.skipped = self.in_a_row = self.since_log = 0
        self._losses: list[Tensor] = []
        self._detach: weakref.finalize[..., FiniteSteps] | None = None

    def note(self, loss: Tensor) -> None:
        """Take the loss of a batch of the step to come."""
        self._losses.append(loss.detach().float().reshape(()))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, *, model: nn.Module, **_: object
    ) -> None:
        """Go on counting, see to it that no NaN is logged as 0, and look at the losses that the model computes."""
        args.logging_nan_inf_filter = self.skips  # else one loss that was left out makes all later ones NaN
        self.skipped = max((int(entry.get(SKIPPED, 0)) for entry in state.log_history), default=0)
        self.in_a_row = self.since_log = 0
        this = weakref.ref(self)

        def look(module: nn.Module, inputs: object, outputs: object) -> None:
            """Note the loss of a training batch, if the model computes it."""
            callback, loss = this(), outputs.get("loss") if isinstance(outputs, Mapping) else None
            if callback is not None and isinstance(loss, Tensor) and loss.requires_grad:
                callback.note(loss)

        self._detach = weakref.finalize(self, model.register_forward_hook(look).remove)

    def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Stop looking."""
        if self._detach is not None:
            self._detach()

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Forget the losses of other passes."""
        self._losses = []

    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Let a finite step pass; leave another out, or stop."""
        optimizer, losses = kwargs["optimizer"], self._losses
        grads = [p.grad for p in _trained(optimizer) if p.grad is not None]
        size, self._losses = largest(grads), []
        loss = torch.stack([one.to(size.device) for one in losses]).sum() if losses else torch.zeros_like(size)
        size_of, loss_of = sums(torch.stack([size, loss]))
        if math.isfinite(size_of) and math.isfinite(loss_of):
            self.in_a_row = 0
            return
        scaler = getattr(optimizer, "scaler", None)
        overflow = math.isfinite(loss_of) and scaler is not None and scaler.get_scale() > 1
        what = f"step {state.global_step + 1} of {state.max_steps}: {_reason(loss_of, optimizer, kwargs['model'])}"
        if not (overflow or self.skips):
            raise InputError(
                f"{what}; the adapter is still that of the step before: lower the learning rate, look at the rows of "
                "this step, or leave such steps out with callbacks=[FiniteSteps('skip')]"
            )
        for p in _trained(optimizer):
            p.grad = None  # optimisers and methods pass over what has no gradient
        if overflow:
            logger.info("%s; left out, and fp16's loss scale is lowered", what)
            return
        self._count(what, state)

    def _count(self, what: str, state: TrainerState) -> None:
        """Count a step that is left out, in the log too, or stop at the bound."""
        self.skipped, self.in_a_row, self.since_log = self.skipped + 1, self.in_a_row + 1, self.since_log + 1
        state.log_history.append({"step": state.global_step + 1, SKIPPED: self.skipped})
        allowed = max(self.max_in_a_row, int(self.max_share * state.max_steps))
        if self.in_a_row > self.max_in_a_row or self.skipped > allowed:
            raise InputError(
                f"{what}; {self.in_a_row} such steps in a row and {self.skipped} in all are more than the "
                f"{self.max_in_a_row} and {allowed} that may be left out: lower the learning rate, or look at the rows"
            )
        logger.warning("%s; the step is left out, the %d. of at most %d", what, self.skipped, allowed)

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Show that steps were left out, and stop at a loss that could not be looked at before its step."""
        logs = kwargs.get("logs")
        if not isinstance(logs, dict) or "loss" not in logs:
            return
        if not self.skips and not math.isfinite(logs["loss"]):
            raise InputError(f"the loss logged at step {state.global_step} is {logs['loss']}; lower the learning rate")
        if self.since_log:
            left_out = {"loss": math.nan, SKIPPED: self.skipped}
            logs.update(left_out)
            state.log_history[-1].update(left_out)
            self.since_log = 0

    def check(self, args: object, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Make ready for a checkpoint; refuse if anything that is trained, or the optimiser's state, is not finite."""
        held = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        known = {id(p): name for name, p in model.named_parameters()}
        for p, values in getattr(optimizer, "state", {}).items():
            if isinstance(values, Mapping):
                whose = known.get(id(p), "a parameter")
                held |= {f"{k} of {whose}": v for k, v in values.items() if isinstance(v, Tensor)}
        if all(map(math.isfinite, sums(largest(held.values())[None]))):
            for record in records(model):
                if record.gather is not None:
                    record.gather(model)
            return
        check_finite(held, f"no checkpoint of step {state.global_step} is written")
        raise InputError(f"no checkpoint of step {state.global_step} is written: another process's is not finite")

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at what is about to be saved."""
        if control.should_save:
            self.check(args, state, kwargs["model"], kwargs["optimizer"])

    on_epoch_end = on_step_end

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at what may be the best so far, and be saved."""
        if args.save_strategy == SaveStrategy.BEST:
            self.check(args, state, kwargs["model"], kwargs["optimizer"])


def _trained(optimizer: Any) -> list[Tensor]:
    """Return the parameters of an optimiser."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _reason(loss: float, optimizer: Any, model: nn.Module) -> str:
    """Say in words what is not finite."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = non_finite(grads)
    gradient = "the gradient of another process is not finite"
    if bad:  # a gradient of NaN makes all others NaN when the Trainer clips them
        which = "of all parameters" if len(bad) == len(grads) > 1 else f"of {bad[0]}"
        gradient = f"the gradient {which} is not finite"
    before = non_finite({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    cause = f", since {before[0]} was not before" if before else ""
    return (gradient if math.isfinite(loss) else f"the loss is {loss}" + (f", and {gradient}" if bad else "")) + cause


def took_step(optimizer: Any) -> bool:
    """Say, before gradients are cleared, whether the optimiser has just taken a step or it was left out."""
    if "DeepSpeed" in type(optimizer).__name__:  # which has its gradients to itself
        return True
    taken = any(p.grad is not None for p in _trained(optimizer))
    return taken and not getattr(optimizer, "step_was_skipped", False)


@final
class EvaluationRandomness(TrainerCallback):
    """Puts the random numbers' generators back to where they were when an evaluation on the way began."""

    def __init__(self) -> None:
        self._put_back: Callable[[], None] | None = None

    def on_train_begin(self, args: TrainingArguments, state: object, control: object, **_: object) -> None:
        """Note the generators if training begins with an evaluation."""
        self._put_back = random_state() if args.eval_on_start else None

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Forget what was noted."""
        self._put_back = None

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
        """Note the generators if there will be an evaluation now."""
        if control.should_evaluate:
            self._put_back = random_state()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: object, state: object, control: object, **_: object) -> None:
        """Put them back."""
        if self._put_back is not None:
            self._put_back()

    def on_train_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Forget what was noted."""
        self._put_back = None


def random_state() -> Callable[[], None]:
    """Return what puts the generators of python, numpy and torch, on every device, back to where they are now."""
    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module: Any = torch.get_device_module() if torch.accelerator.is_available() else None
    everywhere = hasattr(module, "get_rng_state_all")
    device = None if module is None else module.get_rng_state_all() if everywhere else module.get_rng_state()

    def put_back() -> None:
        """Put them back."""
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(cpu)
        if device is not None:
            (module.set_rng_state_all if everywhere else module.set_rng_state)(device)

    return put_back


def guarded(callbacks: Iterable[TrainerCallback]) -> list[TrainerCallback]:
    """Return callbacks amid those that every run has, of each kind the one that was given last, or a new one."""
    given = list(callbacks)

    def last(kind: type[TrainerCallback]) -> TrainerCallback:
        """Return the one of a kind."""
        return next((one for one in reversed(given) if isinstance(one, kind)), None) or kind()

    others = [one for one in given if not isinstance(one, FiniteSteps | EvaluationRandomness | CheckpointState)]
    return [last(FiniteSteps), last(EvaluationRandomness), *others, last(CheckpointState)]
