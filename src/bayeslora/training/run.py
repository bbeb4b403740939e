"""Training in one call: a model, a task and a method, with the stock Trainer of transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bayeslora.errors import InputError
from bayeslora.files import atomic_file
from bayeslora.methods import Ensemble, Inference, Map, Method, PostHoc
from bayeslora.methods.base import origin_for
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import initialise, read, write
from bayeslora.posteriors import Point, Posterior
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.provenance import scored
from bayeslora.prediction.encoding import Encoded
from bayeslora.prediction.readouts import Readout, readout_for
from bayeslora.tasks.types import Split, Task
from bayeslora.training.joint_ensemble import Lanes, train_together
from bayeslora.training.trainer import adapted, run_trainer

logger = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    task: Task,
    method: Inference,
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
    another in ``<output_dir>/member-k`` and keeps each there when it is done. Evaluations on the way log accuracy, NLL,
    ECE and Brier score of the adapter as it is then, but for members that are trained together. Ctrl-C writes a
    checkpoint and stops; a second one stops at once.

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
        return _scored(_run(model, task, method, args, tokenizer, starts[0], resume, callbacks), task)
    return _scored(_members(model, task, method, args, tokenizer, starts, resume, callbacks), task)


def _scored(posterior: Posterior, task: Task) -> Posterior:
    """Return the posterior with a note of how the task's answers are scored."""
    assert posterior.origin is not None
    return replace(cast(Any, posterior), origin=scored(posterior.origin, task.normalisation))


def _members(
    model: nn.Module,
    task: Task,
    method: Ensemble,
    args: TrainingArguments,
    tokenizer: Any,
    starts: Sequence[Posterior | None],
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> Posterior:
    """Train an ensemble's members, those that are not there already, and put them together."""
    own_args = [method.member_arguments(args, k) for k in range(method.members)]
    folders = [Path(own.output_dir) / "posterior" for own in own_args]
    whole = resume and all(folder.exists() for folder in folders)
    if not whole:
        _note_seeds(args, own_args, resume)
    if method.together and not whole:
        members = _side_by_side(model, task, method, own_args, tokenizer, starts, resume, callbacks)
        for member, folder in zip(members, folders, strict=True):
            member.save_pretrained(folder, overwrite=True)
        return method.mixture(members, model)
    members = []
    for k, (own, done) in enumerate(zip(own_args, folders, strict=True)):
        if resume and done.exists():
            members.append(load_posterior(done))
            continue
        logger.info("Training member %d of %d.", k + 1, method.members)
        initialise(model, own.seed)
        member = _run(model, task, method.member, own, tokenizer, starts[k], resume, callbacks)
        member.save_pretrained(done, overwrite=True)
        members.append(member)
    return method.mixture(members, model)


def _note_seeds(args: TrainingArguments, own_args: Sequence[TrainingArguments], resume: bool) -> None:
    """Keep the members' seeds beside their folders, and refuse to go on with an ensemble that has others."""
    folder = Path(args.output_dir)
    file, seeds = folder / "members.json", [[own.seed, own.data_seed] for own in own_args]
    if resume and any(path.exists() for path in (folder / "together", *(Path(own.output_dir) for own in own_args))):
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else [None]
        if any(one != other for one, other in zip(before, seeds, strict=False)):
            raise InputError(
                f"the ensemble in {folder} was begun with other seeds of its members, as an older version gave them; "
                "finish it as it was begun, or choose another output folder"
            )
    if args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(seeds), encoding="utf-8")


def _check_labels(split: Split, purpose: str) -> None:
    """Refuse a split in which a label is not known."""
    unknown = [i for i, example in enumerate(split) if example.label is None]
    if unknown:
        raise InputError(f"row {unknown[0]} of {split.name} has no label; {purpose} needs one in every row")


def _run(
    model: nn.Module,
    task: Task,
    method: Inference,
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
    assert isinstance(method, Method)
    if start is not None:
        write(model, start.mean)
    run = _prepared(model, task, method, args, tokenizer, callbacks)
    run_trainer(model, run.readout, run.rows, run.args, run.kwargs, held_out=run.held_out, resume=resume)
    return method.posterior(model)


def _side_by_side(
    model: nn.Module,
    task: Task,
    ensemble: Ensemble,
    args: Sequence[TrainingArguments],
    tokenizer: Any,
    starts: Sequence[Posterior | None],
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> list[Posterior]:
    """Train the members of an ensemble in one pass over the base."""
    run = _prepared(model, task, ensemble.member, args[0], tokenizer, callbacks)
    begins = []
    for start, member in zip(starts, args, strict=True):
        if start is None:
            initialise(model, member.seed)
        begins.append(read(model) if start is None else start.mean)

    def train(joint: TrainingArguments, lanes: Lanes) -> None:
        """Train with the order that the lanes give."""
        run_trainer(model, run.readout, run.rows, joint, run.kwargs, held_out=run.held_out, resume=resume, lanes=lanes)

    members = train_together(model, run.readout, run.rows, begins, args, train)
    return [Point(params, origin_for(model, ensemble.member)) for params in members]


@dataclass(frozen=True)
class _Prepared:
    """What a run is given: the readout, the encoded rows, and the Trainer's arguments with what the method adds."""

    readout: Readout
    rows: list[Encoded]
    held_out: list[Encoded] | None
    args: TrainingArguments
    kwargs: dict[str, Any]


def _prepared(
    model: nn.Module,
    task: Task,
    method: Inference,
    args: TrainingArguments,
    tokenizer: Any,
    callbacks: Sequence[TrainerCallback],
) -> _Prepared:
    """Encode a task's rows, and gather what the Trainer is given."""
    assert task.train is not None
    readout = readout_for(model, task.train, tokenizer)
    rows, cut = readout.encode(task.train)
    if cut:
        logger.warning("%d of %d training prompts were longer than max_length and lost their beginning", cut, len(rows))
    held_out = readout.encode(task.validation)[0] if task.validation is not None and len(task.validation) else None
    kwargs = method.trainer_kwargs(model, len(rows))
    kwargs["callbacks"] = [*kwargs.get("callbacks", ()), *callbacks]
    kwargs.setdefault("compute_loss_func", answer_loss)
    own = _stopping_early(adapted(args), method, held_out is not None)
    if task.validation is not None and own.eval_strategy != IntervalStrategy.NO:
        _check_labels(task.validation, "evaluation")
    return _Prepared(readout, rows, held_out, own, kwargs)


def _stopping_early(own: TrainingArguments, method: Inference, held_out: bool) -> TrainingArguments:
    """Return the arguments with what early stopping needs, where the method asks for it."""
    if isinstance(method, Map) and method.early_stopping is not None and not own.load_best_model_at_end:
        if not held_out:
            raise InputError("early stopping needs a validation split; load the task with validation=0.1")
        own.eval_strategy = own.save_strategy = IntervalStrategy.EPOCH
        own.load_best_model_at_end, own.metric_for_best_model, own.greater_is_better = True, "eval_loss", False
    return own
