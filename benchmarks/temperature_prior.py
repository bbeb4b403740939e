"""What a prior on log T does to temperature scaling: NLL and ECE of test rows, by its width and the rows to fit on.

It is fitted to what the study's runs answered to their first validation rows, and judged on their test rows, over all
methods and seeds whose predictions are still in the study's ``--out``. Nothing is trained.

    python benchmarks/study/run.py --data DATA --cells smollm2-sst2 minilm-sst2 --out study-runs
    OMP_NUM_THREADS=1 python benchmarks/temperature_prior.py --data DATA --runs study-runs --json prior.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from report import finish, row
from safetensors.torch import load_file
from torch import Tensor

import bayeslora as bl
from bayeslora.methods import Temperature
from bayeslora.metrics.classification import ece, nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import average
from bayeslora.posteriors import scale
from bayeslora.tasks.types import Split

sys.path.append(str(Path(__file__).parent / "study"))
from cells import prepared, read_study, validation_of

WIDTHS = (0.5, 1.0, 2.0, math.inf)
COUNTS = (10, 20, 40, 100)


def pairs(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the draws [S N C] of each run's validation and test rows."""
    for file in sorted(folder.glob("*@validation-*.safetensors")):
        of_test = list(folder.glob(file.name.split("@")[0] + "@test-*.safetensors"))
        if len(of_test) == 1:
            yield load_file(file)["log_probs"], load_file(of_test[0])["log_probs"]


def scaled(answers: Tensor, rows: Split, test: Tensor, width: float) -> Tensor:
    """Return the average of the scaled draws of test rows [N C]."""
    found = Temperature(prior_sigma=width).scaling(Prediction(answers), rows)
    return average(scale(test, found["draws.weight"], found["draws.bias"]))


def main() -> None:
    """Fit and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the tasks' data")
    parser.add_argument("--runs", type=Path, required=True, help="the --out of the study")
    parser.add_argument("--json", help="file for the report")
    args = parser.parse_args()
    found = defaultdict(list)
    for cell in read_study()[0]:
        for folder in sorted((args.runs / cell.name).glob("seed-*")):
            runs = prepared(cell, int(folder.name.removeprefix("seed-")), args.data, args.runs)
            held_out, labels = validation_of(runs), runs.test.labels
            for answers, test in pairs(folder):
                for count in (count for count in COUNTS if count <= len(held_out)):
                    rows = held_out.take(list(range(count)))
                    every = {str(w): scaled(answers[:, :count], rows, test, w) for w in WIDTHS}
                    for width, log_p in {"without T": average(test), **every}.items():
                        found[cell.name, count, width].append((float(nll(log_p, labels)), float(ece(log_p, labels))))
            print(f"{cell.name}: {folder.name}", flush=True)
    rows = []
    for (cell, count, width), values in found.items():
        for k, (name, unit) in enumerate((("NLL", "nats"), ("ECE", ""))):
            words = f"{cell}, {count} rows, {width}: {name} of {len(values)} predictions"
            rows.append(row(words, fmean(v[k] for v in values), None, unit))
    if not rows:
        raise SystemExit(f"{args.runs} has no predictions of the study's cells; run the study with --out {args.runs}")
    finish(rows, args.json)


if __name__ == "__main__":
    try:
        main()
    except bl.InputError as error:
        raise SystemExit(str(error)) from error
