"""A run of the stock Trainer on encoded examples, which goes on from its newest complete checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from accelerate import PartialState
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from bayeslora.errors import InputError, Interrupted
from bayeslora.methods.base import TrainerKwargs
from bayeslora.methods.checkpoints import CheckpointState
from bayeslora.methods.steps import FiniteSteps, guarded
from bayeslora.metrics.measures import measures
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.fused import fused
from bayeslora.prediction.readouts import Readout
from bayeslora.training.keys import Parts
from bayeslora.training.resuming import checkpoint_of
from bayeslora.training.rounds import IDLE, IGNORED, MemberSampler, WholeRounds
from bayeslora.training.stopping import Stop

SCORES = ("accuracy", "nll", "ece", "brier")
"""What the Trainer's evaluations measure, of the adapter as it is then."""

Rows = Encoded | tuple[Encoded, ...]
"""What a batch is made of: one example, or one for each member of a joint ensemble."""

_DISPLAY: ContextVar[type[TrainerCallback] | None] = ContextVar("_DISPLAY", default=None)


@dataclass(frozen=True)
class TrainerRun:
    """What the stock Trainer is given: the encoded examples, and ``kwargs``, among them ``compute_loss_func``."""

    model: nn.Module
    readout: Readout
    rows: Sequence[Encoded]
    held_out: Sequence[Encoded] | None
    args: TrainingArguments
    kwargs: TrainerKwargs
    settings: Parts | None = None  # what the run depends on, if it may be resumed


def run_trainer(
    run: TrainerRun,
    *,
    resume: bool = False,
    sampler: Sampler[tuple[int, ...]] | None = None,
    collate: Callable[[Sequence[Rows]], Batch] | None = None,
) -> None:
    """Train with the stock Trainer, or ``resume`` from the last checkpoint; signals save and raise `Interrupted`."""
    # evaluations measure `SCORES` but for adapters side by side; ``torch_compile`` compiles each layer by itself
    args, stop = adapted(run.args), Stop()
    checkpoint = checkpoint_of(args, run.settings) if resume else None
    callbacks = [*run.kwargs.get("callbacks", ()), stop, CheckpointState(run.settings)]
    kwargs = {**run.kwargs, "callbacks": guarded(callbacks)}
    whole = sampler is None and not args.batch_eval_metrics and args.eval_do_concat_batches
    if run.held_out and whole and "compute_metrics" not in kwargs:
        kwargs |= scoring(max(len(row.answers) for row in run.held_out))
    layers: AbstractContextManager[object] = nullcontext()
    if args.torch_compile:
        layers = compiled(run.model, args.torch_compile_backend, args.torch_compile_mode)
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    with run.readout.attached(run.model), fused(run.model), layers, stop.listening():
        trainer = _Trainer(
            model=run.model,
            args=args,
            train_dataset=_Rows(run.rows),
            eval_dataset=None if run.held_out is None else _Rows(run.held_out),
            data_collator=collate or run.readout.collate,
            **kwargs,
        )
        trainer.sampler, trainer.guard = sampler, kwargs["callbacks"][0]
        display = _DISPLAY.get()
        if display is not None and not args.disable_tqdm:
            trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            trainer.add_callback(display)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except RuntimeError:
            if stop.signal is None:  # else it reached a worker too, which loads rows
                raise
    if stop.signal is not None:
        where = f"with a checkpoint in {args.output_dir}" if stop.saved else "after the last checkpoint"
        raise Interrupted(f"stopped at step {trainer.state.global_step} {where}", stop.signal)


@contextmanager
def displayed_by(callback: type[TrainerCallback]) -> Iterator[None]:
    """Let a callback show the progress of all training in a ``with`` block, in the place of the Trainer's own."""
    token = _DISPLAY.set(callback)
    try:
        yield
    finally:
        _DISPLAY.reset(token)


def scoring(choices: int) -> TrainerKwargs:
    """Return what makes evaluations measure `SCORES`, of at most so many choices; 0: of equally many in all batches."""
    table = measures()

    def log_probs(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return a batch's log-probabilities, as many in each batch: minus infinity where there is no choice."""
        first = logits[0] if isinstance(logits, tuple) else logits
        missing = max(0, choices - first.shape[-1])
        return functional.pad(first.float().log_softmax(-1), (0, missing), value=-math.inf)

    def scores(evaluated: EvalPrediction) -> dict[str, float]:
        """Return the scores; NaN where the model's output is, which must not end the training."""
        log_p, labels = torch.as_tensor(evaluated.predictions), torch.as_tensor(evaluated.label_ids)
        if bool(log_p.isnan().any()):
            return dict.fromkeys(SCORES, math.nan)
        return {name: float(table[name].score(log_p, labels)) for name in SCORES}

    return {"compute_metrics": scores, "preprocess_logits_for_metrics": log_probs}


def adapted(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of the Trainer's arguments with what the readout and the machine need; refuse several GPUs."""
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process would split batches that belong together; start with accelerate launch, "
            "or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    changed = copy.copy(args)
    changed.remove_unused_columns = False
    changed.label_names = ["labels"]
    if not torch.cuda.is_available():
        changed.dataloader_pin_memory = False
    return changed


def refuse_fsdp(args: TrainingArguments, why: str) -> None:
    """Refuse to train a model that FSDP spreads over processes, since something needs it whole; ``why`` says what."""
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError(
            f"{why}, which a model that FSDP spreads over processes does not serve; train plain adapters (map) by FSDP "
            "and do the rest with the model loaded anew, or use DDP"
        )


@final
class _Trainer(Trainer):
    """The stock Trainer, which may take its rows in any order, shows a guard its losses, and ends a run only once."""

    sampler: Sampler[tuple[int, ...]] | None = None
    guard: FiniteSteps

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        """Let the guard see the loss, which a ``compute_loss_func`` has computed."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.guard.note(loss)
        return loss

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        """Save what is finite, whoever has asked for it."""
        self.guard.check(self.args, self.state, self.model, self.optimizer)
        super()._save_checkpoint(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the checkpoint that the run goes on from is its end: there the stock Trainer goes on."""
        stopped = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStoppingCallback)]
        if self.state.global_step >= self.state.max_steps or any(
            each.early_stopping_patience_counter >= each.early_stopping_patience > 0 for each in stopped
        ):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the state of the random numbers, and wait until all processes have: the checkpoint then is complete."""
        super()._save_rng_state(output_dir)
        PartialState().wait_for_everyone()

    def _get_train_sampler(self, *args: object, **kwargs: object) -> Sampler[Any] | None:
        """Return the sampler, or the Trainer's own, such that each row counts once in several processes."""
        stock: Sampler[int] | None = super()._get_train_sampler(*args, **kwargs)
        sampler: Any = stock if self.sampler is None else self.sampler
        if self.args.world_size == 1 or sampler is None or self.args.dataloader_drop_last:
            return sampler
        if isinstance(sampler, RandomSampler):  # in the order that accelerate gives it in one process
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=seed)
        idle = (IDLE,) * len(sampler.samplers) if isinstance(sampler, MemberSampler) else IDLE
        return WholeRounds(sampler, self.args.train_batch_size * self.args.world_size, idle)


@final
class _Rows(Dataset[Rows]):
    """Encoded examples as the Trainer wants them: one by its number, or one for each member of a joint ensemble."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, ...]) -> Rows:
        return self._row(index) if isinstance(index, int) else tuple(map(self._row, index))

    def _row(self, index: int) -> Encoded:
        """Return one row, or one that does not count."""
        return replace(self.rows[0], label=IGNORED) if index == IDLE else self.rows[index]
