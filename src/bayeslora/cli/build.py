"""From the command line's options to models, tasks, methods and Trainer arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bayeslora.cli.options import ModelOptions, PredictOptions, TaskOptions, TrainingOptions
from bayeslora.errors import InputError
from bayeslora.methods import METHODS, Method
from bayeslora.models import load_model
from bayeslora.operations import pruned, restricted, tempered
from bayeslora.posteriors import Posterior
from bayeslora.tasks import load_task
from bayeslora.tasks.types import Split, Task


def build_task(options: TaskOptions) -> Task:
    """Return the task that the options describe.

    Args:
        options: The options.

    Returns:
        The task.

    Raises:
        InputError: If neither a task nor data are named.
    """
    if not options.task and not options.data:
        raise InputError("name a task (--task openbookqa) or give your own data (--data FILE --text-column … )")
    columns: dict[str, object] = {}
    if options.text_column:
        columns["text"] = options.text_column
    if options.label_column:
        columns["label"] = options.label_column
    if options.choice_columns:
        several = len(options.choice_columns) > 1
        columns["choices"] = tuple(options.choice_columns) if several else options.choice_columns[0]
    if options.classes:
        columns["classes"] = tuple(options.classes)
    return load_task(
        options.task or None,
        options.data or None,
        readout=options.readout,
        template=options.template or None,
        few_shot=options.few_shot,
        max_length=options.max_length or None,
        train_rows=options.train_rows or None,
        test_rows=options.test_rows or None,
        validation=int(options.validation) if options.validation >= 1 else options.validation,
        seed=options.task_seed,
        columns=columns or None,
    )


def build_other(name: str, options: TaskOptions, like: Split) -> Split:
    """Return the test split of another task, put to the model as the first task is.

    Args:
        name: A known task, or a path to data with the same columns.
        options: The first task's options; its data folder is looked in for the other.
        like: The first task's test split; classes, readout and limits are taken from it.

    Returns:
        The split.

    Raises:
        InputError: If the other task has no test split, or other classes than a classification head can answer.
    """
    local = Path(name).exists()
    data = name if local else options.data or None
    other = load_task(
        None if local else name,
        data,
        readout=options.readout,
        max_length=options.max_length or None,
        test_rows=options.test_rows or None,
        seed=options.task_seed,
    )
    if other.test is None:
        raise InputError(f"{name} has no test examples")
    if like.classes is None:
        return other.test
    # a classifier answers every text with its own classes; what is asked is only whether it is unsure
    examples = tuple(dataclasses.replace(e, choices=like.classes, label=None, probs=None) for e in other.test)
    return dataclasses.replace(other.test, examples=examples, classes=like.classes, format=like.format)


def build_model(options: ModelOptions, classes: Sequence[str] | None, readout: str) -> tuple[Any, Any]:
    """Return the model with a fresh adapter, and its tokenizer.

    Args:
        options: The options.
        classes: Class names of the task, if it has them.
        readout: How answers are read.

    Returns:
        Model and tokenizer.

    Raises:
        InputError: If no model is named.
    """
    if not options.model:
        raise InputError("name a base model: --model FOLDER or --model org/name")
    return load_model(
        options.model,
        classes,
        readout=readout,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=options.target_modules or None,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        attention=options.attention or None,
    )


def build_method(name: str, settings: Sequence[str] = ()) -> Method:
    """Return a method by its name on the command line.

    Args:
        name: Such as ``map``, ``swag``, or ``ensemble:5`` with the number of members.
        settings: ``key=value`` for the method's settings, values as in JSON.

    Returns:
        The method.

    Raises:
        InputError: If the method or a setting is unknown, or a value has the wrong form.
    """
    base, _, members = name.partition(":")
    if base not in METHODS:
        raise InputError(f"unknown method {base!r}; known: {', '.join(METHODS)}")
    values: dict[str, Any] = {}
    for item in settings:
        key, sign, value = item.partition("=")
        if not sign:
            raise InputError(f"the setting {item!r} has no value; write key=value")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    if members:
        if not members.isdigit():
            raise InputError(f"{name!r}: after the colon comes the number of members, such as {base}:5")
        values["members"] = int(members)
    try:
        return METHODS[base](**values)
    except TypeError as error:
        raise InputError(f"the method {name} does not take these settings: {str(error).split(') ')[-1]}") from error


def build_arguments(options: TrainingOptions, folder: Path, seed: int) -> Any:
    """Return the Trainer's arguments.

    Args:
        options: The options.
        folder: Where checkpoints go.
        seed: Seed of the run.

    Returns:
        TrainingArguments.

    Raises:
        InputError: If an argument is unknown or has no meaning.
    """
    from transformers import TrainingArguments

    values: dict[str, Any] = {
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "lr_scheduler_type": options.scheduler,
        "warmup_steps": options.warmup,
        "logging_steps": 0.1,
        "logging_strategy": "steps",
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "seed": seed,
    }
    try:
        values |= json.loads(options.trainer)
        return TrainingArguments(str(folder), **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"the Trainer does not take these arguments: {error}") from error


def shaped(posterior: Posterior, options: PredictOptions) -> Posterior:
    """Return the posterior tempered, pruned and restricted as the options say.

    Args:
        posterior: Any posterior.
        options: The options.

    Returns:
        A posterior of the same family.
    """
    if options.prune:
        posterior = pruned(posterior, options.prune)
    if options.last_layers:
        posterior = restricted(posterior, options.last_layers)
    return posterior if options.temperature == 1 else tempered(posterior, options.temperature)
