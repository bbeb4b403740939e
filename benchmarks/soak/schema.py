"""Requests that fit the server's own description, and requests that do not: schemathesis with all its checks.

A tiny model is served by uvicorn with a key. What JSON Schema cannot say is left out of the cases by `soak.hooks`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import finish, row
from soak.served import KEY, serving

OPERATIONS = 6
"""Of the description, among which the cases are divided."""


def run(cases: int, seed: int, port: int, phases: str) -> dict[str, Any]:
    """Return schemathesis' report of about as many cases."""
    with tempfile.TemporaryDirectory() as folder, serving(port, tokens=8, characters=64, timeout=60):
        report = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"http://127.0.0.1:{port}/openapi.json",
            "--checks", "all", "--phases", phases, "--header", f"Authorization: Bearer {KEY}", "--continue-on-failure",
            "--max-examples", str(max(1, cases // OPERATIONS)), "--seed", str(seed),
            "--report", "json", "--report-json-path", str(report),
        ]  # fmt: skip
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "soak.hooks", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(command, cwd=folder, env=environment, check=False)
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def main() -> None:
    """Run the cases, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="how many requests at least, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful", help="of schemathesis")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", help="file to write the rows to")
    asked = parser.parse_args()
    found = run(asked.cases, asked.seed, asked.port, asked.phases)
    rates = [numbers for phases in found["valid_rates"].values() for numbers in phases.values()]
    finish(
        [
            row("cases generated", found["test_cases"]["generated"], None, "cases"),
            row("cases that fit, accepted", sum(numbers["accepted"] for numbers in rates), None, "cases"),
            row("cases with a failure", found["test_cases"]["with_failures"], 0, "cases"),
            row("kinds of failure", found["test_cases"]["unique_failures"], 0, "kinds"),
            row("errors of the tool", found["test_cases"]["errored"], 0, "cases"),
            row("exit status", found["exit_code"], 0, "status"),
        ],
        asked.json,
    )


if __name__ == "__main__":
    main()
