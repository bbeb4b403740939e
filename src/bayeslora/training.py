"""Training in one call: a model, a task and a method, with the stock Trainer of transformers."""

from __future__ import annotations

import copy
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from bayeslora.engine.encode import Encoded
from bayeslora.engine.readouts import Readout, readout_for
from bayeslora.errors import InputError, Interrupted
from bayeslora.methods import Ensemble, Map, Method, PostHoc
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import initialise, write
from bayeslora.posteriors import Posterior
from bayeslora.storage import load_posterior
from bayeslora.tasks.types import Split, Task

logger = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    task: Task,
    method: Method,
    args: TrainingArguments,
    *,
    tokenizer: Any = None,
    start: Posterior | Sequence[Posterior] | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Posterior:
    """Train a model on a task by a method.

    The loss is the cross-entropy over the choices, so that what is trained is what is evaluated. A method that is
    fitted to a trained adapter (`PostHoc`) is fitted to the plain fine-tune. An ensemble trains its members one after
    another in ``<output_dir>/member-k`` and keeps each there when it is done. Ctrl-C writes a checkpoint and stops; a
    second one stops at once.

    Args:
        model: PEFT model with a LoRA adapter. It is trained from the adapter that it has, and ends in the last state of
            training; ensembles draw each member's start by its seed.
        task: The task; ``train`` is trained on, ``validation`` is evaluated on as the arguments say.
        method: How.
        args: Arguments of the Trainer.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        start: Where to start from instead: a posterior's mean, or one for each member of an ensemble.
        resume: Whether to go on from the last checkpoint in ``output_dir``, if there is one.
        callbacks: More callbacks for the Trainer.

    Returns:
        The posterior.

    Raises:
        InputError: If the task cannot be trained on, or something does not fit.
    """
    if task.train is None or not len(task.train):
        raise InputError(f"the task {task.name} has no training examples; give data with a train split")
    _check_labels(task.train, "training")
    runs = method.members if isinstance(method, Ensemble) else 1
    starts = [start] * runs if start is None or isinstance(start, Posterior) else list(start)
    if len(starts) != runs:
        raise InputError(f"{method.name} makes {runs} runs, and {len(starts)} starts were given; give one for each")
    if not isinstance(method, Ensemble):
        return _run(model, task, method, args, tokenizer, starts[0], resume, callbacks)
    members = []
    for k in range(method.members):
        own = method.member_arguments(args, k)
        done = Path(own.output_dir) / "posterior"
        if resume and done.exists():
            members.append(load_posterior(done))
            continue
        logger.info("Training member %d of %d.", k + 1, method.members)
        initialise(model, own.seed)
        member = _run(model, task, method.member, own, tokenizer, starts[k], resume, callbacks)
        member.save_pretrained(done, overwrite=True)
        members.append(member)
    return method.mixture(members, model)


def _check_labels(split: Split, purpose: str) -> None:
    """Refuse a split in which a label is not known."""
    unknown = [i for i, example in enumerate(split) if example.label is None]
    if unknown:
        raise InputError(f"row {unknown[0]} of {split.name} has no label; {purpose} needs one in every row")


def _run(
    model: nn.Module,
    task: Task,
    method: Method,
    args: TrainingArguments,
    tokenizer: Any,
    start: Posterior | None,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> Posterior:
    """Train once, and fit what is fitted afterwards."""
    assert task.train is not None
    if isinstance(method, PostHoc):
        method.check(model, task)
        point = _run(model, task, Map(), args, tokenizer, start, resume, callbacks)
        return method.fit(model, task, start=point, tokenizer=tokenizer, seed=args.seed)
    if start is not None:
        write(model, start.mean)
    readout = readout_for(model, task.train, tokenizer)
    rows, cut = readout.encode(task.train)
    if cut:
        logger.warning("%d of %d training prompts were longer than max_length and lost their beginning", cut, len(rows))
    held_out = readout.encode(task.validation)[0] if task.validation is not None and len(task.validation) else None
    kwargs = method.trainer_kwargs(model, len(rows))
    kwargs["callbacks"] = [*kwargs.get("callbacks", ()), *callbacks]
    kwargs.setdefault("compute_loss_func", answer_loss)
    own = _stopping_early(_adapted(args), method, held_out is not None)
    if task.validation is not None and own.eval_strategy != IntervalStrategy.NO:
        _check_labels(task.validation, "evaluation")
    run_trainer(model, readout, rows, own, kwargs, held_out=held_out, resume=resume)
    return method.posterior(model)


def run_trainer(
    model: nn.Module,
    readout: Readout,
    rows: Sequence[Encoded],
    args: TrainingArguments,
    kwargs: dict[str, Any],
    *,
    held_out: Sequence[Encoded] | None = None,
    resume: bool = False,
) -> None:
    """Train with the stock Trainer on encoded examples; Ctrl-C writes a checkpoint and stops.

    Args:
        model: PEFT model with a LoRA adapter.
        readout: How answers are read.
        rows: The training examples.
        args: Arguments of the Trainer.
        kwargs: Its other arguments, among them ``compute_loss_func``.
        held_out: Examples for its evaluation.
        resume: Whether to go on from the last checkpoint in ``output_dir``, if there is one.

    Raises:
        Interrupted: After Ctrl-C.
    """
    own, stop = _adapted(args), _Stop()
    kwargs = {**kwargs, "callbacks": [*kwargs.get("callbacks", ()), stop]}
    with readout.attached(model), stop.listening():
        trainer = Trainer(
            model=model,
            args=own,
            train_dataset=_Rows(rows),
            eval_dataset=None if held_out is None else _Rows(held_out),
            data_collator=readout.collate,
            **kwargs,
        )
        checkpoint = get_last_checkpoint(own.output_dir) if resume and Path(own.output_dir).is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked:
        raise Interrupted(f"stopped at step {trainer.state.global_step} with a checkpoint in {own.output_dir}")


def _adapted(args: TrainingArguments) -> TrainingArguments:
    """Return the arguments with what the readout and the machine need."""
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process would split batches that belong together; start with accelerate launch, "
            "or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    own = copy.copy(args)
    own.remove_unused_columns = False
    own.label_names = ["labels"]
    if not torch.cuda.is_available():
        own.dataloader_pin_memory = False
    return own


def _stopping_early(own: TrainingArguments, method: Method, held_out: bool) -> TrainingArguments:
    """Return the arguments with what early stopping needs, where the method asks for it."""
    if isinstance(method, Map) and method.early_stopping is not None and not own.load_best_model_at_end:
        if not held_out:
            raise InputError("early stopping needs a validation split; load the task with validation=0.1")
        own.eval_strategy = own.save_strategy = IntervalStrategy.EPOCH
        own.load_best_model_at_end, own.metric_for_best_model, own.greater_is_better = True, "eval_loss", False
    return own


@final
class _Rows(torch.utils.data.Dataset[Encoded]):
    """Encoded examples as the Trainer wants them."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if asked."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
