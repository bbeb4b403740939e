"""Tiny models and data on disk, and runs of the command line that several tests look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support.cli_data import POINTS, QUICK, Home, class_rows, question_rows, write_rows
from support.tiny import make_base, make_tokenizer

from bayeslora.cli import main


@pytest.fixture(scope="session")
def home(tmp_path_factory):
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
def swag_run(home, tmp_path_factory):
    """A finished run of SWAG on multiple choice."""
    out = tmp_path_factory.mktemp("runs") / "swag"
    assert main(["train", *home.marbles(), *QUICK, *POINTS, "--draws", "3", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def bert_run(home, tmp_path_factory):
    """A finished ensemble of two classification heads."""
    out = tmp_path_factory.mktemp("runs") / "bert"
    assert main(["train", *home.bags(), *QUICK, *POINTS, "--method", "ensemble:2", "--out", str(out)]) == 0
    return out


@dataclass(frozen=True)
class Said:
    """What a command left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


Bay = Callable[..., Said]


@pytest.fixture
def bay(capsys):
    """Run the command line in this process."""

    def run(*words):
        capsys.readouterr()
        status = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return Said(status, out, err)

    return run


@pytest.fixture
def refused(bay):
    """Run a command that is to be refused, and return its one sentence."""

    def run(*words):
        said = bay(*words)
        assert said.status == 2, said
        *before, sentence = said.err.splitlines()
        assert sentence.startswith("bayeslora"), said.err
        assert all(" training rows, " in line for line in before), said.err
        return sentence

    return run
