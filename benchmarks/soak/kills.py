"""Kill runs of every method with SIGKILL, at random moments and inside writes, and compare what they come to.

Each run trains a tiny model in a process of its own, which is killed; a second process goes on in the same folder,
unaided, and must come to the posterior of a run that was never killed, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from report import finish, row
from support.kills import METHODS, all_killed


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills of all methods together")
    parser.add_argument("--seed", type=int, default=0, help="which moments")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="methods to kill")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    tallies = all_killed(options.kills, options.seed, options.methods, lambda line: print(line, flush=True))
    kills, inside = sum(t.kills for t in tallies), sum(t.inside for t in tallies)
    faults = [fault for tally in tallies for fault in tally.faults]
    rows = [
        row("kills", kills, None, "kills"),
        row("of them inside writes", inside, None, "kills"),
        row("runs that did not resume unaided to the unbroken result", len(faults), 0, "runs"),
    ]
    finish(rows, options.json)
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
