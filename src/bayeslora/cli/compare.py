"""``bayeslora compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bayeslora.cli.options import TrainOptions, option
from bayeslora.cli.runs import check_folder, opened
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from bayeslora.comparison.cached_runs import CachedRuns
    from bayeslora.comparison.run import Comparison
    from bayeslora.methods import Inference

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
    from bayeslora.comparison.cached_runs import CachedRuns

    with own_progress():
        methods = build_methods(options)
        args = build_arguments(options, out / "training", 0, device=options.device)
        task = build_task(options)
        if task.test is None or task.train is None:
            raise InputError(f"the task {task.name} lacks a train or a test split; give a folder with files for both")
        others = other_splits(options.ood, options, task.test, options.ood_rows)
        model, tokenizer = build_model(options, task.train.classes)
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
            draws=options.draws,
            token_budget=options.token_budget or None,
            resamples=options.resamples,
            bins=options.bins,
            report=say,
        )
        with opened(out, options):
            finish(runs, methods, options.seeds, options.image)


def finish(runs: CachedRuns, methods: Mapping[str, Inference], seeds: Sequence[int], image: str) -> Comparison:
    """Make a comparison, print its table and keep it with its numbers and pictures in their folder."""
    from bayeslora.comparison.report import write_pictures, write_table
    from bayeslora.comparison.run import compare

    comparison = compare(runs, methods, seeds)
    print(write_table(runs, comparison))
    pictures = write_pictures(runs, comparison, image)
    print()
    print(f"results: {runs.out / 'results.json'}, {', '.join(p.name for p in [runs.out / 'results.md', *pictures])}")
    return comparison


def build_methods(options: Options) -> dict[str, Inference]:
    """Return the methods, each with its settings."""
    from bayeslora.cli.settings import build_method

    words = [word for name in options.methods for word in (EVERY if name == "all" else (name,))]
    labelled = [(label, method) for label, _, method in (word.rpartition("=") for word in words)]
    settings: dict[str, list[str]] = {label or method.partition(":")[0]: [] for label, method in labelled}
    for item in options.set:
        label, dot, setting = item.partition(".")
        if not dot or label not in settings:
            raise InputError(
                f"--set {item!r} names none of the methods {', '.join(settings)}; write method.key=value, such as "
                "swag.rank=10"
            )
        settings[label].append(setting)
    methods: dict[str, Inference] = {}
    for label, method in labelled:
        name = label or method
        if "/" in name:
            raise InputError(f"a method's label names a file, and {name!r} cannot; write it without a slash")
        if name in methods:
            raise InputError(f"two methods are called {name}; give each a label of its own, label={method}")
        methods[name] = build_method(method, settings[label or method.partition(":")[0]])
    return methods
