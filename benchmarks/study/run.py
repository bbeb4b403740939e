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
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lines
from cells import BASE, STUDY, Cell, Entry, checked, passes, prepared, read_study
from paired import SCORES
from variants import TEST, Answers, answers_of, controls, of_base, prompt_ratios, with_temperature

import bayeslora as bl
from bayeslora.comparison.base import Witness, witness
from bayeslora.comparison.cached_runs import CachedRuns, learned
from bayeslora.comparison.costs import Cost
from bayeslora.comparison.scaled_runs import scaled_by_divergence
from bayeslora.errors import InputError
from bayeslora.methods import Temperature
from bayeslora.methods.base import settings
from bayeslora.metrics.uncertainty import average
from bayeslora.training import keys

VERSION = 1
"""To be raised when lines of before no longer say what would be measured today."""
COUNTS = (1, 2, 3, 5, 10)
"""Numbers of draws whose measures a line has."""


def key_of(cell: Cell, entry: Entry) -> str:
    """Return the key of all that a method's lines in a cell depend on, but for the seed."""
    method = None if entry.method is None else keys.of_method(entry.method)
    more = {"divergence": entry.scaled} if entry.scaled else {}
    return keys.key_of({"study": VERSION, "cell": cell.config, "method": method, "draws": asdict(entry.draws), **more})


def rows_of(runs: CachedRuns, base: Witness | None, entry: Entry, seed: int) -> Iterator[tuple[Answers, Cost]]:
    """Yield the rows that follow from a method, with what they cost; the base beside them where it has answers."""
    if entry.method is None:
        if base is not None:
            yield of_base(runs, base), Cost(0.0, None, None, 0)
        return
    fitted = learned(runs, entry.method, seed)
    own = answers_of(runs, base, fitted, entry.name, seed)
    if entry.name == "map" and base is not None:
        own = replace(own, ratios=prompt_ratios(runs, fitted.posterior))
    every = [own, *controls(runs, base, entry, fitted, own, seed)]
    if entry.scaled:
        row = f"{entry.name}, scaled by divergence"
        try:
            found = scaled_by_divergence(runs, fitted, row, seed, entry.scaled)
        except InputError as error:  # no scale reaches it
            found = None
            runs.report(f"no row {row}: {error}")
        if found is not None:
            every.append(answers_of(runs, base, found[0], row, seed, scale=found[1]))
    for answers in every:
        yield answers, fitted.cost
        for labels in (True, False) if base is not None else (True,):
            try:
                method = Temperature(labels=labels, prior_sigma=math.inf)  # as it is published
                yield with_temperature(answers, fitted.posterior, runs.task, method), fitted.cost
            except InputError as error:  # the base agrees on no row
                runs.report(f"{answers.row}: no temperature: {error}")


def line_of(cell: Cell, entry: Entry, seed: int, runs: CachedRuns, answers: Answers, cost: Cost) -> dict[str, Any]:
    """Return the line of one row."""
    test, foreign = answers.predictions[TEST], answers.foreign()
    result = bl.evaluate(test, runs.test, foreign, resamples=0)
    cost = replace(cost, predict_seconds=test.seconds)
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
            if predictor != BASE
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
        "config": cell.config,
        "settings": settings(entry.method) if entry.method is not None else {},
        "versions": {name: version(name) for name in ("bayeslora", "torch", "transformers", "peft")},
        "rows": {
            "labels": runs.test.labels.tolist(),
            "mean": {n: lines.packed(p.mean_log_probs) for n, p in splits.items() if p.mean_log_probs is not None},
            "draws": {n: lines.packed(p.log_p) for n, p in splits.items()},
            "mutual information": {n: lines.packed(p.mutual_information) for n, p in splits.items()},
            "prompt ratio": {n: lines.packed(ratios) for n, ratios in answers.ratios.items()},
        },
    }


def run_cell(cell: Cell, seed: int, arguments: argparse.Namespace) -> None:
    """Make the runs of a cell under a seed that have no line yet."""
    file = Path(arguments.results) / f"{cell.name}.jsonl"
    there = {(line["seed"], line["method"], line["key"]) for line in lines.read([file] if file.exists() else [])}
    wanted = [
        entry
        for entry in cell.entries
        if not arguments.methods or entry.name in arguments.methods
        if (seed, entry.name, key_of(cell, entry)) not in there
    ]
    if not wanted:
        return
    runs = prepared(cell, seed, arguments.data, Path(arguments.out), arguments.model)
    base = witness(runs) if cell.causal else None
    for entry in wanted:
        began = time.perf_counter()
        of_entry = replace(runs, draws=entry.draws)
        try:
            found = [line_of(cell, entry, seed, runs, *each) for each in rows_of(of_entry, base, entry, seed)]
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
