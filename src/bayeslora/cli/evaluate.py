"""``bayeslora evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayeslora.cli import launch
from bayeslora.cli.options import RUN, PredictOptions, option
from bayeslora.cli.runs import read_options, run_folder
from bayeslora.errors import InputError
from bayeslora.files import write_json

EXAMPLES = """examples:
  bayeslora evaluate run                                    the test split of the task it was trained on
  bayeslora evaluate run --ood mmlu_chemistry mmlu_physics  and whether it knows what it does not know
  bayeslora evaluate run --task arc_easy --draws 30 --temperature 0.5
  bayeslora evaluate run --ood mmlu_chemistry --base        with the untuned model beside it, as a witness
  bayeslora evaluate org/posterior --task openbookqa        a posterior from the Hub

Model, task and draws are those of the run unless others are given."""


@dataclass(kw_only=True)
class Options(PredictOptions):
    """Measure a posterior on a test split: accuracy, NLL, Brier, calibration, and detection of other data."""

    run: str = option("", RUN, required="name what to evaluate: bayeslora evaluate RUN")
    ood: list[str] = option([], "Other tasks or files, to tell from the test split.")
    ood_rows: int = option(0, "Most rows of each of them; 0: as of the test split.")
    bins: int = option(15, "Bins of the calibration errors.", least=1)
    binning: Literal["width", "mass"] = option("width", "Bins of equal width, or with equally many examples.")
    resamples: int = option(1000, "Bootstrap resamples for the 95 % intervals; 0: none.")
    json: str = option("", "File for the numbers; empty: evaluation.json in the run's folder, which is renewed.")
    overwrite: bool = option(False, "Replace a --json file that is there.")


def run(options: Options) -> None:
    """Predict, print the metrics and keep them."""
    launch.once(lambda: _check(options))
    folder = run_folder(Path(options.run))
    from bayeslora.cli import build, data, progress
    from bayeslora.metrics.evaluation import evaluate
    from bayeslora.metrics.foreign import with_score

    before = read_options(folder)
    with progress.own_progress():
        posterior = build.load_transformed(options.run, options)
        tasks = data.scored_as(options, posterior.origin)
        test = data.test_of(tasks, folder, inherited=before.get("data") == options.data)
        others = data.other_splits(options.ood, tasks, test, options.ood_rows)
        model, tokenizer = build.model_for(posterior, options, test.classes)
        prediction = build.predict_as(options, model, tokenizer, posterior, test)
        unknown = {key: build.predict_as(options, model, tokenizer, posterior, split) for key, split in others.items()}
        asked = {"": test, **others} if options.base and others else {}
        ratios = build.prompt_ratios(options, model, tokenizer, posterior, asked)

    def measure() -> None:
        """Print and keep the metrics."""
        result = evaluate(
            prediction, test, unknown or None, bins=options.bins, binning=options.binning, resamples=options.resamples
        )
        if ratios:
            known, *foreign = (-ratio for ratio in ratios.values())
            result = with_score(result, "prompt_ratio", known, dict(zip(others, foreign, strict=True)))
        print(result.table())
        if options.json or before:
            target = Path(options.json) if options.json else folder / "evaluation.json"
            write_json(target, result.to_dict())
            print(f"numbers: {target}")

    launch.once(measure)


def _check(options: Options) -> None:
    """Refuse to replace a file: better now than after the work."""
    if options.json and Path(options.json).exists() and not options.overwrite:
        raise InputError(f"{options.json} is there already; add --overwrite or choose another --json")
