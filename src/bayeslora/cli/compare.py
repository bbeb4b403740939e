"""``bayeslora compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.cli.build import build_arguments, build_method, build_model, build_other, build_task
from bayeslora.cli.options import ModelOptions, PredictOptions, TaskOptions, TrainingOptions, option, parse, part
from bayeslora.cli.runs import open_folder, write_json
from bayeslora.compare import Comparison, Study, compare
from bayeslora.errors import InputError
from bayeslora.report.tables import comparison_rows, text_table
from bayeslora.tasks.types import Task

EXAMPLES = """examples:
  bayeslora compare --model HuggingFaceTB/SmolLM2-135M --task openbookqa --readout likelihood --train-rows 500 \\
      --methods map ensemble:5 swag multiswag:3 --seeds 0 1 --ood mmlu_chemistry mmlu_physics --out comparison

What methods share is trained once: MAP is the ensemble's first member, SWAG goes on from MAP and is MultiSWAG's first
run. --out then holds results.json, results.md and figures: reliability, risk-coverage, overconfidence."""


@dataclass(kw_only=True)
class CompareVerb(ModelOptions, TaskOptions, TrainingOptions, PredictOptions):
    """Run several methods on one task with several seeds, and print one table, mean ± sd over the seeds."""

    methods: list[str] = option(["map", "ensemble:5", "swag", "multiswag:3"], "Methods to compare.")
    set: list[str] = option([], "Settings of a method, method.key=value, such as swag.rank=10.")
    seeds: list[int] = option([0], "Seeds; each is a whole comparison.")
    ood: list[str] = option([], "Other tasks or files, to tell from the test split.")
    swag_share: float = option(0.5, "Length of SWAG's constant phase, as a share of MAP's steps.")
    bins: int = option(15, "Bins of the calibration errors.")
    resamples: int = option(200, "Bootstrap resamples for the intervals in results.json; 0: none.")
    image: str = option("png", "Format of the figures: png or svg.")
    out: str = option("bayeslora-comparison", "Folder for the results.")
    resume: bool = option(False, "Go on with a folder that is there.")


def run(argv: Sequence[str]) -> None:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Raises:
        InputError: If the task has no test split, or the image format is unknown.
    """
    options = parse(CompareVerb, argv, verb="compare", examples=EXAMPLES)
    if options.image not in ("png", "svg"):
        raise InputError(f"--image must be png or svg, and it is {options.image!r}")
    methods = {
        name: build_method(name, [s.partition(".")[2] for s in options.set if s.split(".")[0] == name.split(":")[0]])
        for name in options.methods
    }
    tasks = part(TaskOptions, options)
    task = build_task(tasks)
    if task.test is None or task.train is None:
        raise InputError(f"the task {task.name} lacks a train or a test split")
    others = {Path(name).stem: build_other(name, tasks, task.test) for name in options.ood}
    out = Path(options.out)
    args = build_arguments(part(TrainingOptions, options), out / "training", 0)
    model, tokenizer = build_model(part(ModelOptions, options), task.train.classes, options.readout)
    open_folder(out, options, resume=options.resume, free=("methods", "seeds", "bins", "resamples", "image"))
    study = Study(
        model, tokenizer, task, args, out, others, options.swag_share, options.draws, options.token_budget,
        options.resamples, options.bins,
    )  # fmt: skip
    found = compare(study, methods, options.seeds)
    present(found, task, out, options.image)


def present(found: Comparison, task: Task, out: Path, image: str) -> None:
    """Print a comparison's table and write it, its numbers and its figures.

    Args:
        found: The comparison.
        task: The task it was made on.
        out: Folder of the results.
        image: ``png`` or ``svg``.
    """
    rows = comparison_rows(found)
    print()
    print(text_table(rows))
    (out / "results.md").write_text(text_table(rows, markdown=True) + "\n", encoding="utf-8")
    numbers: dict[str, Any] = {
        "rows": rows,
        "evaluations": {m: {s: e.to_dict() for s, e in by.items()} for m, by in found.evaluations.items()},
        "train_rows": len(task.train) if task.train is not None else 0,
        "test_rows": len(task.test) if task.test is not None else 0,
    }
    write_json(out / "results.json", numbers)
    for path in draw(found, task, out, image):
        print(f"figure: {path}")
    print(f"numbers: {out / 'results.json'}")


def draw(found: Comparison, task: Task, out: Path, image: str) -> list[Path]:
    """Draw a comparison's figures, of the first seed.

    Args:
        found: The comparison.
        task: The task it was made on.
        out: Folder of the results.
        image: ``png`` or ``svg``.

    Returns:
        The files; none where matplotlib is not installed.
    """
    from bayeslora.report import overconfidence_picture, reliability_diagram, risk_coverage_plot, save

    assert task.test is not None
    seed = next(iter(next(iter(found.predictions.values()))))
    predictions = {name: by_seed[seed] for name, by_seed in found.predictions.items()}
    labels = task.test.labels
    curves = {name: (p.log_p, labels) for name, p in predictions.items()}
    ood = {name: list(found.ood[name][seed].values()) for name in predictions}
    try:
        figures = {
            "reliability": reliability_diagram(curves),
            "risk-coverage": risk_coverage_plot(curves),
            "overconfidence": overconfidence_picture(
                predictions, labels, {n: o[0] for n, o in ood.items() if o} or None, task.test.probs
            ),
        }
    except InputError as error:
        print(f"no figures: {error}")
        return []
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.{image}")
        save(figure, paths[-1])
    return paths
