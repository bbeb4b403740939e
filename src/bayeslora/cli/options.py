"""The command line's options, as dataclasses in groups: flags and YAML keys have the fields' names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


def option(
    default: Any,
    text: str,
    *,
    least: float = 0,
    most: float = math.inf,
    required: str = "",
    own: bool = False,
    former: str = "",
) -> Any:
    """Return a dataclass field with its help, the limits of a number, and what else `bayeslora.cli.parse` heeds.

    ``required`` is the refusal where there is no value, ``own`` says that the verb's default counts whatever the run
    was made with, and ``former`` is an older spelling of the flag, which help does not show.
    """
    metadata = {
        "help": text.replace("%", "%%"),
        "least": least,
        "most": most,
        "required": required,
        "own": own,
        "former": former,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


RUN = "Folder of `bayeslora train`, a posterior's folder, or its repository on the Hub."
"""Help of the first word of the verbs that have one."""


@dataclass(kw_only=True)
class ModelOptions:
    """Base model."""

    model: str = option("", "Base model: a folder or a repository on the Hub.")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "Dtype of the base model; auto: what is fast here.")
    attention: str = option("", "Attention implementation; empty: eager on the CPU, transformers' choice elsewhere.")
    device: Literal["auto", "cpu"] = option(
        "auto", "auto: the accelerator if there is one, else the CPU; cpu: always the CPU."
    )


@dataclass(kw_only=True)
class AdapterOptions:
    """Adapter."""

    rank: int = option(8, "Rank r of the adapter.", least=1)
    alpha: float = option(16.0, "LoRA's alpha; updates are scaled by alpha / rank.")
    dropout: float = option(0.0, "LoRA's dropout.", most=1)
    target_modules: list[str] = option([], "Layers to adapt; none: PEFT's choice for the architecture.")


@dataclass(kw_only=True)
class TaskOptions:
    """Data, and how they are put to the model."""

    task: str = option("", "A known task (openbookqa, arc_easy, sst2, …), or a name for your own data.")
    data: str = option("", "Folder with the data, or a file; empty: the Hub.")
    text_column: str = option("", "Own data: column of the question or text.")
    choice_columns: list[str] = option([], "Own data: column with the list of choices, or one column for each choice.")
    label_column: str = option("", "Own data: column of the right answer.")
    classes: list[str] = option([], "Own data: class names; none: the labels that occur.")
    readout: Literal["auto", "letters", "likelihood", "head"] = option(
        "auto", "How answers are read: letters of the choices, likelihood of their texts, or a classification head."
    )
    normalisation: Literal["auto", "sum", "characters", "tokens", "unconditional"] = option(
        "auto",
        "Likelihood readout: the sum of a choice's log-likelihood, that for its characters or tokens, or less that "
        "without the question; auto: as in training, tokens for a new run.",
    )
    template: str = option(
        "",
        "Prompt, with {text}, for letters {choices}, and any other column by its name, such as {premise}; \\n is a new "
        "line. Empty: the task's own.",
    )
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
    batch_size: int = option(8, "Examples of a step on each device.", least=1)
    accumulation: int = option(1, "Batches of a step.", least=1)
    learning_rate: float = option(2e-4, "Peak learning rate of AdamW.")
    weight_decay: float = option(0.0, "AdamW's weight decay.")
    scheduler: str = option("linear", "Schedule of the learning rate.")
    warmup: float = option(0.06, "Share of the steps in which the learning rate rises; 1 or more: that many steps.")
    save_steps: int = option(0, "Steps between checkpoints, which are then kept; 0: by --save-minutes alone.")
    save_minutes: float = option(
        10.0, "Minutes between checkpoints, which go when the run is done; 0: at Ctrl-C and SIGTERM alone.", least=0
    )
    trainer: str = option("{}", "Any other arguments of transformers' TrainingArguments, as JSON.")


SAVING = ("save_steps", "save_minutes")
"""Options that do not change what is learned."""


@dataclass(kw_only=True)
class DrawOptions:
    """Prediction."""

    draws: int = option(
        10, "Draws from the posterior, rounded up: a mixture's members get equally many. 0: its mean alone."
    )
    token_budget: int = option(0, "Most tokens of a prediction batch; 0: what is fast and fits into memory.")


@dataclass(kw_only=True)
class BudgetOptions:
    """What a prediction may cost."""

    tolerance: float = option(
        0.0, "Stop drawing for an example once the standard error of its probabilities is at most this; 0: never."
    )
    min_draws: int = option(
        4, "Draws of each example before the first look at the error.", least=2, former="fewest_draws"
    )
    compile: bool = option(False, "Compile the model's layers: takes a minute, then is faster; for many rows.")


@dataclass(kw_only=True)
class TransformOptions:
    """Which draws, and from what is made of the posterior."""

    draw_seed: int = option(0, "Which stream of draws.")
    sampling: Literal["independent", "antithetic", "simplex", "sobol"] = option(
        "independent", "How the draws belong together; simplex, in whole fives, gets most from few of them."
    )
    temperature: float = option(1.0, "Factor on the posterior's covariance; 0: the mean.")
    prune: float = option(0.0, "Share of each matrix with the lowest |mean|/sd that is set to zero.", most=1)
    last_layers: int = option(0, "Keep the noise in that many last layers only; 0: in all.")
    noise: Literal["all", "answer"] = option(
        "all",
        "Tokens that have it: all, or the answer's: long prompts pass once, and answers are near the mean's.",
    )


@dataclass(kw_only=True)
class TrainOptions(ModelOptions, AdapterOptions, TaskOptions, TrainingOptions, DrawOptions):
    """What verbs have that train a fresh adapter."""


@dataclass(kw_only=True)
class BaseOptions:
    """The untuned model as a witness."""

    base: bool = option(False, "Ask the untuned base too: what it says, how far tuning went, what may be foreign.")


@dataclass(kw_only=True)
class PredictOptions(ModelOptions, TaskOptions, DrawOptions, TransformOptions, BudgetOptions, BaseOptions):
    """What verbs have that predict rows from a posterior."""


INHERITED = (ModelOptions, TaskOptions, DrawOptions)
"""Groups whose values a verb takes from its RUN."""
