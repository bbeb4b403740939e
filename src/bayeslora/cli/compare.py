"""``bayeslora compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayeslora.cli import launch
from bayeslora.cli.options import SAVING, TrainOptions, option
from bayeslora.cli.runs import check_folder, opened
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora compare --model HuggingFaceTB/SmolLM2-135M --task openbookqa --readout likelihood --train-rows 500 \\
      --methods map ensemble:5 swag multiswag:3 --seeds 0 1 --ood mmlu_chemistry mmlu_physics --out comparison
  bayeslora compare --model org/encoder --task sst2 --train-rows 200 --validation 200 \\
      --methods map ivon blob elbo=blob isotropic --set elbo.update=elbo --temperatures 0.1 0.3 1 --out noise

  bayeslora compare --model org/model --task openbookqa --methods map swag ivon --seeds 0 1 2 --plan grid
  bayeslora compare --config grid/jobs/0.yaml     … to 8.yaml, in any order, each on a machine of its own
  bayeslora compare --gather grid

What methods share is trained once: MAP is the ensemble's first member, SWAG goes on from MAP and is MultiSWAG's first
run. The row base is the untuned model's, where its head is not new. --out then holds results.json, results.md and
figures: reliability, risk-coverage, overconfidence."""
FREE = (
    *("plan", "gather", "keep_parts"),
    *("methods", "temperatures", "temperature_scaling", "temperature_without_labels", "divergence"),
    *("seeds", "bins", "resamples", "image"),
    *("device", "token_budget", "set", "draws", *SAVING),
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
    temperature_without_labels: bool = option(
        False, "And with a temperature that needs no labels: fitted on the validation rows where the base agrees."
    )
    divergence: float = option(
        0.0,
        "Also show every method with its noise scaled so that its answers are so many nats a row from those without, "
        "on validation rows, labelled or not; 0: not.",
    )
    seeds: list[int] = option([0], "Seeds; each is a whole comparison.")
    ood: list[str] = option([], "Other tasks or files, to tell from the test split.")
    ood_rows: int = option(0, "Most rows of each of them; 0: as of the test split.")
    swag_share: float = option(0.5, "Length of SWAG's constant phase, as a share of MAP's steps.")
    bins: int = option(15, "Bins of the calibration errors.", least=1)
    resamples: int = option(200, "Bootstrap resamples for the intervals in results.json; 0: none.")
    image: Literal["png", "svg"] = option("png", "Format of the figures.")
    out: str = option("bayeslora-comparison", "Folder for the results.")
    plan: str = option(
        "", "Run nothing, and write a job for each method and seed into this folder, for a scheduler; see --gather."
    )
    gather: str = option("", "Run nothing, and print the table of the jobs in this folder, which --plan has written.")
    keep_parts: bool = option(False, "Keep each result, so that --gather finds it; the jobs of a plan do.")
    resume: bool = option(
        False,
        "Go on with a folder that is there: methods, settings, seeds and draws may change, and what is there serves.",
    )


def run(options: Options) -> None:
    """Train, predict and evaluate what is not there yet, and write table, numbers and figures."""
    if options.plan or options.gather:
        launch.once(lambda: _plan(options) if options.plan else _gather(options))
        return
    out = Path(options.out)
    check_folder(out, options, resume=options.resume, free=FREE)
    from bayeslora.cli import build, data, progress, settings, terminal
    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.comparison.gathering import keep_parts

    with progress.own_progress():
        methods = settings.build_methods(options.methods, options.set)
        args = build.build_arguments(options, out / "training", 0, options.device)
        task = data.build_task(options)
        if task.test is None or task.train is None:
            raise InputError(f"the task {task.name} lacks a train or a test split; give a folder with files for both")
        others = data.other_splits(options.ood, options, task.test, options.ood_rows)
        model, tokenizer = build.build_model(options, task.train.classes)
        runs = CachedRuns(
            model,
            tokenizer,
            task,
            args,
            out,
            others,
            swag_share=options.swag_share,
            temperatures=options.temperatures,
            scaling=options.temperature_scaling,
            scaling_without_labels=options.temperature_without_labels,
            divergence=options.divergence or None,
            draws=options.draws,
            token_budget=options.token_budget or None,
            resamples=options.resamples,
            bins=options.bins,
            report=terminal.say,
            callbacks=build.timed_checkpoints(options),
        )
        with opened(out, options):
            comparison = build.finish(runs, methods, options.seeds, options.image)
            if options.keep_parts:
                launch.once(lambda: keep_parts(runs, comparison))


def _plan(options: Options) -> None:
    """Write the jobs of a comparison, once its methods and data are known to serve."""
    from bayeslora.cli import data, settings
    from bayeslora.cli.plan import write_plan

    typed = settings.labelled(options.methods)
    settings.build_methods(options.methods, options.set)
    if not options.model:
        raise InputError("name a base model: --model FOLDER or --model org/name")
    data.build_task(options)
    files = write_plan(Path(options.plan), options, typed, options.seeds)
    print(f"{len(files)} jobs, to be run in any order, on any machine that sees {options.plan}:")
    print(f"  bayeslora compare --config {files[0]}   … {files[-1].name}")
    print(f"then: bayeslora compare --gather {options.plan}")


def _gather(options: Options) -> None:
    """Print and keep the table of a plan's jobs; the data are read, and no model is."""
    from torch import nn

    from bayeslora.cli import build, data, plan, terminal
    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.comparison.gathering import gathered

    folder = Path(options.gather)
    whole, folders = plan.read_plan(folder, Options)
    task = data.build_task(whole)
    if task.test is None:
        raise InputError(f"the task {task.name} lacks a test split; give the data of the plan")
    others = data.other_splits(whole.ood, whole, task.test, whole.ood_rows)
    args = build.build_arguments(whole, folder / "training", 0, "cpu")
    runs = CachedRuns(
        nn.Module(), None, task, args, folder, others,
        resamples=whole.resamples, bins=whole.bins, report=terminal.say,
    )  # fmt: skip
    build.show(runs, gathered(runs, folders), whole.image)
