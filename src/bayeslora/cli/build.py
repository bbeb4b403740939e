"""From the command line's options to models, methods and Trainer arguments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bayeslora.cli.options import AdapterOptions, ModelOptions, TrainingOptions, TransformOptions
from bayeslora.cli.parse import meant
from bayeslora.cli.settings import build_method
from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction
from bayeslora.models import adapter_of, load_model
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.transforms import pruned, restricted, tempered
from bayeslora.prediction import PassOptions, predict
from bayeslora.tasks.types import Split

__all__ = ["build_arguments", "build_method", "build_model", "model_for", "predicted", "transformed"]


def build_model(
    options: ModelOptions, adapter: AdapterOptions, classes: Sequence[str] | None, readout: str
) -> tuple[Any, Any]:
    """Return the model with a fresh adapter, and its tokenizer.

    Args:
        options: The options of the base model.
        adapter: The options of the adapter.
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
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules or None,
        **_where(options),
    )


def model_for(posterior: Posterior, options: ModelOptions, classes: Sequence[str] | None) -> tuple[Any, Any]:
    """Return the base model of a posterior with an adapter of its shape, and its tokenizer.

    Args:
        posterior: The posterior.
        options: The options; without a base model the one that the posterior names.
        classes: Class names of the task, if it has them.

    Returns:
        Model and tokenizer.

    Raises:
        InputError: If no base model is known.
    """
    origin = posterior.origin
    name = options.model or (origin.base_model if origin is not None else "")
    if not name or origin is None:
        raise InputError("the posterior does not say what its base model is; name it with --model")
    adapter = adapter_of(origin.adapter_config)
    readout = "head" if adapter.task_type == "SEQ_CLS" else "auto"
    return load_model(name, classes, readout=readout, adapter=adapter, **_where(options))


def _where(options: ModelOptions) -> dict[str, Any]:
    """Return how and where the base model is loaded."""
    return {
        "dtype": None if options.dtype == "auto" else getattr(torch, options.dtype),
        "attention": options.attention or None,
        "device": None if options.device == "auto" else options.device,
    }


def build_arguments(options: TrainingOptions, folder: Path, seed: int, *, device: str = "auto") -> Any:
    """Return the Trainer's arguments.

    Args:
        options: The options.
        folder: Where checkpoints go.
        seed: Seed of the run.
        device: ``auto`` or ``cpu``.

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
        "disable_tqdm": False,
        "use_cpu": device == "cpu",
        "seed": seed,
    }
    try:
        more = json.loads(options.trainer)
    except ValueError as error:
        raise InputError(f"--trainer is not JSON ({error}); write such as '{{\"max_grad_norm\": 0.5}}'") from error
    if not isinstance(more, dict):
        raise InputError(f"--trainer must be a JSON object such as '{{\"max_grad_norm\": 0.5}}', and it is {more!r}")
    known = [f.name for f in dataclasses.fields(TrainingArguments)]
    for key in more:
        if key not in known:
            raise InputError(f"--trainer names {key!r}, which TrainingArguments does not have{_close(key, known)}")
    try:
        return TrainingArguments(str(folder), **(values | more))
    except (TypeError, ValueError) as error:
        raise InputError(f"the Trainer does not take these arguments: {' '.join(str(error).split())}") from error


def _close(key: str, known: Sequence[str]) -> str:
    """Return the question whether a close word was meant; nothing if there is none."""
    words = meant(key, known)
    return f"; {words}" if words.startswith("did") else ""


def transformed(posterior: Posterior, options: TransformOptions) -> Posterior:
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


def predicted(
    model: Any, tokenizer: Any, posterior: Posterior, split: Split, options: Any, progress: bool
) -> Prediction:
    """Return the prediction that the options ask for.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        posterior: The posterior, already shaped.
        split: The examples.
        options: `DrawOptions`, `TransformOptions` and `BudgetOptions` in one.
        progress: Whether to show a bar.

    Returns:
        The prediction.
    """
    draws = Draws(options.draws, options.draw_seed, options.sampling, options.tolerance or None, options.fewest_draws)
    return predict(
        model,
        posterior,
        split,
        draws,
        tokenizer=tokenizer,
        token_budget=options.token_budget or None,
        options=PassOptions(compile=options.compile, progress=progress),
    )
