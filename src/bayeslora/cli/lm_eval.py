"""``bayeslora lm-eval``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bayeslora.cli.options import RUN, DrawOptions, ModelOptions, TransformOptions, option
from bayeslora.errors import InputError
from bayeslora.files import write_json

EXAMPLES = """examples:
  bayeslora lm-eval run --tasks arc_easy hellaswag --draws 10       with the calibration of their answers
  bayeslora lm-eval run --tasks arc_easy --mean --out mean.json     one pass at the mean, to compare with
  bayeslora lm-eval run --tasks marbles --include-path tasks        a task of your own, from a folder with its YAML

Needs pip install 'bayeslora[lm-eval]'. Likelihoods of whole answers are averaged over the draws."""
MISSING = "name what to evaluate, and tasks: bayeslora lm-eval RUN --tasks TASK …"
LEFT_OUT = ("samples", "pretty_env_info")
"""What the file for the numbers does not hold: every example, and the machine."""


@dataclass(kw_only=True)
class Options(ModelOptions, DrawOptions, TransformOptions):
    """Run tasks of the LM evaluation harness on a posterior: its own measures, and ECE, NLL and Brier beside them."""

    run: str = option("", RUN, required=MISSING)
    tasks: list[str] = option(
        [], "Tasks, groups or tags of the harness, or patterns such as 'mmlu_*'.", required=MISSING
    )
    mean: bool = option(False, "One pass at the posterior's mean, as with --draws 0.")
    limit: int = option(0, "Most examples of each task; 0: all.")
    num_fewshot: int = option(-1, "Solved examples in each prompt; -1: the task's own number.", least=-1)
    include_path: str = option("", "Folder with tasks of your own.")
    out: str = option("", "JSON file for the numbers; empty: they are only printed.")
    overwrite: bool = option(False, "Replace an --out file that is there.")


def run(options: Options) -> None:
    """Run the tasks, print the harness's table and keep the numbers."""
    if options.out and Path(options.out).exists() and not options.overwrite:
        raise InputError(f"{options.out} is there already; add --overwrite or choose another --out")
    from bayeslora.cli import build, progress, terminal
    from bayeslora.integrations.lm_eval import PosteriorLM, evaluate_tasks, find_tasks

    with progress.own_progress():
        tasks, manager = find_tasks(options.tasks, options.include_path)
        posterior = build.load_transformed(options.run, options)
        model, tokenizer = build.model_for(posterior, options, None)
        lm = PosteriorLM(
            model, posterior, build.draws_of(options, 0 if options.mean else options.draws), tokenizer=tokenizer,
            token_budget=options.token_budget or None, progress=terminal.watched(),
        )  # fmt: skip
        results = evaluate_tasks(
            lm, tasks, limit=options.limit or None, manager=manager,
            num_fewshot=None if options.num_fewshot < 0 else options.num_fewshot,
        )  # fmt: skip
    from lm_eval.utils import make_table  # the extra is there, or its lack was said

    print(make_table(results).strip())
    if results.get("groups"):
        print(make_table(results, "groups").strip())
    for task, reason in results["not_calibrated"].items():
        print(f"no calibration of {task}: {reason}")
    if options.out:
        draws = {"draws": lm.draws, "mean": options.mean or not options.draws, "seed": lm.seed, "sampling": lm.sampling}
        numbers = {key: value for key, value in results.items() if key not in LEFT_OUT} | {"posterior": draws}
        write_json(Path(options.out), json.loads(json.dumps(numbers, default=_plain)))
        print(f"numbers: {options.out}")


def _plain(value: object) -> object:
    """Return a number of numpy's as Python's, and anything else that JSON does not know as text."""
    return getattr(value, "item", lambda: str(value))()
