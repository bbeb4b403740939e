"""``bayeslora evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayeslora.cli.build import build_model, build_other, build_task, shaped
from bayeslora.cli.options import ModelOptions, PredictOptions, TaskOptions, option, parse, part
from bayeslora.cli.runs import filled, posterior_folder, write_json
from bayeslora.errors import InputError
from bayeslora.evaluation import evaluate
from bayeslora.predict import predict
from bayeslora.storage import load_posterior

EXAMPLES = """examples:
  bayeslora evaluate run                                    the test split of the task it was trained on
  bayeslora evaluate run --ood mmlu_chemistry mmlu_physics  and whether it knows what it does not know
  bayeslora evaluate run --task arc_easy --draws 30 --temperature 0.5
  bayeslora evaluate org/posterior --model org/base --task openbookqa"""


@dataclass(kw_only=True)
class EvaluateVerb(ModelOptions, TaskOptions, PredictOptions):
    """Measure a posterior on a test split: accuracy, NLL, Brier, calibration, and detection of other data."""

    run: str = option("", "Folder of `bayeslora train`, a posterior's folder, or its repository; also as first word.")
    ood: list[str] = option([], "Other tasks or files, to tell from the test split.")
    bins: int = option(15, "Bins of the calibration errors.")
    binning: Literal["width", "mass"] = option("width", "Bins of equal width, or with equally many examples.")
    resamples: int = option(1000, "Bootstrap resamples for the 95 % intervals; 0: none.")
    json: str = option("", "File for the numbers; empty: evaluation.json in the run's folder.")


def run(argv: Sequence[str]) -> None:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Raises:
        InputError: If there is no run, or nothing to evaluate on.
    """
    options = parse(EvaluateVerb, argv, verb="evaluate", examples=EXAMPLES, first="run")
    if not options.run:
        raise InputError("name what to evaluate: bayeslora evaluate RUN")
    folder = Path(options.run)
    options = filled(options, folder)
    posterior = shaped(load_posterior(posterior_folder(folder) if folder.is_dir() else options.run), options)
    tasks = part(TaskOptions, options)
    task = build_task(tasks)
    if task.test is None:
        raise InputError(f"the task {task.name} has no test examples")
    others = {Path(name).stem: build_other(name, tasks, task.test) for name in options.ood}
    model, tokenizer = build_model(part(ModelOptions, options), task.test.classes, options.readout)
    found = {
        name: predict(
            model,
            posterior,
            split,
            options.draws,
            seed=options.draw_seed,
            tokenizer=tokenizer,
            token_budget=options.token_budget,
            progress=True,
        )
        for name, split in {"": task.test, **others}.items()
    }
    prediction = found.pop("")
    result = evaluate(
        prediction, task.test, found or None, bins=options.bins, binning=options.binning, resamples=options.resamples
    )
    print(result.table())
    if prediction.truncated:
        print(
            f"{prediction.truncated} of {len(task.test)} prompts were longer than --max-length and lost their beginning"
        )
    target = Path(options.json) if options.json else folder / "evaluation.json"
    if options.json or folder.is_dir():
        write_json(target, result.to_dict())
        print(f"numbers: {target}")
