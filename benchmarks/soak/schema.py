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

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import finish, row
from soak.served import KEY, serving

OPERATIONS = 6


def run(cases: int, seed: int, port: int) -> tuple[int, dict[str, int], str]:
    """Return the exit status, the numbers of the report, and what was said."""
    with tempfile.TemporaryDirectory() as folder, serving(port, tokens=8, characters=64, timeout=60):
        report = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"http://127.0.0.1:{port}/openapi.json", "--checks", "all",
            "--header", f"Authorization: Bearer {KEY}", "--max-examples", str(cases // OPERATIONS), "--seed", str(seed),
            "--continue-on-failure", "--report", "json", "--report-json-path", str(report),
        ]  # fmt: skip
        hooks = {"SCHEMATHESIS_HOOKS": "soak.hooks", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **hooks}, stdout=subprocess.PIPE, text=True, check=False
        )
        print(done.stdout)
        return done.returncode, json.loads(report.read_text(encoding="utf-8")), done.stdout


def main() -> None:
    """Run the cases, print the rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="about how many requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", help="file to write the rows to")
    asked = parser.parse_args()
    status, found, _ = run(asked.cases, asked.seed, asked.port)
    print(json.dumps(found)[:3000])
    finish([row("schemathesis' exit status", status, 0, "status")], asked.json)


if __name__ == "__main__":
    main()
