"""``bayeslora fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.options import DrawOptions, ModelOptions, TaskOptions, option
from bayeslora.cli.runs import check_folder, opened, posterior_name
from bayeslora.errors import InputError

EXAMPLES = """examples:
  bayeslora fit run --method laplace --out laplace                  around the mean of a run of `bayeslora train`
  bayeslora fit adapter --method tfb --task openbookqa --out tfb    around an adapter of PEFT, trained by anyone
  bayeslora fit run --method tfb --set scale=divergence --out tfb   its noise by the divergence of the answers
  bayeslora fit run --method temperature --set kind=vector --out scaled
  bayeslora fit swag --method divergence --set divergence=0.03 --out scaled    less or more of the noise that RUN has

Methods: laplace, mc-dropout, tfb, isotropic, temperature, divergence. temperature scales the answers of whatever
posterior RUN is, divergence its noise; the others go around its mean. Rows to fit on are the task's train and, for what
is chosen on them, validation rows."""


@dataclass(kw_only=True)
class Options(ModelOptions, TaskOptions, DrawOptions):
    """Make a posterior of an adapter that is trained already; the posterior and the test metrics are kept in --out."""

    run: str = option(
        "",
        "Folder of `bayeslora train`, a posterior's or PEFT adapter's folder, or its repository.",
        required="name the adapter: bayeslora fit RUN --method laplace --out FOLDER",
    )
    method: str = option("laplace", "laplace, mc-dropout, tfb, isotropic, temperature or divergence.")
    set: list[str] = option(
        [], "Settings of the method, key=value; values are numbers, words, true, null, or lists: betas=[0.9,0.999]."
    )
    seed: int = option(0, "Which stream of random numbers the method uses.")
    resamples: int = option(1000, "Bootstrap resamples for the 95 % intervals of the test metrics; 0: none.")
    out: str = option("bayeslora-fit", "Folder for the results.")


def run(options: Options) -> None:
    """Fit, keep the posterior, and measure it on the test split if there is one with labels."""
    out, name = Path(options.out), posterior_name(options.run)
    check_folder(out, options, resume=False)
    from bayeslora.cli import build, data, progress, settings
    from bayeslora.methods import ADJUSTMENTS, METHODS, PostHoc
    from bayeslora.params import write
    from bayeslora.posteriors.loading import load_adapter

    with progress.own_progress():
        method = settings.build_method(options.method, options.set, METHODS | ADJUSTMENTS)
        if not isinstance(method, PostHoc):
            fitted = ", ".join(key for key, kind in (METHODS | ADJUSTMENTS).items() if isinstance(kind(), PostHoc))
            raise InputError(f"{options.method} is trained: use bayeslora train. These are fitted: {fitted}")
        start = load_adapter(name)
        task = data.build_task(data.scored_as(options, start.origin), "train")
        classes = task.train.classes if task.train is not None else None
        model, tokenizer = build.model_for(start, options, classes)
        write(model, start.mean)
        with opened(out, options):
            posterior = method.fit(
                model,
                task,
                start=start if start.origin is not None and start.origin.fingerprint else None,  # not a plain adapter
                tokenizer=tokenizer,
                seed=options.seed,
                token_budget=options.token_budget or None,
            )
            data.save_run(out, posterior, task.train)
        build.report_run(out, model, tokenizer, posterior, task.test, options, options.resamples)
