"""Verbs that several processes do together: all compute, one writes and speaks, and the results are one process's."""

import io
import json
import os
import signal
import sys

import pytest
import torch
from support.cli_data import POINTS
from support.forked import in_ranks
from transformers import Trainer

import bayeslora as bl
from bayeslora.cli import main
from bayeslora.processes import state

STEPS = ["--max-steps", "8", "--learning-rate", "1e-2", "--validation", "5", *POINTS]


@pytest.fixture
def together(tmp_path):
    """Run commands in two processes, one after another; return how each ended and what it said."""

    def run(*commands, before=lambda rank: None):
        def ranks():
            state()  # so that the group outlives a command
            before(int(os.environ["RANK"]))
            statuses = [main([str(word) for word in words]) for words in commands]
            print("statuses", statuses)
            sys.exit(max(statuses))

        return in_ranks(ranks)

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(one, other):
    """Return whether two rows of answers are the same up to rounding."""
    return all(
        one[key] == value if isinstance(value, str | int) else one[key] == pytest.approx(value, abs=2e-4)
        for key, value in other.items()
        if key not in ("text", "choices")
    )


@pytest.mark.slow
def test_all_compute_one_writes_and_the_results_are_those_of_one_process(home, tmp_path, together):
    def commands(folder, batch):
        run, task = tmp_path / folder, [*home.marbles(), *STEPS, "--batch-size", batch]
        other = str(home.path / "other.jsonl")
        return [
            ["train", *task, "--draws", 3, "--out", run / "swag"],
            ["train", *task, "--method", "ensemble:2", "--out", run / "ensemble"],
            ["fit", run / "ensemble", "--method", "temperature", *POINTS, "--out", run / "scaled"],
            ["evaluate", run / "swag", "--ood", other, "--base", *POINTS, "--json", run / "swag.json"],
            ["predict", run / "swag", "--input", other, "--base", "--output", run / "answers.jsonl"],
            ["distill", run / "swag", *STEPS[:4], *POINTS, "--batch-size", batch, "--out", run / "one"],
            ["compare", *task, "--methods", "map", "swag", "temperature", "--out", run / "table"],
        ]

    ended = together(*commands("two", 2))
    assert [status for status, _ in ended] == [0, 0], ended
    (_, first), (_, second) = ended
    assert first.count("swag on marbles: ") == 1
    said = [line for line in second.splitlines() if not line.startswith(("INFO:", "WARNING:", "statuses"))]
    assert said == ["0"]  # its exit status, by the test
    for words in commands("alone", 4):
        assert main([str(word) for word in words]) == 0
    for name in ("swag", "ensemble", "scaled", "one"):
        two, alone = (bl.load_posterior(tmp_path / folder / name / "posterior") for folder in ("two", "alone"))
        for key, value in alone.mean.items():
            torch.testing.assert_close(two.mean[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    answers = (rows_of(tmp_path / folder / "answers.jsonl") for folder in ("two", "alone"))
    assert all(close(*pair) for pair in zip(*answers, strict=True))
    for file in ("swag.json", "table/results.json"):
        two, alone = (json.loads((tmp_path / folder / file).read_text()) for folder in ("two", "alone"))
        assert numbers(two) == pytest.approx(numbers(alone), rel=1e-3, abs=1e-5)


def numbers(value, name=""):
    """Return all numbers in a file of results but times, by where they are."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in pairs for k, v in numbers(one, f"{name}/{key}").items()}
    timed = any(word in name for word in ("seconds", " s/", "×", "disk", "memory", "cost"))
    return {name: value} if isinstance(value, int | float) and not timed else {}


@pytest.mark.slow
def test_rows_of_standard_input_are_read_once(swag_run, home, together, tmp_path):
    rows = (home.path / "other.jsonl").read_text()

    def feed(rank):
        sys.stdin = io.StringIO(rows if rank == 0 else "")

    ended = together(["predict", swag_run, "--output", tmp_path / "out.jsonl"], before=feed)
    assert [status for status, _ in ended] == [0, 0], ended
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == list(range(9))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_with_one_sentence(rank, home, tmp_path, together):
    def dies(now):
        if now == rank:
            step = Trainer.training_step

            def killed(self, *args, **kwargs):
                if self.state.global_step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, *args, **kwargs)

            Trainer.training_step = killed

    ended = together(["train", *home.marbles(), *STEPS, "--out", tmp_path / "run"], before=dies)
    assert ended[rank][0] == -signal.SIGKILL
    assert ended[1 - rank][0] == 1
    sentences = [line for _, said in ended for line in said.splitlines() if line.startswith("bayeslora: ")]
    assert sentences == ["bayeslora: another process of this run has ended, so that this one cannot go on"]
    assert not any("Traceback" in said for _, said in ended)


@pytest.mark.slow
def test_what_one_process_or_all_refuse_is_said_once(home, tmp_path, together):
    words = ["train", *home.marbles(), *STEPS]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for more, sentence in (
        (["--out", tmp_path / "full"], "holds other files"),
        (["--train-rows", "x", "--out", tmp_path / "run"], "--train-rows"),
        (["--method", "blob", "--set", "rank=1", "--out", tmp_path / "run"], "rank"),
        (["--learning-rate", "1e30", "--out", tmp_path / "run"], "finite"),
    ):
        ended = together([*words, *more])
        said = [line for _, text in ended for line in text.splitlines() if line.startswith("bayeslora")]
        assert [status for status, _ in ended] == [2, 2], ended
        assert len(said) == 1, said
        assert sentence in said[0]
    assert not (tmp_path / "run").exists()
