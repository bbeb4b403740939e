"""Tiny models and data on disk, and runs of the command line that several tests look at."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny import TARGETS, make_base, make_split, make_tokenizer

from bayeslora.cli import main


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


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    for kind in ("llama", "bert"):
        make_base(kind).save_pretrained(path / kind)
        make_tokenizer().save_pretrained(path / kind)
    for name, count, seed in (("train", 20, 0), ("test", 13, 2)):
        write_rows(path / "marbles" / f"{name}.jsonl", question_rows(name, count, seed))
        write_rows(path / "bags" / f"{name}.csv", class_rows(name, count, seed))
    write_rows(path / "other.jsonl", question_rows("other", 9, 7))
    return Home(path)


@pytest.fixture(scope="session")
def swag_run(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of SWAG on multiple choice."""
    out = tmp_path_factory.mktemp("runs") / "swag"
    assert main(["train", *home.marbles(), *QUICK, "--draws", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def bert_run(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ensemble of two classification heads."""
    out = tmp_path_factory.mktemp("runs") / "bert"
    assert main(["train", *home.bags(), *QUICK, "--method", "ensemble:2", "--out", str(out)]) == 0
    return out


@dataclass(frozen=True)
class Said:
    """What a command left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


Bay = Callable[..., Said]


@pytest.fixture
def bay(capsys: pytest.CaptureFixture[str]) -> Bay:
    """Run the command line in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        status = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return Said(status, out, err)

    return run


@pytest.fixture
def refused(bay: Bay) -> Callable[..., str]:
    """Run a command that is to be refused, and return its one sentence."""

    def run(*words: object) -> str:
        said = bay(*words)
        assert said.status == 2, said
        assert said.err.startswith("bayeslora"), said.err
        assert "Traceback" not in said.err
        assert said.err.count("\n") == 1, said.err
        return said.err

    return run
