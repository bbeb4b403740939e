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

from bayeslora.cli import launch
from bayeslora.cli.options import RUN, PredictOptions, option
from bayeslora.cli.runs import run_folder
from bayeslora.errors import InputError
from bayeslora.files import write_text

EXAMPLES = """examples:
  bayeslora predict run --input new.jsonl --output answers.jsonl
  echo '{"question": "What do plants breathe in?", "choices": ["carbon dioxide", "gold"]}' | bayeslora predict run

Each row comes back with: answer, confidence, probs, entropy, mutual_information (what more data could tell; nats),
disagreement (share of draws with another answer), draws (how many were taken) and monte_carlo_error (how far the
probabilities may be off for want of more). --base adds what the untuned model says: base_probs, drift (how far tuning
moved the answer, KL in nats) and likelihood_ratio (log of the answer's probability over the base's; low is foreign).
The data that the run was trained on are not needed."""


@dataclass(kw_only=True)
class Options(PredictOptions):
    """Answer rows of a JSON-lines or CSV file, or of standard input, with each answer's uncertainty."""

    run: str = option("", RUN, required="name what to predict with: bayeslora predict RUN --input FILE")
    input: str = option("-", "JSON-lines or CSV file; -: standard input.")
    output: str = option("-", "File for the answers, .jsonl or .csv; -: standard output, as JSON lines.")
    overwrite: bool = option(False, "Replace an output file that is there.")


def run(options: Options) -> None:
    """Read rows, answer them, and write them with their answers."""
    target = None if options.output == "-" else Path(options.output)
    if target is not None:
        launch.once(lambda: _check(target, options.overwrite))
    from bayeslora.cli import build, data, progress, terminal
    from bayeslora.tasks import read_rows

    with progress.own_progress():
        if options.input == "-" and sys.stdin.isatty():
            terminal.say("reading rows from the terminal; Ctrl-D ends them (or give --input FILE)")
        rows = launch.once(lambda: read_rows(sys.stdin if options.input == "-" else options.input))
        posterior = build.load_transformed(options.run, options)
        split = data.split_as_trained(rows, options, run_folder(Path(options.run)), posterior.origin)
        model, tokenizer = build.model_for(posterior, options, split.classes)
        prediction = build.predict_as(options, model, tokenizer, posterior, split)
        answers = data.answered(rows, split, prediction)
        renamed = [key.removeprefix("predicted_") for key in answers[0] if key.startswith("predicted_")]
        for key in (k for k in renamed if k in rows.columns):
            terminal.say(f"the rows have a column {key!r} of their own: the model's is predicted_{key}")
    launch.once(lambda: _write(answers, target))


def _write(answers: Sequence[Mapping[str, object]], target: Path | None) -> None:
    """Write the answers."""
    as_json = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in answers)
    if target is None:
        print(as_json, end="", flush=True)
    else:
        write_text(target, _csv(answers) if target.suffix == ".csv" else as_json)


def _check(path: Path, overwrite: bool) -> None:
    """Refuse an output that cannot be written: better now than after the work."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already; add --overwrite or choose another --output")
    if path.suffix not in (".jsonl", ".csv"):
        raise InputError(f"{path} ends in neither .jsonl nor .csv; name it so")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: there is no folder {path.parent} to write in")


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
