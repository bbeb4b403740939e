"""Does the demo's cure depend on the machine? Its training part under seeds, precisions and numbers of threads.

``python benchmarks/demo_robustness.py --json FILE`` trains and evaluates what ``bayeslora demo`` shows under every
seed, in bfloat16 and float32, on one and two threads, each in a process of its own, with fewer draws, test rows and
members of the ensemble than the demo. For every method it writes ECE, KL to the truth and accuracy beside those of MAP
of the same run: the mean, and the worst run. A run that is in the ``--out`` folder is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from report import finish, row

DTYPES, THREADS = ("bfloat16", "float32"), (1, 2)


def one(arguments: argparse.Namespace, seed: int, dtype: str, out: Path) -> None:
    """Make one run, and write what came of it."""
    import torch

    from bayeslora.cli.demo import Options, methods_of, prepared
    from bayeslora.comparison.run import compare
    from bayeslora.comparison.verdict import verdicts

    options = Options(seed=seed, test_rows=arguments.test_rows, draws=arguments.draws, methods=arguments.methods)
    runs, other = prepared(options, out, getattr(torch, dtype))
    began = time.perf_counter()
    found = compare(runs, methods_of(options), [seed])
    test = runs.task.test
    judged = verdicts(
        {name: by_seed[seed].prediction for name, by_seed in found.results.items()},
        test.labels,
        {name: by_seed[seed].ood[other] for name, by_seed in found.results.items()},
        test.probs,
    )
    result = {
        "seconds": time.perf_counter() - began,
        "methods": {
            v.name: {"ece": v.ece, "kl": v.kl, "accuracy": v.accuracy, "says": v.confidence, "outcome": v.outcome}
            for v in judged
        },
    }
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.replace(out.with_suffix(".json"))


def all_of(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Return the runs' results by name, making what is not there, as many at a time as ``--jobs`` says."""
    place = Path(arguments.out)
    place.mkdir(parents=True, exist_ok=True)
    waiting = [
        (f"seed-{seed}-{dtype}-{threads}", seed, dtype, threads)
        for threads, dtype, seed in itertools.product(arguments.threads, arguments.dtypes, arguments.seeds)
    ]
    names = [name for name, *_ in waiting]
    waiting = [run for run in waiting if not (place / f"{run[0]}.json").exists()]
    while waiting:
        threads = waiting[0][3]
        batch = [run for run in waiting if run[3] == threads][: max(1, arguments.jobs // threads)]
        processes = []
        for name, seed, dtype, number in batch:
            command = [sys.executable, __file__, "--one", name, "--seeds", str(seed), "--dtypes", dtype]
            command += ["--out", str(place), "--test-rows", str(arguments.test_rows), "--draws", str(arguments.draws)]
            command += ["--methods", *arguments.methods]
            limits = {"OMP_NUM_THREADS": str(number), "MKL_NUM_THREADS": str(number)}
            print(f"{name} …", flush=True)
            processes.append(subprocess.Popen(command, env=os.environ | limits, stdout=subprocess.DEVNULL))
        for (name, *_), process in zip(batch, processes, strict=True):
            if process.wait():
                raise SystemExit(f"the run {name} failed")
            print(name, (place / f"{name}.json").read_text(encoding="utf-8"), flush=True)
        waiting = [run for run in waiting if run not in batch]
    return [(name, json.loads((place / f"{name}.json").read_text(encoding="utf-8"))) for name in names]


def summed_up(runs: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the means and the worst cases."""
    rows: list[dict[str, Any]] = []
    reference = "map"
    halved = []
    for name in dict.fromkeys(name for _, run in runs for name in run["methods"]):
        mine = [(run["methods"][name], run["methods"][reference]) for _, run in runs if name in run["methods"]]
        rows.append(row(f"{name}: runs", len(mine), None, "runs"))
        for key, unit in (("ece", "share"), ("kl", "nats"), ("accuracy", "share")):
            rows.append(row(f"{name}: {key}, mean", fmean(own[key] for own, _ in mine), None, unit))
        if name == reference:
            continue
        ratios = [own["ece"] / other["ece"] for own, other in mine]
        lost = [other["accuracy"] - own["accuracy"] for own, other in mine]
        rows.append(row(f"{name}: ECE by MAP's of the same run, mean", fmean(ratios), None, "ratio"))
        rows.append(row(f"{name}: ECE by MAP's of the same run, worst", max(ratios), None, "ratio"))
        rows.append(
            row(f"{name}: KL less MAP's, mean", fmean(own["kl"] - other["kl"] for own, other in mine), None, "nats")
        )
        rows.append(
            row(f"{name}: KL less MAP's, worst", max(own["kl"] - other["kl"] for own, other in mine), None, "nats")
        )
        rows.append(row(f"{name}: accuracy lost against MAP, mean", fmean(lost), None, "share"))
        rows.append(row(f"{name}: accuracy lost against MAP, worst", max(lost), None, "share"))
        worse = sum(own["outcome"] == "worse" for own, _ in mine)
        rows.append(row(f"{name}: runs in which it is worse than MAP beyond chance", worse, 0, "runs"))
        if name != "temperature" and max(ratios) <= 0.5 and max(lost) <= 0.02:
            halved.append(name)
    short = max(0, 2 - len(halved))
    rows.append(row("papers short of two that halve MAP's ECE in every run", short, 0, "papers"))
    print(f"{len(runs)} runs; halved in every run: {', '.join(halved) or 'none'}")
    return rows


def main() -> None:
    """Make the runs, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", help="file for the report")
    parser.add_argument("--out", default="demo-robustness", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--methods", nargs="+", default=["map", "temperature", "ensemble:2", "swag", "blob", "ivon"])
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2, help="threads in use at a time, over all processes")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments, arguments.seeds[0], arguments.dtypes[0], Path(arguments.out) / arguments.one)
        return
    finish(summed_up(all_of(arguments)), arguments.json)


if __name__ == "__main__":
    main()
