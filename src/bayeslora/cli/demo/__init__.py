"""``bayeslora demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslora.cli.options import TaskOptions, TrainingOptions, option
from bayeslora.cli.runs import check_folder, opened
from bayeslora.errors import InputError

if TYPE_CHECKING:
    import torch

    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.methods import Inference

EXAMPLES = """examples:
  bayeslora demo
  bayeslora demo --task chance                  a language model, on bags, dice and wheels
  bayeslora demo --task openbookqa              or on real data, from the Hub
  bayeslora demo --task openbookqa --data DIR   or from local files

A small encoder (all-MiniLM-L6-v2) learns from few short reviews whether their writers recommend the film: by plain
fine-tuning (MAP), by MAP with one temperature fitted on 100 held-out rows, and by the four methods: SWAG at
--swag-learning-rate, BLoB on the evidence bound (update=elbo), the others as they are. The reviews are generated, so
that the true probability of every answer is known; the other data are about the weather and trains. The other tasks
are put to a small language model (SmolLM2-135M-Instruct)."""
METHODS = ("map", "temperature", "ensemble:3", "swag", "blob", "ivon")


@dataclass(kw_only=True)
class Options:
    """See over-confidence and its cure: MAP, temperature scaling and four methods on a small model, in minutes."""

    task: str = option(
        "reviews", "reviews or chance (generated here, truth known), or a known task such as openbookqa."
    )
    data: str = option("", "Folder with the task's data; empty: the Hub.")
    methods: list[str] = option(list(METHODS), "Methods to compare; the first is what the others are compared with.")
    train_rows: int = option(300, "Training rows.", least=1)
    test_rows: int = option(600, "Test rows.", least=1)
    epochs: float = option(12.0, "Passes over the training rows.")
    learning_rate: float = option(2e-3, "Peak learning rate.")
    swag_learning_rate: float = option(4e-3, "Constant learning rate of SWAG's phase.")
    draws: int = option(10, "Draws from a posterior.", least=1)
    seed: int = option(0, "Seed of data and training.")
    out: str = option("bayeslora-demo", "Folder for the results.")
    resume: bool = option(False, "Go on with a folder that is there.")


def run(options: Options) -> None:
    """Compare the methods on a small model, and say in words what came of it."""
    out = Path(options.out)
    check_folder(out, options, resume=options.resume, free=("methods",))
    from bayeslora.cli import build, progress
    from bayeslora.comparison.base import BASE
    from bayeslora.comparison.verdict import guess, in_words, verdicts

    with progress.own_progress():
        runs, other = prepared(options, out)
        with opened(out, options):
            comparison = build.finish(runs, methods_of(options), [options.seed], "png")
    test = runs.test
    results = {name: by_seed[options.seed] for name, by_seed in comparison.results.items() if name != BASE}
    predictions = {name: result.prediction for name, result in results.items()}
    others = {name: result.ood[other] for name, result in results.items()}
    even = None if test.probs is None else guess(test.probs)
    print()
    settings = {name: " ".join(words) for name, words in _settings(options).items()}
    print("\n".join(in_words(verdicts(predictions, test.labels, others, test.probs), even, other, settings)))


def methods_of(options: Options) -> dict[str, Inference]:
    """Return the methods by their names; SWAG with its learning rate, BLoB on the evidence bound."""
    from bayeslora.cli.settings import build_method

    settings = _settings(options)
    return {name: build_method(name, settings.get(name, [])) for name in options.methods}


def _settings(options: Options) -> dict[str, list[str]]:
    """Return what methods have beside their defaults."""
    return {"swag": [f"learning_rate={options.swag_learning_rate}"], "blob": ["update=elbo"]}


def prepared(options: Options, out: Path, dtype: torch.dtype | None = None) -> tuple[CachedRuns, str]:
    """Return what is the same for all methods, with its files in ``out``, and the name of the other data."""
    from bayeslora.cli import build, data, terminal
    from bayeslora.cli.demo.model import demo_encoder, demo_model
    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.models import load_model
    from bayeslora.tasks.reviews import review_ood, review_task
    from bayeslora.tasks.synthetic import chance_ood, chance_task

    train, test, seed, name = options.train_rows, options.test_rows, options.seed, "weather and trains"
    if options.task == "reviews":
        task, other = review_task(train, 100, test, seed), review_ood(test // 2, seed)
    elif options.task == "chance":
        task, other = chance_task(train, test_rows=test, seed=seed), chance_ood(test // 2, seed)
    else:
        name = "mmlu_chemistry"
        tasks = TaskOptions(
            task=options.task,
            data=options.data,
            readout="likelihood",
            validation=0.2,
            train_rows=train,
            test_rows=test,
            task_seed=seed,
        )
        task = data.build_task(tasks)
        if task.test is None:
            raise InputError(f"the task {task.name} has no test examples")
        other = data.other_splits([name], tasks, task.test)[name]
    if task.train is None or task.test is None:
        raise InputError(f"the task {task.name} lacks a train or a test split")
    if options.task == "reviews":
        batch, modules, folder = 8, ["query", "value"], demo_encoder()
    else:
        batch, modules, folder = 10, ["q_proj", "v_proj"], demo_model()
    model, tokenizer = load_model(folder, task.train.classes, target_modules=modules, dtype=dtype)
    training = TrainingOptions(epochs=options.epochs, batch_size=batch, learning_rate=options.learning_rate)
    args = build.build_arguments(training, out / "training", seed)
    report, others = terminal.say, {name: other}
    runs = CachedRuns(model, tokenizer, task, args, out, others, draws=options.draws, resamples=200, report=report)
    return runs, name
