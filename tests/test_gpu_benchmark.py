"""The checks of a GPU report what fails and go on; `.ci/run` runs them all, on tiny models."""

import signal
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = signal.getsignal(signal.SIGALRM)
    import gpu

    signal.signal(signal.SIGALRM, gpu.out_of_time)
    yield gpu
    signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_a_check_that_fails_or_is_too_slow_is_a_row_and_the_others_go_on(gpu, monkeypatch):
    monkeypatch.setitem(gpu.SECONDS, "right", 2)
    checks = {
        "broken": lambda: 1 / 0,
        "slow": lambda: time.sleep(30),
        "good": lambda: [gpu.row("a figure", 1.0, 2.0)],
    }
    limited = {name: lambda work=work: gpu.attempt("right", "x", work, 1) for name, work in checks.items()}
    rows = [row for check in limited.values() for row in check()]
    assert [row["met"] for row in rows] == [False, False, True]
    assert [row.get("error", "").partition(":")[0] for row in rows] == ["ZeroDivisionError", "TimeoutError", ""]
    assert [row["met"] for row in gpu.run("right", lambda: checks)] == [False, False, False]  # the time is over then


def test_models_that_cannot_be_built_are_a_row(gpu):
    def make():
        raise RuntimeError("out of memory")

    (row,) = gpu.run("4 bits", make)
    assert (row["met"], row["error"]) == (False, "RuntimeError: out of memory")
