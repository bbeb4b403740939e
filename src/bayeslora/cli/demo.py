"""``bayeslora demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslora.cli.options import TaskOptions, TrainingOptions, option
from bayeslora.cli.runs import check_folder, opened
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from bayeslora.compare import Comparison
    from bayeslora.evaluation import Evaluation
    from bayeslora.tasks.types import Split, Task

EXAMPLES = """examples:
  bayeslora demo
  bayeslora demo --task openbookqa              the same on real data, from the Hub
  bayeslora demo --task openbookqa --data DIR   or from local files

A small language model (SmolLM2-135M-Instruct) learns from few rows: by plain fine-tuning (MAP), by an ensemble, and by
SWAG. The demo's own data are bags, dice and wheels described in words, so that the true probability of
every answer is known; the other data are about the weather and trains, which the model was never taught."""


@dataclass(kw_only=True)
class Options:
    """See over-confidence and its cure: three methods side by side on a small model, in minutes on a CPU."""

    task: str = option("chance", "chance (generated here, truth known), or a known task such as openbookqa.")
    data: str = option("", "Folder with the task's data; empty: the Hub.")
    methods: list[str] = option(["map", "ensemble:4", "swag"], "Methods to compare.")
    train_rows: int = option(80, "Training rows.")
    test_rows: int = option(200, "Test rows.")
    epochs: float = option(8.0, "Passes over the training rows.")
    learning_rate: float = option(2e-3, "Peak learning rate.")
    swag_learning_rate: float = option(8e-3, "Constant learning rate of SWAG's phase.")
    draws: int = option(6, "Draws from SWAG's posterior.")
    seed: int = option(0, "Seed of data and training.")
    out: str = option("bayeslora-demo", "Folder for the results.")
    resume: bool = option(False, "Go on with a folder that is there.")


def run(options: Options) -> None:
    """Compare the methods on the small model, and say in words what came of it.

    Args:
        options: The options.

    Raises:
        InputError: If the task lacks a train or a test split.
    """
    out = Path(options.out)
    check_folder(out, options, resume=options.resume, free=("methods",))
    from bayeslora.cli.build import build_arguments, build_method
    from bayeslora.cli.compare import finish
    from bayeslora.cli.progress import own_progress
    from bayeslora.cli.terminal import say
    from bayeslora.compare import compare
    from bayeslora.demo_model import demo_model
    from bayeslora.models import load_model
    from bayeslora.study import Study

    settings = {"swag": [f"learning_rate={options.swag_learning_rate}"]}
    with own_progress():
        methods = {name: build_method(name, settings.get(name, [])) for name in options.methods}
        task, name, other = _data(options)
        if task.train is None or task.test is None:
            raise InputError(f"the task {task.name} lacks a train or a test split")
        model, tokenizer = load_model(demo_model(), dropout=0.0, target_modules=["q_proj", "v_proj"])
        training = TrainingOptions(epochs=options.epochs, batch_size=10, learning_rate=options.learning_rate)
        args = build_arguments(training, out / "training", options.seed)
        study = Study(model, tokenizer, task, args, out, {name: other}, draws=options.draws, resamples=200, report=say)
        with opened(out, options):
            found = finish(study, methods, [options.seed], "png", compare)
    print()
    print(in_words(found, options.seed, name))


def in_words(found: Comparison, seed: int, other: str) -> str:
    """Return what a comparison shows, in sentences made of its numbers.

    Args:
        found: The comparison.
        seed: The seed to speak of.
        other: Name of the out-of-distribution data.

    Returns:
        A line for each method.
    """
    lines = []
    for method, by_seed in found.evaluations.items():
        evaluation: Evaluation = by_seed[seed]
        prediction = found.predictions[method][seed]
        right = evaluation.value("draws", "accuracy")
        says = float(prediction.confidence.mean())
        unsure = float(found.ood[method][seed][other].confidence.mean())
        lines.append(
            f"{method} says {says:.0%} on average and is right {right:.0%} of the time; "
            f"on questions it was never trained for it says {unsure:.0%}."
        )
    return "\n".join(lines)


def _data(options: Options) -> tuple[Task, str, Split]:
    """Return the task, and the name and the split of the out-of-distribution data."""
    from bayeslora.cli.data import other_splits
    from bayeslora.tasks import load_task
    from bayeslora.tasks.chance import chance_ood, chance_task

    if options.task == "chance":
        task = chance_task(options.train_rows, test_rows=options.test_rows, seed=options.seed)
        return task, "weather and trains", chance_ood(options.test_rows // 2, options.seed)
    tasks = TaskOptions(task=options.task, data=options.data, readout="likelihood", test_rows=options.test_rows)
    task = load_task(
        options.task,
        options.data or None,
        readout="likelihood",
        train_rows=options.train_rows,
        test_rows=options.test_rows,
        seed=options.seed,
    )
    if task.test is None:
        raise InputError(f"the task {task.name} has no test examples")
    return task, "mmlu_chemistry", other_splits(["mmlu_chemistry"], tasks, task.test)["mmlu_chemistry"]
