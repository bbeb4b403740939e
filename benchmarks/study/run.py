"""Run the study, or what is missing of it: every method of every cell under every seed, one line a run.

    python benchmarks/study/run.py --data DATA                          # all that study.yaml names, in its order
    python benchmarks/study/run.py --data DATA --cells minilm-sst2 --seeds 0 1 --methods map ivon
    python benchmarks/study/run.py --data DATA --study benchmarks/study/full.yaml --results results   # the full grid

It can be stopped at any time and goes on where it was: a run whose line is in ``--results`` with the same settings is
not made again, and adapters and predictions are kept in ``--out`` until they are no longer wanted. A method that comes
later adds its lines only. Several processes may share the folders if each has cells or seeds of its own.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lines
from cells import STUDY, Cell, Entry, checked, passes, prepared, read_study
from variants import TEST, Answers, answers_of, controls, with_temperature

import bayeslora as bl
from bayeslora.comparison.cached_runs import CachedRuns, Learned, learned
from bayeslora.errors import InputError
from bayeslora.methods import Temperature
from bayeslora.methods.base import settings
from bayeslora.metrics.classification import accuracy, brier, ece, nll
from bayeslora.metrics.uncertainty import average
from bayeslora.training import keys

VERSION = 1
"""To be raised when lines of before no longer say what would be measured today."""
COUNTS = (1, 2, 3, 5, 10)
"""Numbers of draws whose measures a line has."""
SCORES = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": brier}


def key_of(cell: Cell, entry: Entry) -> str:
    """Return the key of all that a method's lines in a cell depend on, but for the seed."""
    config = {name: value for name, value in cell.config.items() if name not in ("only", "settings", "draws_of")}
    method = None if entry.method is None else [entry.method.name, settings(entry.method)]
    return keys.key_of({"study": VERSION, "cell": config, "method": method, "draws": asdict(entry.draws)})


def rows_of(runs: CachedRuns, entry: Entry, seed: int) -> Iterator[tuple[Answers, Learned]]:
    """Yield the rows that follow from a method, with what it learned."""
    assert entry.method is not None
    fitted = learned(runs, entry.method, seed)
    own = answers_of(runs, fitted, entry.name, seed)
    every = [own]
    every += controls(runs, entry, fitted, own, seed)
    for answers in every:
        yield answers, fitted
        row = f"{answers.row} + T"
        yield with_temperature(answers, fitted.posterior, runs.task, Temperature(), row), fitted


def line_of(cell: Cell, entry: Entry, seed: int, runs: CachedRuns, answers: Answers, fitted: Learned) -> dict[str, Any]:
    """Return the line of one row."""
    test, foreign = answers.predictions[TEST], answers.foreign()
    result = bl.evaluate(test, runs.test, foreign, resamples=0)
    cost = replace(fitted.cost, predict_seconds=test.seconds)
    splits = {TEST: test, **foreign}
    return {
        "cell": cell.name,
        "seed": seed,
        "row": answers.row,
        "method": entry.name,
        "key": key_of(cell, entry),
        "metrics": {
            predictor: {name: round(estimate.value, 5) for name, estimate in scores.items()}
            for predictor, scores in result.rows.items()
        },
        "by draws": {
            str(count): {
                name: round(float(score(average(test.log_probs[:count]), runs.test.labels)), 5)
                for name, score in SCORES.items()
            }
            for count in COUNTS
            if count <= test.draws <= max(COUNTS)
        },
        "notes": {name: round(value, 6) for name, value in answers.notes.items()},
        "cost": {name: None if value is None else round(value, 2) for name, value in asdict(cost).items()},
        "passes": passes(entry.method),
        "draws": test.draws,
        "config": {name: value for name, value in cell.config.items() if name not in ("only", "settings", "draws_of")},
        "settings": settings(entry.method) if entry.method is not None else {},
        "versions": {name: version(name) for name in ("bayeslora", "torch", "transformers", "peft")},
        "rows": {
            "labels": runs.test.labels.tolist(),
            "mean": {n: lines.packed(p.mean_log_probs) for n, p in splits.items() if p.mean_log_probs is not None},
            "draws": {n: lines.packed(p.log_p) for n, p in splits.items()},
            "mutual information": {n: lines.packed(p.mutual_information) for n, p in splits.items()},
        },
    }


def run_cell(cell: Cell, seed: int, arguments: argparse.Namespace) -> None:
    """Make the runs of a cell under a seed that have no line yet."""
    file = Path(arguments.results) / f"{cell.name}.jsonl"
    there = {(line["seed"], line["method"], line["key"]) for line in lines.read([file] if file.exists() else [])}
    wanted = [
        entry
        for entry in cell.entries
        if (not arguments.methods or entry.name in arguments.methods) and entry.method is not None
        if (seed, entry.name, key_of(cell, entry)) not in there
    ]
    if not wanted:
        return
    runs = prepared(cell, seed, arguments.data, Path(arguments.out), arguments.model)
    for entry in wanted:
        began = time.perf_counter()
        of_entry = replace(runs, draws=entry.draws)
        try:
            found = [line_of(cell, entry, seed, runs, *each) for each in rows_of(of_entry, entry, seed)]
        except InputError as error:
            print(f"{cell.name}, seed {seed}, {entry.name}: failed: {error}", flush=True)
            continue
        lines.add(file, found)
        said = found[0]["metrics"]["draws"]
        figures = ", ".join(f"{name} {said[name]:.3f}" for name in ("accuracy", "nll", "ece"))
        print(f"{cell.name}, seed {seed}, {entry.name}: {figures}; {time.perf_counter() - began:.0f} s", flush=True)
        gc.collect()


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with the tasks' data")
    parser.add_argument("--study", type=Path, default=STUDY, help="the file that says what is run")
    parser.add_argument("--results", default=str(lines.RESULTS), help="folder of the lines")
    parser.add_argument("--out", default="study-runs", help="folder of adapters and predictions")
    parser.add_argument("--cells", nargs="+", help="cells; none: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds; none: all of the file")
    parser.add_argument("--methods", nargs="+", help="methods; none: all")
    parser.add_argument("--model", default="", help="folder or name of the model, in the place of every cell's")
    parser.add_argument("--check", action="store_true", help="build each cell's model without weights, and run nothing")
    arguments = parser.parse_args()
    if not arguments.data and not arguments.check:
        parser.error("name the folder with the tasks' data: --data")
    cells, seeds = read_study(arguments.study)
    if arguments.check:
        print("\n".join(checked(cell) for cell in cells))
        return
    for name in arguments.cells or ():
        if name not in {cell.name for cell in cells}:
            parser.error(f"there is no cell {name}; choose from {', '.join(cell.name for cell in cells)}")
    for seed in arguments.seeds or seeds:
        for cell in cells:
            if not arguments.cells or cell.name in arguments.cells:
                run_cell(cell, seed, arguments)


if __name__ == "__main__":
    main()
