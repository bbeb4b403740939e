"""``bayeslora train``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayeslora.cli.options import SAVING, TrainOptions, option
from bayeslora.cli.runs import check_folder, opened
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora train --model HuggingFaceTB/SmolLM2-135M --task openbookqa --method swag --out run
  bayeslora train --model org/model --data mine --text-column question --choice-columns a b c --label-column answer \\
      --method ensemble:5 --out run
  bayeslora train --config run.yaml --learning-rate 1e-4 --out run

--data is a folder with train, test and, if there is one, validation files, or one file to train on. Methods and their
settings (--set key=value): docs/methods. The run folder then serves evaluate, predict and export."""


@dataclass(kw_only=True)
class Options(TrainOptions):
    """Fine-tune a model on a task by one method; the posterior, the options and the test metrics are kept in --out."""

    method: str = option(
        "swag",
        "map, ensemble:M, swag, multiswag:M, ivon, blob, laplace, mc-dropout, tfb, temperature or isotropic; ivon:M is "
        "an ensemble of M.",
    )
    set: list[str] = option(
        [],
        "Settings of the method, key=value; values are numbers, words, true, null, or lists: betas=[0.9,0.999]. An "
        "ensemble hands on what it does not know to its members.",
    )
    seed: int = option(0, "Seed of the run; it decides the adapter's start and the order of the data.")
    member: int = option(
        0, "Train this member of the ensemble with --seed alone, by the method of its members; 0 has the seed itself."
    )
    non_finite: Literal["stop", "skip"] = option(
        "stop",
        "A step whose loss or gradient is not finite: stop before it, or skip it, at most 5 in a row and a tenth of "
        "all.",
    )
    resamples: int = option(1000, "Bootstrap resamples for the 95 % intervals of the test metrics; 0: none.")
    out: str = option("bayeslora-run", "Folder for the results.")
    resume: bool = option(False, "Go on with a folder that is there.")


def run(options: Options) -> None:
    """Train, keep the posterior, and measure it on the test split if there is one with labels."""
    out = Path(options.out)
    free = ("draws", "token_budget", "device", "non_finite", "resamples", *SAVING)
    check_folder(out, options, resume=options.resume, free=free)
    from bayeslora.cli import build, data, launch, progress, settings, terminal
    from bayeslora.files import standing
    from bayeslora.methods.ensemble import Ensemble, seeded
    from bayeslora.methods.steps import FiniteSteps
    from bayeslora.params import device_of, initialise, lora_parameters
    from bayeslora.posteriors.loading import load_posterior
    from bayeslora.training.run import fit

    with progress.own_progress():
        method = settings.build_method(options.method, options.set)
        if options.member and isinstance(method, Ensemble):
            raise InputError(
                f"--member {options.member} trains one member alone, and {options.method} is all of them; name the "
                f"method of its members, --method {method.member.name}"
            )
        args = seeded(build.build_arguments(options, out / "training", options.seed, options.device), options.member)
        task = data.build_task(options, "train")
        model, tokenizer = build.build_model(options, task.train.classes if task.train is not None else None)
        with opened(out, options):
            if launch.once(standing(out / "posterior").exists):
                posterior = load_posterior(out / "posterior")
                print(f"{out / 'posterior'} is trained already")
            else:
                initialise(model, args.seed)
                rows = len(task.train) if task.train is not None else 0
                adapted = sum(p.numel() for p in lora_parameters(model).values())
                what = f"{options.method} on {task.name}: {rows} training rows, {adapted:,} adapter parameters"
                terminal.say(f"{what}, on {device_of(model)}")
                more = [FiniteSteps(options.non_finite), *build.timed_checkpoints(options)]
                posterior = fit(model, task, method, args, tokenizer=tokenizer, resume=options.resume, callbacks=more)
                data.save_run(out, posterior, task.train)
            if not options.save_steps:
                launch.once(lambda: shutil.rmtree(out / "training", ignore_errors=True))
        build.report_run(out, model, tokenizer, posterior, task.test, options, options.resamples)
