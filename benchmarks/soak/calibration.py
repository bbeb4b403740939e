"""Simulation-based calibration of every posterior family at any size, and what wrong draws would look like.

A parameter comes from the prior, data from the parameter, and draws from the family's own code around the exact
posterior; the parameter's rank among the draws is uniform if they are right (Talts et al. 2018, arXiv 1804.06788).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from report import finish, row
from support.conjugate import CASES, QUANTITIES, p_value, ranks

FALSE_ALARM = 1e-4
"""Probability that right draws fail anywhere in a run."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=400, help="data sets of each family")
    parser.add_argument("--draws", type=int, default=11, help="draws of each posterior")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--families", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    limit, rows = -math.log10(FALSE_ALARM / (len(options.families) * len(QUANTITIES))), []
    for family in options.families:
        found = ranks(family, options.simulations, options.draws, options.seed)
        for name, numbers in found.items():
            p = min(p_value(each, options.draws) for each in numbers)
            what = "right draws" if name == "none" else f"wrong draws: {name}"
            surprise = -math.log10(max(p, 1e-300))
            rows.append(row(f"{family}, {what}: -log10 p", surprise, limit if name == "none" else None, ""))
            print(f"{family:12} {what:45} p = {p:.3g}", flush=True)
    finish(rows, options.json)


if __name__ == "__main__":
    main()
