"""A run of the stock Trainer on encoded examples, which Ctrl-C ends with a checkpoint."""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import get_last_checkpoint

from bayeslora.errors import InputError, Interrupted
from bayeslora.methods.base import TrainerKwargs
from bayeslora.methods.steps import FiniteSteps, guarded
from bayeslora.metrics.measures import measures
from bayeslora.prediction.batching import Batch
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.readouts import Readout

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


def run_trainer(
    run: TrainerRun,
    *,
    resume: bool = False,
    sampler: Sampler[tuple[int, ...]] | None = None,
    collate: Callable[[Sequence[Rows]], Batch] | None = None,
) -> None:
    """Train with the stock Trainer, or ``resume`` from the last checkpoint; Ctrl-C saves and raises `Interrupted`."""
    # evaluations measure `SCORES` but for adapters side by side; ``torch_compile`` compiles each layer by itself
    args, stop = adapted(run.args), _Stop()
    kwargs = {**run.kwargs, "callbacks": guarded([*run.kwargs.get("callbacks", ()), stop])}
    whole = sampler is None and not args.batch_eval_metrics and args.eval_do_concat_batches
    if run.held_out and whole and "compute_metrics" not in kwargs:
        kwargs |= scoring(max(len(row.answers) for row in run.held_out))
    layers: AbstractContextManager[object] = nullcontext()
    if args.torch_compile:
        layers = compiled(run.model, args.torch_compile_backend, args.torch_compile_mode)
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    with run.readout.attached(run.model), layers, stop.listening():
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
        checkpoint = get_last_checkpoint(args.output_dir) if resume and Path(args.output_dir).is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked:
        raise Interrupted(f"stopped at step {trainer.state.global_step} with a checkpoint in {args.output_dir}")


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


@final
class _Trainer(Trainer):
    """The stock Trainer, which may take its rows in the order of a sampler, and whose losses a guard looks at."""

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

    def _get_train_sampler(self, *args: object, **kwargs: object) -> Sampler[Any] | None:
        """Return the sampler, or the Trainer's own."""
        stock: Sampler[int] | None = super()._get_train_sampler(*args, **kwargs)
        return stock if self.sampler is None else self.sampler


@final
class _Rows(Dataset[Rows]):
    """Encoded examples as the Trainer wants them: one by its number, or one for each member of a joint ensemble."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, ...]) -> Rows:
        return self.rows[index] if isinstance(index, int) else tuple(self.rows[i] for i in index)


@final
class _Stop(TrainerCallback):
    """Ends training after the step in which Ctrl-C was pressed, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C for the length of a ``with`` block, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: FrameType | None) -> None:
            """Note that Ctrl-C was pressed; a second one has its usual effect."""
            self.asked = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
        """Save and stop if asked."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
