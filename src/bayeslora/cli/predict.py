"""``bayeslora predict``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.cli.build import build_model, build_task, shaped
from bayeslora.cli.options import ModelOptions, PredictOptions, TaskOptions, option, parse, part
from bayeslora.cli.runs import filled, posterior_folder
from bayeslora.errors import InputError
from bayeslora.predict import predict
from bayeslora.prediction import Prediction
from bayeslora.storage import load_posterior
from bayeslora.tasks import Columns, Rows, read_rows, split_from_rows
from bayeslora.tasks.types import Split

EXAMPLES = """examples:
  bayeslora predict run --input new.jsonl --output answers.jsonl
  echo '{"question": "What do plants breathe in?", "choices": ["carbon dioxide", "gold"]}' | bayeslora predict run

Each row comes back with: answer, confidence, probs, entropy, mutual_information (what more data could tell; nats) and
disagreement (share of draws with another answer)."""


@dataclass(kw_only=True)
class PredictVerb(ModelOptions, TaskOptions, PredictOptions):
    """Answer rows of a JSON-lines or CSV file, or of standard input, with each answer's uncertainty."""

    run: str = option("", "Folder of `bayeslora train`, a posterior's folder, or its repository; also as first word.")
    input: str = option("-", "JSON-lines or CSV file; -: standard input.")
    output: str = option("-", "File for the answers, .jsonl or .csv; -: standard output, as JSON lines.")
    overwrite: bool = option(False, "Replace an output file that is there.")


def run(argv: Sequence[str]) -> None:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Raises:
        InputError: If there is no run, or the output is there already.
    """
    options = parse(PredictVerb, argv, verb="predict", examples=EXAMPLES, first="run")
    if not options.run:
        raise InputError("name what to predict with: bayeslora predict RUN --input FILE")
    target = None if options.output == "-" else Path(options.output)
    if target is not None and target.exists() and not options.overwrite:
        raise InputError(f"{target} is there already; add --overwrite or choose another --output")
    folder = Path(options.run)
    options = filled(options, folder)
    posterior = shaped(load_posterior(posterior_folder(folder) if folder.is_dir() else options.run), options)
    rows = read_rows(sys.stdin if options.input == "-" else options.input)
    split = _split(rows, options)
    model, tokenizer = build_model(part(ModelOptions, options), split.classes, options.readout)
    prediction = predict(
        model,
        posterior,
        split,
        options.draws,
        seed=options.draw_seed,
        tokenizer=tokenizer,
        token_budget=options.token_budget,
        progress=sys.stderr.isatty(),
    )
    answers = answered(rows, split, prediction)
    text = _csv(answers) if target is not None and target.suffix == ".csv" else _jsonl(answers)
    if target is None:
        print(text, end="")
        return
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{target} cannot be written: {error.strerror}") from error


def answered(rows: Rows, split: Split, prediction: Prediction) -> list[dict[str, Any]]:
    """Return each row with its answer and its uncertainty.

    Args:
        rows: The rows as they were read.
        split: The same rows as examples.
        prediction: Their prediction.

    Returns:
        The row's own fields, then the answer's.
    """
    scores = {
        "confidence": prediction.confidence,
        "entropy": prediction.entropy,
        "mutual_information": prediction.mutual_information,
        "disagreement": prediction.disagreement,
    }
    found = []
    for i, (row, example) in enumerate(zip(rows, split, strict=True)):
        probs = prediction.probs[i, : len(example.choices)].tolist()
        found.append(
            {
                **row,
                "answer": example.choices[int(prediction.answer[i])],
                **{name: round(float(values[i]), 6) for name, values in scores.items()},
                "probs": {c: round(p, 6) for c, p in zip(example.choices, probs, strict=True)},
            }
        )
    return found


def _split(rows: Rows, options: PredictVerb) -> Split:
    """Return the rows as examples of the task that was trained on."""
    task = build_task(part(TaskOptions, options))
    like = next((s for s in (task.train, task.test) if s is not None), None)
    if like is None:
        raise InputError(f"the task {task.name} has no examples to take the format from")
    choices: str | tuple[str, ...] | None = None
    if options.choice_columns:
        several = len(options.choice_columns) > 1
        choices = tuple(options.choice_columns) if several else options.choice_columns[0]
    columns = Columns(options.text_column, None, choices) if options.text_column else None
    return split_from_rows(rows, like.format, name=rows.name, columns=columns, classes=like.classes)


def _jsonl(answers: Sequence[dict[str, Any]]) -> str:
    """Return answers as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)


def _csv(answers: Sequence[dict[str, Any]]) -> str:
    """Return answers as CSV, lists and mappings as JSON in their cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in answers for key in row)))
    writer.writeheader()
    for row in answers:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return buffer.getvalue()
