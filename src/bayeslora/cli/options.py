"""The command line's options, as dataclasses: flags and YAML keys have the fields' names."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from bayeslora.errors import InputError


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with its help.

    Args:
        default: Default value; a list stands for a fresh copy of itself.
        text: Help.

    Returns:
        The field.
    """
    metadata = {"help": text.replace("%", "%%")}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ModelOptions:
    """Base model and adapter."""

    model: str = option("", "Base model: a folder or a repository on the Hub.")
    rank: int = option(8, "Rank r of the adapter.")
    alpha: float = option(16.0, "LoRA's alpha.")
    dropout: float = option(0.0, "LoRA's dropout.")
    target_modules: list[str] = option([], "Layers to adapt; none: PEFT's choice for the architecture.")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "Dtype of the base model; auto: what is fast here.")
    attention: str = option("", "Attention implementation; empty: eager on the CPU, transformers' choice elsewhere.")


@dataclass(kw_only=True)
class TaskOptions:
    """Data and how they are put to the model."""

    task: str = option("", "A known task (openbookqa, arc_easy, sst2, …), or a name for your own data.")
    data: str = option("", "Folder with the data, or a file; empty: the Hub.")
    text_column: str = option("", "Own data: column of the question or text.")
    choice_columns: list[str] = option([], "Own data: column with the list of choices, or one column for each choice.")
    label_column: str = option("", "Own data: column of the right answer.")
    classes: list[str] = option([], "Own data: class names; none: the labels that occur.")
    readout: Literal["auto", "letters", "likelihood", "head"] = option(
        "auto", "How answers are read: letters of the choices, likelihood of their texts, or a classification head."
    )
    template: str = option("", "Prompt, with {text} and, for letters, {choices}; empty: the task's own.")
    few_shot: int = option(0, "Solved examples in the prompt, taken out of the training rows.")
    max_length: int = option(0, "Longest prompt in tokens; longer ones lose their beginning. 0: refuse them.")
    train_rows: int = option(0, "Most training rows; 0: all.")
    test_rows: int = option(0, "Most test rows; 0: all.")
    validation: float = option(0.1, "Share of the training rows that is held out; 1 or more: that many rows.")
    task_seed: int = option(0, "Which rows are held out and kept.")


@dataclass(kw_only=True)
class TrainingOptions:
    """Training, by the Trainer of transformers."""

    epochs: float = option(3.0, "Passes over the training rows.")
    max_steps: int = option(0, "Optimiser steps; 0: as many as the epochs take.")
    batch_size: int = option(8, "Examples of a step on each device.")
    accumulation: int = option(1, "Batches of a step.")
    learning_rate: float = option(2e-4, "Peak learning rate of AdamW.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    scheduler: str = option("linear", "Schedule of the learning rate.")
    warmup: float = option(0.06, "Share of the steps in which the learning rate rises.")
    save_steps: int = option(0, "Steps between checkpoints; 0: at Ctrl-C only.")
    trainer: str = option("{}", "Any other arguments of transformers' TrainingArguments, as JSON.")


@dataclass(kw_only=True)
class PredictOptions:
    """Prediction from a posterior."""

    draws: int = option(10, "Draws from the posterior; a mixture's members get equally many.")
    draw_seed: int = option(0, "Which stream of draws.")
    temperature: float = option(1.0, "Factor on the posterior's covariance; 0: the mean.")
    prune: float = option(0.0, "Share of each matrix with the lowest |mean|/sd that is set to zero.")
    last_layers: int = option(0, "Keep the noise in that many last layers only; 0: in all.")
    token_budget: int = option(2048, "Most tokens of a batch.")


Options = TypeVar("Options")


def parse(kind: type[Options], argv: Sequence[str], *, verb: str, examples: str, first: str = "") -> Options:
    """Read a verb's options from flags and, with ``--config``, from a YAML file that the flags override.

    Args:
        kind: Dataclass of the options.
        argv: Arguments after the verb.
        verb: The verb, for the help.
        examples: Examples for the help.
        first: Name of the option that a first argument without a dash stands for.

    Returns:
        The options.

    Raises:
        InputError: If the YAML file cannot be read or names an unknown option.
    """
    from transformers import HfArgumentParser

    words = list(argv)
    if first and words and not words[0].startswith("-"):
        words[:1] = [f"--{first}", words[0]]
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    config = before.parse_known_args(words)[0].config
    parser = HfArgumentParser(
        cast(Any, kind),
        prog=f"bayeslora {verb}",
        description=kind.__doc__,
        epilog=examples,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with these options; flags override it.")
    if config:
        parser.set_defaults(**_yaml(Path(config), kind))
    found, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unknown option {unknown[0]}; see bayeslora {verb} --help")
    return kind(**{f.name: getattr(found, f.name) for f in dataclasses.fields(cast(Any, kind))})


def given(options: Any) -> dict[str, Any]:
    """Return options as a mapping, ready for JSON."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def part(kind: type[Options], options: Any) -> Options:
    """Return one group of a verb's options.

    Args:
        kind: Dataclass of the group.
        options: The verb's options, which have all fields of the group.

    Returns:
        The group.
    """
    return kind(**{f.name: getattr(options, f.name) for f in dataclasses.fields(cast(Any, kind))})


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and examples as they are written."""


def _yaml(path: Path, kind: Any) -> Mapping[str, Any]:
    """Read a YAML file of options."""
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"the configuration {path} cannot be read: {error}") from error
    hints = get_type_hints(kind)
    if not isinstance(read, dict):
        raise InputError(f"{path} must hold options and their values, one a line, such as 'task: openbookqa'")
    for name, value in read.items():
        if name not in hints:
            raise InputError(f"{path} names the unknown option {name!r}; known: {', '.join(sorted(hints))}")
        allowed = get_args(hints[name]) if get_origin(hints[name]) is Literal else None
        plain = get_origin(hints[name]) or hints[name]
        fits = value in allowed if allowed else isinstance(value, (int, float) if plain is float else plain)
        if not fits:
            what = f"one of {', '.join(allowed)}" if allowed else f"a {plain.__name__}"
            raise InputError(f"{path}: {name} must be {what}, and it is {value!r}")
    return read
