"""The examples that need no network run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OFFLINE = (
    "dpo_trainer.py", "generate_and_serve.py", "hub_and_trackers.py", "lm_eval_task.py", "qlora_4bit.py",
    "reward_ensemble.py",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_an_example_runs(name, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.slow
def test_the_client_says_that_nothing_answers(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "vllm_client.py", "http://127.0.0.1:9"], cwd=tmp_path, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
