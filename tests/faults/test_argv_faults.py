"""Odd command lines of every verb, up to loading: a sentence and a status, never a traceback, nothing that hangs."""

import os
import random
import signal

import pytest
from support.cli_data import question_rows, write_rows

from bayeslora.cli import VERBS, main
from bayeslora.errors import InputError

WORDS = [
    "",
    " ",
    "-",
    "--",
    "---",
    "-1",
    "0",
    "1",
    "3",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "0.5",
    "9" * 30,
    "9" * 5000,
    "1_0",
    "٣",
    "0x10",
    "x" * 300,
    "x" * 100_000,
    "\udce9",
    "é😀",
    "[" * 5000,
    "[1,2]",
    "{",
    "{}",
    "{text}",
    "{0}",
    "{a!r:>9}",
    '{"a": NaN}',
    '{"a": 1, "a": 2}',
    '{"bf16": "x"}',
    '{"output_dir": "x"}',
    '{"report_to": 5}',
    '{"fsdp": [1]}',
    '{"deepspeed": "none"}',
    '{"accelerator_config": 5}',
    '{"optim": "x"}',
    '{"seed": null}',
    '{"lr_scheduler_kwargs": "x"}',
    '{"per_device_train_batch_size": "x"}',
    "%s",
    "%(prog)s",
    "@args",
    "~nobody-here/x",
    "../..",
    "/",
    "/dev/zero",
    "/dev/null",
    "/proc/self/environ",
    "pipe",
    "folder",
    "rows.jsonl",
    "rows.csv",
    "bad.yaml",
    "bad.json",
    "none.jsonl",
    "a=b",
    "a=",
    "=",
    "rank=3",
    "a.rank=3",
    "member=swag",
    "members=0",
    "betas=[",
    "swag",
    "ivon:2",
    "ensemble:0",
    "map:x",
    "all",
    "a=map",
    "openbookqa",
    "mmlu:x",
    "mmlu:virology",
    "true",
    "null",
    "auto",
    "cpu",
    "yes",
    "no",
]
FLAGS = [
    "--model",
    "--task",
    "--data",
    "--text-column",
    "--choice-columns",
    "--label-column",
    "--classes",
    "--readout",
    "--normalisation",
    "--template",
    "--few-shot",
    "--max-length",
    "--train-rows",
    "--test-rows",
    "--validation",
    "--task-seed",
    "--epochs",
    "--max-steps",
    "--batch-size",
    "--learning-rate",
    "--scheduler",
    "--warmup",
    "--save-steps",
    "--trainer",
    "--draws",
    "--tolerance",
    "--min-draws",
    "--draw-seed",
    "--sampling",
    "--temperature",
    "--prune",
    "--last-layers",
    "--noise",
    "--method",
    "--methods",
    "--set",
    "--seed",
    "--seeds",
    "--member",
    "--resamples",
    "--out",
    "--resume",
    "--config",
    "--input",
    "--output",
    "--overwrite",
    "--json",
    "--ood",
    "--bins",
    "--temperatures",
    "--prompt",
    "--stop",
    "--tasks",
    "--limit",
    "--name",
    "--mean",
    "--host",
    "--dtype",
    "--rank",
    "--alpha",
    "--dropout",
    "--help",
    "--nonsense",
    "--learning_rate",
    "--fewest-draws",
    "--do-sample",
    "--top-p",
    "--labels",
    "-h",
    "-x",
]


def stopped(*_, **__):
    raise InputError("stopped before anything is loaded")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with good and odd files, in which nothing is loaded or fetched."""
    monkeypatch.chdir(tmp_path)
    rows = question_rows("rows", 6, 1)
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "rows.csv", [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(6)])
    (tmp_path / "bad.yaml").write_text("a: &a [*a]\n")
    (tmp_path / "bad.json").write_text("[" * 9999)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "options.json").write_text('{"data": 5, "draws": "ten"}')
    for name in (
        "bayeslora.cli.build.load_posterior",
        "bayeslora.cli.build.load_model",
        "bayeslora.posteriors.loading.load_adapter",
        "bayeslora.tasks.load.hub_rows",
        "bayeslora.tasks.reviews.review_task",
        "bayeslora.tasks.synthetic.chance_task",
        "bayeslora.integrations.lm_eval.find_tasks",
    ):
        monkeypatch.setattr(name, stopped)
    return tmp_path


@pytest.mark.parametrize("cases", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback(here, capsys, monkeypatch, cases):
    rng = random.Random(cases)
    monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115
    escaped = []
    for number in range(cases):
        verb = list(VERBS)[number % len(VERBS)]
        argv = [verb] if verb in ("train", "compare", "demo") or rng.random() < 0.2 else [verb, "folder/none"]
        if verb in ("train", "compare") and rng.random() < 0.7:
            argv += ["--data", "rows.jsonl", "--readout", "likelihood", "--model", "folder"]
        for _ in range(rng.randint(1, 4)):
            argv += rng.choices(FLAGS, k=rng.choice([0, 1, 1, 1])) + rng.choices(WORDS, k=rng.choice([0, 1, 1, 2]))
        signal.alarm(20)
        try:
            status = main(argv)
        except Exception as error:
            escaped.append(([word[:80] for word in argv], repr(error)[:200]))
            continue
        finally:
            signal.alarm(0)
            said = capsys.readouterr()
        assert status in (0, 2), argv
        assert status == 0 or said.err.startswith("bayeslora"), (argv, said.err)
    assert escaped == []
