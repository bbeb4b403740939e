"""``bayeslora train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bayeslora.cli.build import build_arguments, build_method, build_model, build_task
from bayeslora.cli.options import ModelOptions, PredictOptions, TaskOptions, TrainingOptions, option, parse, part
from bayeslora.cli.runs import open_folder, write_json
from bayeslora.evaluation import evaluate
from bayeslora.fit import fit
from bayeslora.predict import predict
from bayeslora.storage import load_posterior

EXAMPLES = """examples:
  bayeslora train --model HuggingFaceTB/SmolLM2-135M --task openbookqa --method swag --out run
  bayeslora train --model org/model --data mine --text-column question --choice-columns a b c --label-column answer \\
      --method ensemble:5 --out run
  bayeslora train --config run.yaml --learning-rate 1e-4 --out run

methods and settings (--set key=value): docs/methods; the run folder then serves evaluate, predict and export."""


@dataclass(kw_only=True)
class TrainVerb(ModelOptions, TaskOptions, TrainingOptions, PredictOptions):
    """Fine-tune a model on a task by one method; the posterior, the options and the test metrics are kept in --out."""

    method: str = option("swag", "map, ensemble:M, swag or multiswag:M.")
    set: list[str] = option([], "Settings of the method, key=value.")
    seed: int = option(0, "Seed of the run; it decides the adapter's start and the order of the data.")
    out: str = option("bayeslora-run", "Folder for the results.")
    resume: bool = option(False, "Go on with a folder that is there.")
    device: Literal["auto"] = option("auto", "The accelerator if there is one, else the CPU.")


def run(argv: Sequence[str]) -> None:
    """Run the verb.

    Args:
        argv: Arguments after the verb.
    """
    options = parse(TrainVerb, argv, verb="train", examples=EXAMPLES)
    method = build_method(options.method, options.set)
    task = build_task(part(TaskOptions, options))
    out = Path(options.out)
    args = build_arguments(part(TrainingOptions, options), out / "training", options.seed)
    train = task.train
    model, tokenizer = build_model(part(ModelOptions, options), train.classes if train else None, options.readout)
    open_folder(out, options, resume=options.resume, free=("draws", "draw_seed", "token_budget"))
    if (out / "posterior").exists():
        posterior = load_posterior(out / "posterior")
        print(f"{out / 'posterior'} is trained already")
    else:
        from bayeslora.params import initialise

        initialise(model, options.seed)
        posterior = fit(model, task, method, args, tokenizer=tokenizer, resume=options.resume)
        posterior.save_pretrained(out / "posterior")
    if task.test is not None and all(e.label is not None for e in task.test):
        prediction = predict(
            model,
            posterior,
            task.test,
            options.draws,
            seed=options.draw_seed,
            tokenizer=tokenizer,
            token_budget=options.token_budget,
            progress=True,
        )
        result = evaluate(prediction, task.test)
        write_json(out / "evaluation.json", result.to_dict())
        print(result.table())
    print(f"posterior: {out / 'posterior'}   (bayeslora evaluate {out}, predict {out}, export {out})")
