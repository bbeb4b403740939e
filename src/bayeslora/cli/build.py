"""From the command line's options to models, posteriors, predictions and Trainer arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from bayeslora._typing import Tokenizer
from bayeslora.cli import options as groups
from bayeslora.cli.launch import once
from bayeslora.cli.runs import posterior_name
from bayeslora.cli.terminal import say, watched
from bayeslora.comparison.cached_runs import CachedRuns
from bayeslora.comparison.report import write_pictures, write_table
from bayeslora.comparison.run import Comparison, compare
from bayeslora.errors import InputError, close_matches
from bayeslora.files import parse_json, write_json
from bayeslora.methods import Inference
from bayeslora.metrics.evaluation import Evaluation, evaluate
from bayeslora.metrics.prediction import Prediction
from bayeslora.models import adapter_of, load_model
from bayeslora.posteriors import Draws, Posterior
from bayeslora.posteriors.card import write_card
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.transforms import pruned, restricted, tempered
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction.prompts import prompt_likelihood_ratio
from bayeslora.tasks.types import Split
from bayeslora.training.stopping import TimedCheckpoints


def build_model(options: groups.TrainOptions, classes: Sequence[str] | None) -> tuple[PeftModel, Tokenizer]:
    """Return the model with a fresh adapter, and its tokenizer; ``classes`` are those of the task, if it has them."""
    if not options.model:
        raise InputError("name a base model: --model FOLDER or --model org/name")
    return _load(
        options.model,
        classes,
        options,
        readout=options.readout,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=options.target_modules or None,
    )


def model_for(
    posterior: Posterior, options: groups.ModelOptions, classes: Sequence[str] | None
) -> tuple[PeftModel, Tokenizer]:
    """Return the base model of a posterior, or that of the options, with an adapter of its shape, and its tokenizer."""
    origin = posterior.origin
    name = options.model or (origin.base_model if origin is not None else "")
    if not name or origin is None:
        raise InputError("the posterior does not say what its base model is; name it with --model")
    adapter = adapter_of(origin.adapter_config, posterior.mean)
    readout = "head" if adapter.task_type == "SEQ_CLS" else "auto"
    return _load(name, classes, options, readout=readout, adapter=adapter)


def _load(
    name: str, classes: Sequence[str] | None, options: groups.ModelOptions, **adapter: Any
) -> tuple[PeftModel, Tokenizer]:
    """Load a model as and where the options say."""
    return load_model(
        name,
        classes,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        attention=options.attention or None,
        device=None if options.device == "auto" else options.device,
        **adapter,
    )


def build_arguments(
    options: groups.TrainingOptions, folder: Path, seed: int, device: str = "auto"
) -> TrainingArguments:
    """Return the Trainer's arguments for a run whose checkpoints go to a folder."""
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
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": False,
        "use_cpu": device == "cpu" or not torch.accelerator.is_available(),
        "seed": seed,
    }
    try:
        more = parse_json(options.trainer)
    except ValueError as error:
        raise InputError(f"--trainer is not JSON ({error}); write such as '{{\"max_grad_norm\": 0.5}}'") from error
    if not isinstance(more, dict):
        raise InputError(
            f"--trainer must be a JSON object such as '{{\"max_grad_norm\": 0.5}}', and it is {more!r:.80}"
        )
    known = [f.name for f in fields(TrainingArguments)]
    for key in more:
        if key not in known:
            close = close_matches(key, known, "")
            raise InputError(f"--trainer names {key!r}, which TrainingArguments does not have{close and f'; {close}'}")
    try:
        return TrainingArguments(str(folder), **(values | more))
    except (TypeError, ValueError) as error:
        raise InputError(f"the Trainer does not take these arguments: {' '.join(str(error).split())[:400]}") from error


def timed_checkpoints(options: groups.TrainingOptions) -> list[TrainerCallback]:
    """Return the callback that saves by the clock, if the options ask for it."""
    return [TimedCheckpoints(options.save_minutes)] if options.save_minutes else []


