"""``bayeslora predict``."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslora.cli.options import PredictOptions, option, run_option
from bayeslora.cli.runs import run_folder
from bayeslora.errors import InputError
from bayeslora.files import write_text

if TYPE_CHECKING:
    from bayeslora.metrics.prediction import Prediction
    from bayeslora.posteriors.provenance import Origin
    from bayeslora.tasks import Rows
    from bayeslora.tasks.types import Split

EXAMPLES = """examples:
  bayeslora predict run --input new.jsonl --output answers.jsonl
  echo '{"question": "What do plants breathe in?", "choices": ["carbon dioxide", "gold"]}' | bayeslora predict run

Each row comes back with: answer, confidence, probs, entropy, mutual_information (what more data could tell; nats),
disagreement (share of draws with another answer), draws (how many were taken) and monte_carlo_error (how far the
probabilities may be off for want of more). The data that the run was trained on are not needed."""


@dataclass(kw_only=True)
class Options(PredictOptions):
    """Answer rows of a JSON-lines or CSV file, or of standard input, with each answer's uncertainty."""

    run: str = run_option("name what to predict with: bayeslora predict RUN --input FILE")
    input: str = option("-", "JSON-lines or CSV file; -: standard input.")
    output: str = option("-", "File for the answers, .jsonl or .csv; -: standard output, as JSON lines.")
    overwrite: bool = option(False, "Replace an output file that is there.")


def run(options: Options) -> None:
    """Read rows, answer them, and write them with their answers."""
    target = None if options.output == "-" else _target(Path(options.output), options.overwrite)
    from bayeslora.cli.build import load_transformed, model_for, predict_as
    from bayeslora.cli.progress import own_progress
    from bayeslora.cli.terminal import say
    from bayeslora.tasks import read_rows

    with own_progress():
        if options.input == "-" and sys.stdin.isatty():
            say("reading rows from the terminal; Ctrl-D ends them (or give --input FILE)")
        rows = read_rows(sys.stdin if options.input == "-" else options.input)
        posterior = load_transformed(options.run, options)
        split = _split(rows, options, posterior.origin)
        model, tokenizer = model_for(posterior, options, split.classes)
        prediction = predict_as(options, model, tokenizer, posterior, split)
        answers = answered(rows, split, prediction)
        renamed = [key.removeprefix("predicted_") for key in answers[0] if key.startswith("predicted_")]
        for key in (k for k in renamed if k in rows.columns):
            say(f"the rows have a column {key!r} of their own: the model's is predicted_{key}")
    text = _csv(answers) if target is not None and target.suffix == ".csv" else _jsonl(answers)
    if target is None:
        print(text, end="", flush=True)
    else:
        write_text(target, text)


def answered(rows: Rows, split: Split, prediction: Prediction) -> list[dict[str, object]]:
    """Return each row with its answer and its uncertainty; a field that the row has already is ``predicted_``…."""
    columns = {key for row in rows for key in row}
    scores = {
        "confidence": prediction.confidence,
        "entropy": prediction.entropy,
        "mutual_information": prediction.mutual_information,
        "disagreement": prediction.disagreement,
    }
    if prediction.monte_carlo_error is not None:
        scores["monte_carlo_error"] = prediction.monte_carlo_error
    counts = prediction.draws_taken.tolist()
    every, answers = prediction.probs, prediction.answer
    answered_rows = []
    for i, (row, example) in enumerate(zip(rows, split, strict=True)):
        probs = every[i, : len(example.choices)].tolist()
        new = {
            "answer": example.choices[int(answers[i])],
            **{name: round(float(values[i]), 6) for name, values in scores.items()},
            "draws": counts[i],
            "probs": {c: round(p, 6) for c, p in zip(example.choices, probs, strict=True)},
        }
        answered_rows.append({**row, **{f"predicted_{k}" if k in columns else k: v for k, v in new.items()}})
    return answered_rows


def _target(path: Path, overwrite: bool) -> Path:
    """Return the output's path, if it can be written: better refused now than after the work."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already; add --overwrite or choose another --output")
    if path.suffix not in (".jsonl", ".csv"):
        raise InputError(f"{path} ends in neither .jsonl nor .csv; name it so")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: there is no folder {path.parent} to write in")
    return path


def _split(rows: Rows, options: Options, origin: Origin | None) -> Split:
    """Return the rows as examples of the task that was trained on."""
    from bayeslora.cli.data import build_task, format_from_options, saved_format, scored_as, split_like

    like, tasks = saved_format(run_folder(Path(options.run)), options), scored_as(options, origin)
    if like is None and not tasks.task and not tasks.data and (tasks.classes or "choices" in rows.columns):
        like = format_from_options(tasks, rows.name, origin)
    if like is None:
        task = build_task(tasks)
        like = next((s for s in (task.train, task.test) if s is not None), None)
    if like is None:
        raise InputError(f"the task {options.task} has no examples to take the format from")
    return split_like(rows, like, tasks)


def _jsonl(answers: Sequence[Mapping[str, object]]) -> str:
    """Return answers as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in answers)


def _csv(answers: Sequence[Mapping[str, object]]) -> str:
    """Return answers as CSV, lists and mappings as JSON in their cell."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for row in answers for key in row))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in answers:
        writer.writerow(
            {k: json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v for k, v in row.items()}
        )
    return buffer.getvalue()
