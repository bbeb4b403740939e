"""Training in one call: a model, a task and a method, with the stock Trainer of transformers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bayeslora._typing import Tokenizer
from bayeslora.errors import InputError
from bayeslora.files import read_object, standing, write_json
from bayeslora.methods import Ensemble, Inference, Map, Method, PostHoc
from bayeslora.methods.base import origin_for
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import initialise, read, write
from bayeslora.posteriors import Point, Posterior
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.provenance import scored
from bayeslora.prediction.readouts import readout_for
from bayeslora.processes import sharded
from bayeslora.tasks.types import Split, Task
from bayeslora.training import keys
from bayeslora.training.joint_ensemble import FOLDER, train_jointly
from bayeslora.training.resuming import refuse_others
from bayeslora.training.trainer import TrainerRun, adapted, refuse_fsdp, run_trainer

logger = logging.getLogger(__name__)


def fit(
    model: nn.Module,
    task: Task,
    method: Inference,
    args: TrainingArguments,
    *,
    tokenizer: Tokenizer | None = None,
    start: Posterior | Sequence[Posterior] | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Posterior:
    """Train a model on a task by a method.

    The loss is the cross-entropy over the choices, so that what is trained is what is evaluated. A method that is
    fitted to a trained adapter (`PostHoc`) is fitted to the plain fine-tune. An ensemble trains its members one after
    another in ``<output_dir>/member-k`` and keeps each there when it is done. Evaluations on the way log accuracy, NLL,
    ECE and Brier score of the adapter as it is then, but for members that are trained together. Ctrl-C and SIGTERM
    write a checkpoint and stop; a second one stops at once. In several processes all return the posterior, and the
    first one writes.

    Args:
        model: PEFT model with a LoRA adapter. It is trained from the adapter that it has, and ends in the last state of
            training; ensembles draw each member's start by its seed.
        task: The task; ``train`` is trained on, ``validation`` is evaluated on as the arguments say.
        method: How.
        args: Arguments of the Trainer.
        tokenizer: The model's tokenizer; None loads the one that was saved with the model.
        start: Where to start from instead: a posterior's mean, or one for each member of an ensemble.
        resume: Whether to go on from the newest complete checkpoint in ``output_dir``, if there is one. What does not
            change what is learned, such as logging, saving and evaluating, may be other than it was.
        callbacks: More callbacks for the Trainer.

    Returns:
        The posterior.

    Raises:
        InputError: If the task cannot be trained on, something does not fit, or the checkpoints in ``output_dir`` are
            of other settings or data.
    """
    if task.train is None or not len(task.train):
        raise InputError(f"the task {task.name} has no training examples; give data with a train split")
    _check_labels(task.train, "training")
    runs = method.members if isinstance(method, Ensemble) else 1
    starts = [start] * runs if start is None or isinstance(start, Posterior) else list(start)
    if len(starts) != runs:
        raise InputError(f"{method.name} makes {runs} runs, and {len(starts)} starts were given; give one for each")
    common = _Common(model, task, tokenizer, resume, callbacks)
    if isinstance(method, Ensemble):
        posterior: Posterior = _train_members(common, method, args, starts)
    else:
        posterior = _train(common, method, args, starts[0])
    assert posterior.origin is not None
    return replace(cast(Any, posterior), origin=scored(posterior.origin, task.normalisation))


@dataclass(frozen=True)
class _Common:
    """What all runs of a call of `fit` share."""

    model: nn.Module
    task: Task
    tokenizer: Tokenizer | None
    resume: bool
    callbacks: Sequence[TrainerCallback]

    @cached_property
    def inputs(self) -> keys.Parts:
        """What all runs depend on, looked at once."""
        return keys.inputs(self.model, self.task, self.tokenizer)


def _check_labels(split: Split, purpose: str) -> None:
    """Refuse a split in which a label is not known."""
    unknown = [i for i, example in enumerate(split) if example.label is None]
    if unknown:
        raise InputError(f"row {unknown[0]} of {split.name} has no label; {purpose} needs one in every row")


def _train(common: _Common, method: Inference, args: TrainingArguments, start: Posterior | None) -> Posterior:
    """Train once, and fit what is fitted afterwards."""
    model, task = common.model, common.task
    if isinstance(method, PostHoc):
        refuse_fsdp(args, f"{method.name} is fitted by predictions")
        method.check(model, task)
        point = _train(common, Map(), args, start)
        with sharded():
            return method.fit(
                model, task, start=point, tokenizer=common.tokenizer, seed=args.seed, progress=not args.disable_tqdm
            )
    assert isinstance(method, Method)
    method, adjustment = method.stages
    if adjustment is not None:
        refuse_fsdp(args, f"{adjustment.name} is fitted by predictions")
        adjustment.check(model, task)
    run = _prepared(common, method, args, [start])
    if start is not None:
        write(model, start.mean)
    run_trainer(run, resume=common.resume)
    posterior = method.posterior(model)
    if adjustment is None:
        return posterior
    with sharded():
        return adjustment.fit(
            model, task, start=posterior, tokenizer=common.tokenizer, seed=args.seed, progress=not args.disable_tqdm
        )


def _train_members(
    common: _Common, method: Ensemble, args: TrainingArguments, starts: Sequence[Posterior | None]
) -> Posterior:
    """Train an ensemble's members, those that are not there already, and put them together."""
    model, resume = common.model, common.resume
    member_args = [method.member_arguments(args, k) for k in range(method.members)]
    folders = [standing(Path(each.output_dir) / "posterior") for each in member_args]
    kept = [resume and folder.exists() for folder in folders]
    if all(kept):
        return method.mixture([load_posterior(folder) for folder in folders], model)
    _note_members(common, method, args, member_args, starts)
    members: list[Posterior] = []
    if method.together:
        refuse_fsdp(args, "members that are trained together lie side by side")
        members = _train_jointly(common, method.member, member_args, starts)
    for k, (each, folder) in enumerate(zip(member_args, folders, strict=True)):
        if kept[k] and not method.together:
            members.append(load_posterior(folder))
            continue
        if not method.together:
            logger.info("Training member %d of %d.", k + 1, method.members)
            initialise(model, each.seed)
            members.append(_train(common, method.member, each, starts[k]))
        if args.process_index == 0:
            members[k].save_pretrained(folder, overwrite=True)
        PartialState().wait_for_everyone()
    return method.mixture(members, model)