def load_transformed(run: str, options: groups.TransformOptions) -> Posterior:
    """Load the posterior of a run, a folder or a repository: tempered, pruned and restricted as the options say."""
    posterior = load_posterior(posterior_name(run))
    if options.prune:
        posterior = pruned(posterior, options.prune)
    if options.last_layers:
        posterior = restricted(posterior, options.last_layers)
    posterior = posterior if options.temperature == 1 else tempered(posterior, options.temperature)
    return restricted(posterior, tokens=options.noise)


def draws_of(options: groups.TransformOptions, count: int) -> Draws:
    """Return the draws that the options ask for."""
    return Draws(count, options.draw_seed, options.sampling)


def predict_as(
    options: groups.PredictOptions, model: PeftModel, tokenizer: Tokenizer, posterior: Posterior, split: Split
) -> Prediction:
    """Return the prediction that the options ask for, and say how many prompts were cut for it."""
    draws = replace(draws_of(options, options.draws), tolerance=options.tolerance or None, minimum=options.min_draws)
    budget, passes = options.token_budget or None, PassOptions(compile=options.compile, progress=watched())
    prediction = predict(
        model, posterior, split, draws, base=options.base, tokenizer=tokenizer, token_budget=budget, options=passes
    )
    if prediction.truncated:
        say(f"{prediction.truncated} of {len(split)} prompts were longer than --max-length and lost their beginning")
    return prediction


def prompt_ratios(
    options: groups.PredictOptions,
    model: PeftModel,
    tokenizer: Tokenizer,
    posterior: Posterior,
    splits: Mapping[str, Split],
) -> dict[str, Tensor]:
    """Return the likelihood ratio of the prompts of splits, under the mean; none, and why, where there is none."""
    budget, passes = options.token_budget or None, PassOptions(progress=watched())
    try:
        return {
            name: prompt_likelihood_ratio(
                model, posterior, split, 0, tokenizer=tokenizer, token_budget=budget, options=passes
            )
            for name, split in splits.items()
        }
    except InputError as error:
        say(f"no likelihood ratio of the prompts: {error}")
        return {}


def report_run(
    out: Path,
    model: PeftModel,
    tokenizer: Tokenizer,
    posterior: Posterior,
    test: Split | None,
    options: groups.DrawOptions,
    resamples: int,
    export: str = "--out FOLDER",
) -> None:
    """Print the metrics of the test split and keep them, also on the posterior's card; say what can be done next."""
    if test is not None and all(e.label is not None for e in test):
        budget, passes = options.token_budget or None, PassOptions(progress=watched())
        prediction = predict(
            model, posterior, test, options.draws, tokenizer=tokenizer, token_budget=budget, options=passes
        )
        once(lambda: _keep(evaluate(prediction, test, resamples=resamples), out, test.name))
    print(f"posterior: {out / 'posterior'}   next: bayeslora evaluate {out}, predict {out}, export {out} {export}")


def _keep(result: Evaluation, out: Path, task: str) -> None:
    """Keep the metrics of a run in its folder, and print them."""
    write_json(out / "evaluation.json", result.to_dict())
    write_card(out / "posterior", evaluation=result, task=task)
    print(result.table())


def finish(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int], image: str) -> Comparison:
    """Make a comparison, print its table and keep it with its numbers and pictures in their folder."""
    comparison = compare(runs, methods, seeds)
    once(lambda: show(runs, comparison, image))
    return comparison


def show(runs: CachedRuns, comparison: Comparison, image: str) -> None:
    """Print the table of a comparison, and keep it with its numbers and pictures."""
    print(write_table(runs, comparison))
    pictures = write_pictures(runs, comparison, image)
    print()
    names = ", ".join(path.name for path in [runs.out / "results.md", *pictures])
    print(f"results: {runs.out / 'results.json'}, {names}")
