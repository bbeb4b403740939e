"""Data on disk for the tests of the command line, and the words that name them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.tiny import TARGETS, make_split


@dataclass(frozen=True)
class Home:
    """A folder with models and data: ``llama``, ``bert``, ``marbles`` (questions) and ``bags`` (classes)."""

    path: Path

    def model(self, kind: str = "llama") -> list[str]:
        return ["--model", str(self.path / kind), "--dtype", "float32", "--target-modules", *TARGETS[kind]]

    def marbles(self) -> list[str]:
        return [*self.model(), "--data", str(self.path / "marbles"), "--readout", "likelihood"]

    def bags(self, kind: str = "bert") -> list[str]:
        columns = ["--text-column", "description", "--label-column", "colour"]
        return [*self.model(kind), "--data", str(self.path / "bags"), *columns]


POINTS = ["--resamples", "0"]
QUICK = ["--max-steps", "8", "--batch-size", "4", "--learning-rate", "1e-2"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question_rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    split = make_split(name, count, seed, classes=False)
    return [{"id": i, "question": e.text, "choices": list(e.choices), "label": e.label} for i, e in enumerate(split)]


def class_rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    split = make_split(name, count, seed, classes=True)
    return [{"description": e.text, "colour": e.choices[e.label or 0]} for e in split]
