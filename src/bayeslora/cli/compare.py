"""``bayeslora compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from bayeslora.cli.options import TrainOptions, option
from bayeslora.cli.runs import check_folder, opened, write_json, write_text
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from bayeslora.comparison.cached_runs import Study
    from bayeslora.comparison.run import Comparison
    from bayeslora.methods import Inference
    from bayeslora.tasks.types import Task

EXAMPLES = """examples:
  bayeslora compare --model HuggingFaceTB/SmolLM2-135M --task openbookqa --readout likelihood --train-rows 500 \\
      --methods map ensemble:5 swag multiswag:3 --seeds 0 1 --ood mmlu_chemistry mmlu_physics --out comparison
  bayeslora compare --model org/encoder --task sst2 --train-rows 200 --validation 200 \\
      --methods map ivon blob elbo=blob isotropic --set elbo.update=elbo --temperatures 0.1 0.3 1 --out noise

What methods share is trained once: MAP is the ensemble's first member, SWAG goes on from MAP and is MultiSWAG's first
run. --out then holds results.json, results.md and figures: reliability, risk-coverage, overconfidence."""
EVERY = (
    *("map", "ensemble:3", "swag", "multiswag:3", "blob", "ivon", "laplace", "mc-dropout", "tfb", "temperature"),
    "isotropic",
)
"""What ``--methods all`` stands for."""
FREE = (
    *("methods", "temperatures", "temperature_scaling", "seeds", "bins", "resamples", "image"),
    *("device", "token_budget", "set", "draws"),
)
"""Options that may change when a comparison goes on: what depends on them is made anew, and the rest is taken over."""


@dataclass(kw_only=True)
class Options(TrainOptions):
    """Run several methods on one task with several seeds, and print one table, mean ± sd over the seeds."""

    methods: list[str] = option(
        ["map", "ensemble:5", "swag", "multiswag:3"],
        "Methods to compare, or all; label=method names one for --set and the table, so that it can be there twice.",
    )
    set: list[str] = option(
        [], "Settings of a method, method.key=value, such as swag.rank=10 or ivon.betas=[0.9,0.999]; null is nothing."
    )
    temperatures: list[float] = option(
        [], "Temperatures of the posterior to choose from on the validation rows, for each method with noise."
    )
    temperature_scaling: bool = option(
        False, "Also show every method with temperature scaling, fitted on the validation rows."
    )
    seeds: list[int] = option([0], "Seeds; each is a whole comparison.")
    ood: list[str] = option([], "Other tasks or files, to tell from the test split.")
    ood_rows: int = option(0, "Most rows of each of them; 0: as of the test split.")
    swag_share: float = option(0.5, "Length of SWAG's constant phase, as a share of MAP's steps.")
    bins: int = option(15, "Bins of the calibration errors.", least=1)
    resamples: int = option(200, "Bootstrap resamples for the intervals in results.json; 0: none.")
    image: Literal["png", "svg"] = option("png", "Format of the figures.")
    out: str = option("bayeslora-comparison", "Folder for the results.")
    resume: bool = option(
        False,
        "Go on with a folder that is there: methods, settings, seeds and draws may change, and what is there serves.",
    )


def run(options: Options) -> None:
    """Train, predict and evaluate what is not there yet, and write table, numbers and figures."""
    out = Path(options.out)
    check_folder(out, options, resume=options.resume, free=FREE)
    from bayeslora.cli.build import build_arguments, build_model
    from bayeslora.cli.data import build_task, other_splits
    from bayeslora.cli.progress import own_progress
    from bayeslora.cli.terminal import say
    from bayeslora.comparison.cached_runs import Study
    from bayeslora.comparison.run import compare

    with own_progress():
        methods = build_methods(options)
        args = build_arguments(options, out / "training", 0, device=options.device)
        task = build_task(options)
        if task.test is None or task.train is None:
            raise InputError(f"the task {task.name} lacks a train or a test split; give a folder with files for both")
        others = other_splits(options.ood, options, task.test, options.ood_rows)
        model, tokenizer = build_model(options, task.train.classes)
        study = Study(
            model,
            tokenizer,
            task,
            args,
            out,
            others,
            swag_share=options.swag_share,
            temperatures=options.temperatures,
            scaling=options.temperature_scaling,
            draws=options.draws,
            token_budget=options.token_budget or None,
            resamples=options.resamples,
            bins=options.bins,
            report=say,
        )
        with opened(out, options):
            finish(study, methods, options.seeds, options.image, compare)


def finish(
    study: Study, methods: Mapping[str, Inference], seeds: Sequence[int], image: str, compare: Any
) -> Comparison:
    """Make a comparison, print its table and write it, its numbers and its figures.

    Args:
        study: What is the same for all methods.
        methods: The methods by name.
        seeds: The seeds.
        image: ``png`` or ``svg``.
        compare: `bayeslora.comparison.run.compare`.

    Returns:
        The comparison.
    """
    from bayeslora.comparison.significance import marked
    from bayeslora.comparison.tables import comparison_rows, text_table, warnings

    found: Comparison = compare(study, methods, seeds)
    out, task = study.out, study.task
    rows = comparison_rows(found)
    if study.resamples and task.test is not None:
        rows = marked(found, rows, task.test.labels, bins=study.bins, resamples=study.resamples)
    failed = [
        f"no row for {name}: under seed {seed} {reason}"
        for name, by_seed in found.failures.items()
        for seed, reason in by_seed.items()
    ]
    notes = [*failed, *warnings(found)]
    print("\n".join([text_table(rows), *notes]))
    write_text(out / "results.md", "\n\n".join([text_table(rows, markdown=True), *notes]) + "\n")
    numbers: dict[str, Any] = {
        "rows": rows,
        "temperatures": found.temperatures,
        "failures": found.failures,
        "evaluations": {m: {s: e.to_dict() for s, e in by.items()} for m, by in found.evaluations.items()},
        "train_rows": len(task.train) if task.train is not None else 0,
        "test_rows": len(task.test) if task.test is not None else 0,
    }
    write_json(out / "results.json", numbers)
    figures = draw(found, task, out, image)
    print()
    print(f"results: {out / 'results.json'}, {', '.join(p.name for p in [out / 'results.md', *figures])}")
    return found


def draw(found: Comparison, task: Task, out: Path, image: str) -> list[Path]:
    """Draw a comparison's figures: the trade-off as the mean over the seeds, the others of the first seed.

    Args:
        found: The comparison.
        task: The task it was made on.
        out: Folder of the results.
        image: ``png`` or ``svg``.

    Returns:
        The files; none where matplotlib is not installed.
    """
    from bayeslora.cli.terminal import say
    from bayeslora.comparison.plots import (
        overconfidence_picture,
        reliability_diagram,
        risk_coverage_plot,
        save,
        tradeoff_plot,
    )

    assert task.test is not None
    seed = next(iter(next(iter(found.predictions.values()))))
    predictions = {name: by_seed[seed] for name, by_seed in found.predictions.items()}
    labels = task.test.labels
    curves = {name: (p.log_p, labels) for name, p in predictions.items()}
    ood = {name: list(found.ood[name][seed].values()) for name in predictions}
    points = {
        name: (
            fmean(e.value("draws", "accuracy") for e in by_seed.values()),
            fmean(e.value("draws", "ece") for e in by_seed.values()),
            fmean(c.train_seconds + (c.predict_seconds or 0.0) for c in found.costs[name].values()),
        )
        for name, by_seed in found.evaluations.items()
        if not name.endswith((" + T", " tuned"))
    }
    try:
        figures = {
            "reliability": reliability_diagram(curves),
            "risk-coverage": risk_coverage_plot(curves),
            "trade-off": tradeoff_plot(points),
            "overconfidence": overconfidence_picture(
                predictions, labels, {n: o[0] for n, o in ood.items() if o} or None, task.test.probs
            ),
        }
    except InputError as error:
        say(f"no figures: {error}")
        return []
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.{image}")
        save(figure, paths[-1])
    return paths


def build_methods(options: Options) -> dict[str, Inference]:
    """Return the methods, each with its settings."""
    from bayeslora.cli.settings import build_method

    words = [
        name.rpartition("=")  # label, sign, method
        for given in options.methods
        for name in (EVERY if given == "all" else (given,))
    ]
    labels = [label or method.partition(":")[0] for label, _, method in words]
    for item in options.set:
        method, dot, _ = item.partition("=")[0].partition(".")
        if not dot or method not in labels:
            raise InputError(
                f"--set {item!r} names none of the methods {', '.join(labels)}; write method.key=value, such as "
                "swag.rank=10"
            )
    own = {label: [s.partition(".")[2] for s in options.set if s.partition(".")[0] == label] for label in labels}
    found = {}
    for (given, _, method), label in zip(words, labels, strict=True):
        name = given or method
        if "/" in name:
            raise InputError(f"a method's label names a file, and {name!r} cannot; write it without a slash")
        if name in found:
            raise InputError(f"two methods are called {name}; give each a label of its own, label={method}")
        found[name] = build_method(method, own[label])
    return found
