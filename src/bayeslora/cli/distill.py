"""``bayeslora distill``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.options import (
    RUN,
    DrawOptions,
    ModelOptions,
    TaskOptions,
    TrainingOptions,
    TransformOptions,
    option,
)
from bayeslora.cli.runs import check_folder, opened

EXAMPLES = """examples:
  bayeslora distill run --out one                             from the run's validation rows, else its training rows
  bayeslora distill run --input unlabelled.jsonl --epochs 5 --out one

The result is an ordinary adapter whose probabilities are close to those of the draws, at the cost of one pass. What the
draws disagree about (mutual information) is lost. Rows that were not trained on are the better ones to learn from."""


@dataclass(kw_only=True)
class Options(ModelOptions, TaskOptions, TrainingOptions, DrawOptions, TransformOptions):
    """Train one plain adapter to answer as a posterior's draws do on average; it is kept in --out with its metrics."""

    run: str = option("", RUN, required="name the posterior: bayeslora distill RUN --out FOLDER")
    input: str = option("", "JSON-lines or CSV file with rows to learn from, without answers; empty: the task's own.")
    held_out: float = option(0.2, "Share of the rows that choose which epoch is kept; 0: the last one is.", most=1)
    seed: int = option(0, "Seed of the order of the rows, and of which are held out.")
    resamples: int = option(1000, "Bootstrap resamples for the 95 % intervals of the test metrics; 0: none.")
    out: str = option("bayeslora-distilled", "Folder for the results.")


def run(options: Options) -> None:
    """Distil, keep the adapter, and measure it on the test split if there is one with labels."""
    out = Path(options.out)
    check_folder(out, options, resume=False)
    from bayeslora.cli import build, data, progress, terminal
    from bayeslora.training.distillation import distill

    with progress.own_progress():
        posterior = build.load_transformed(options.run, options)
        args = build.build_arguments(options, out / "training", options.seed, options.device)
        task = data.build_task(data.scored_as(options, posterior.origin), "train")
        rows = data.rows_to_learn(task, options, options.input)
        model, tokenizer = build.model_for(posterior, options, rows.classes)
        terminal.say(f"{len(rows)} rows of {rows.name}, {options.draws} draws")
        with opened(out, options):
            point = distill(
                model, posterior, rows, args, build.draws_of(options, options.draws),
                held_out=options.held_out, tokenizer=tokenizer, token_budget=options.token_budget or None,
            )  # fmt: skip
            data.save_run(out, point, rows)
        learned = {} if point.origin is None else point.origin.settings
        if "held_out" in learned:
            print(
                f"divergence from the draws on {learned['held_out']} held-out rows: {learned['divergence']:.4f} nats, "
                f"of the mean {learned['divergence_of_mean']:.4f}"
            )
        build.report_run(out, model, tokenizer, point, task.test, options, options.resamples, "--mean")
