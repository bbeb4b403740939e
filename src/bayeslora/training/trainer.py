"""A run of the stock Trainer on encoded examples, which Ctrl-C ends with a checkpoint."""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bayeslora.errors import InputError, Interrupted
from bayeslora.metrics import classification as metrics
from bayeslora.prediction.compilation import compiled
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.readouts import Readout
from bayeslora.training.joint_ensemble import Lanes

SCORES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": metrics.accuracy,
    "nll": metrics.nll,
    "ece": metrics.ece,
    "brier": metrics.brier,
}
"""What the Trainer's evaluations measure, of the adapter as it is then."""


def run_trainer(
    model: nn.Module,
    readout: Readout,
    rows: Sequence[Encoded],
    args: TrainingArguments,
    kwargs: dict[str, Any],
    *,
    held_out: Sequence[Encoded] | None = None,
    resume: bool = False,
    lanes: Lanes | None = None,
) -> None:
    """Train with the stock Trainer on encoded examples; Ctrl-C writes a checkpoint and stops.

    With ``torch_compile`` in the arguments the model's layers are compiled, each by itself. Its evaluations measure
    `SCORES` unless there are several lanes, or ``compute_metrics`` or arguments that do without are given.

    Args:
        model: PEFT model with a LoRA adapter.
        readout: How answers are read.
        rows: The training examples.
        args: Arguments of the Trainer.
        kwargs: Its other arguments, among them ``compute_loss_func``.
        held_out: Examples for its evaluation.
        resume: Whether to go on from the last checkpoint in ``output_dir``, if there is one.
        lanes: The order of the rows of several adapters that are trained side by side.

    Raises:
        InputError: If the layers are to be compiled and cannot be.
        Interrupted: After Ctrl-C.
    """
    own, stop = adapted(args), _Stop()
    apart = [] if lanes is None else [lanes.callback()]
    kwargs = {**kwargs, "callbacks": [*apart, *kwargs.get("callbacks", ()), stop]}
    whole = lanes is None and not own.batch_eval_metrics and own.eval_do_concat_batches
    if held_out and whole and "compute_metrics" not in kwargs:
        kwargs |= scoring(max(len(row.answers) for row in held_out))
    layers = compiled(model, own.torch_compile_backend, own.torch_compile_mode) if own.torch_compile else nullcontext()
    own.torch_compile, own.torch_compile_backend, own.torch_compile_mode = False, None, None
    with readout.attached(model), layers, stop.listening():
        trainer = _Trainer(
            model=model,
            args=own,
            train_dataset=_Rows(rows),
            eval_dataset=None if held_out is None else _Rows(held_out),
            data_collator=readout.collate if lanes is None else lanes.collator(readout.collate),
            **kwargs,
        )
        trainer.lanes = lanes
        checkpoint = get_last_checkpoint(own.output_dir) if resume and Path(own.output_dir).is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked:
        raise Interrupted(f"stopped at step {trainer.state.global_step} with a checkpoint in {own.output_dir}")


def scoring(choices: int) -> dict[str, Any]:
    """Return what makes the Trainer's evaluations measure `SCORES`.

    Args:
        choices: Most choices of an example; 0 where the logits of all batches are equally many.

    Returns:
        ``compute_metrics`` and ``preprocess_logits_for_metrics`` for the Trainer.
    """

    def log_probs(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Return a batch's log-probabilities, as many in each batch: minus infinity where there is no choice."""
        found = logits[0] if isinstance(logits, tuple) else logits
        missing = max(0, choices - found.shape[-1])
        return functional.pad(found.float().log_softmax(-1), (0, missing), value=-math.inf)

    def scores(found: Any) -> dict[str, float]:
        """Return the scores; NaN where the model's output is, which must not end the training."""
        log_p, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
        if bool(log_p.isnan().any()):
            return dict.fromkeys(SCORES, math.nan)
        return {name: float(score(log_p, labels)) for name, score in SCORES.items()}

    return {"compute_metrics": scores, "preprocess_logits_for_metrics": log_probs}


def adapted(args: TrainingArguments) -> TrainingArguments:
    """Return the Trainer's arguments with what the readout and the machine need.

    Args:
        args: The user's.

    Returns:
        A changed copy.

    Raises:
        InputError: If one process has several GPUs.
    """
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


@final
class _Trainer(Trainer):
    """The stock Trainer, which may take its rows in the order of several lanes."""

    lanes: Lanes | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler[Any] | None:
        """Return the lanes, or the Trainer's own sampler."""
        own: torch.utils.data.Sampler[Any] | None = super()._get_train_sampler(*args, **kwargs)
        return own if self.lanes is None else self.lanes


@final
class _Rows(torch.utils.data.Dataset[Any]):
    """Encoded examples as the Trainer wants them: one by its number, or one for each lane."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, ...]) -> Encoded | tuple[Encoded, ...]:
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if asked."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