def _train_jointly(
    common: _Common, method: Inference, args: Sequence[TrainingArguments], starts: Sequence[Posterior | None]
) -> list[Posterior]:
    """Train the members of an ensemble in one pass over the base."""
    run, means = _prepared(common, method, args[0], starts), []
    for start, each in zip(starts, args, strict=True):
        if start is None:
            initialise(common.model, each.seed)
        means.append(read(common.model) if start is None else start.mean)
    members = train_jointly(run, means, args, resume=common.resume)
    return [Point(params, origin_for(common.model, method)) for params in members]


def _note_members(
    common: _Common,
    method: Ensemble,
    args: TrainingArguments,
    member_args: Sequence[TrainingArguments],
    starts: Sequence[Posterior | None],
) -> None:
    """Keep beside the members what they depend on, and refuse to go on with an ensemble of others."""
    folder = Path(args.output_dir)
    file, seeds = folder / "members.json", [[each.seed, each.data_seed] for each in member_args]
    settings = _settings(common, method.member, args, starts) | {"seed": None, "data_seed": None, "members": None}
    own = [Path(each.output_dir) for each in member_args]
    if common.resume and any(path.exists() for path in (folder / FOLDER, *own)):
        before = read_object(file, missing="") if file.exists() else {}  # an older version kept none
        former = before.get("seeds", [None])
        if not isinstance(former, list) or any(one != other for one, other in zip(former, seeds, strict=False)):
            raise InputError(
                f"the ensemble in {folder} was begun with other seeds of its members, as an older version gave them; "
                "finish it as it was begun, or choose another output folder"
            )
        refuse_others(file, before.get("settings"), settings)
    if args.process_index == 0:
        if not common.resume:  # else a run that breaks off would go on with members of an earlier one
            for each in (folder / FOLDER, *own):
                shutil.rmtree(each, ignore_errors=True)
        write_json(file, {"seeds": seeds, "settings": settings})
    PartialState().wait_for_everyone()


def _settings(
    common: _Common, method: Inference, args: TrainingArguments, starts: Sequence[Posterior | None]
) -> keys.Parts:
    """Return what a run depends on: going on with it under others would give what no run gives."""
    settings = {
        "method": keys.of_method(method),
        "training": keys.of_arguments(args),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "rows": None if common.task.train is None else len(common.task.train),
        "members": len(starts),
        "start": [keys.of_params(start.mean) for start in starts if start is not None],
        **common.inputs,
    }
    if not args.load_best_model_at_end and isinstance(method, Method):
        del settings["validation"]  # nothing is chosen on it
    return settings


def _prepared(
    common: _Common, method: Inference, args: TrainingArguments, starts: Sequence[Posterior | None]
) -> TrainerRun:
    """Encode a task's rows, and gather what the Trainer is given."""
    task = common.task
    assert task.train is not None
    readout = readout_for(common.model, task.train, common.tokenizer)
    rows, cut = readout.encode(task.train)
    if cut:
        logger.warning("%d of %d training prompts were longer than max_length and lost their beginning", cut, len(rows))
    held_out = readout.encode(task.validation)[0] if task.validation is not None and len(task.validation) else None
    kwargs = method.trainer_kwargs(common.model, len(rows))
    kwargs["callbacks"] = [*kwargs.get("callbacks", ()), *common.callbacks]
    kwargs.setdefault("compute_loss_func", answer_loss)
    args = _stopping_early(adapted(args), method, held_out is not None)
    if task.validation is not None and args.eval_strategy != IntervalStrategy.NO:
        _check_labels(task.validation, "evaluation")
    return TrainerRun(common.model, readout, rows, held_out, args, kwargs, _settings(common, method, args, starts))


def _stopping_early(args: TrainingArguments, method: Inference, held_out: bool) -> TrainingArguments:
    """Return the arguments with what early stopping needs, where the method asks for it."""
    if isinstance(method, Map) and method.early_stopping is not None and not args.load_best_model_at_end:
        if not held_out:
            raise InputError("early stopping needs a validation split; load the task with validation=0.1")
        args.eval_strategy = args.save_strategy = IntervalStrategy.EPOCH
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "eval_loss", False
    if isinstance(method, Map) and method.early_stopping is not None:
        args.restore_callback_states_from_checkpoint = True  # how often the evaluation was no better
    return args
