"""The examples that need no network run as they stand."""

from pathlib import Path

import pytest
from support.forked import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"
OFFLINE = (
    "training/dpo_trainer.py", "training/hub_and_trackers.py", "training/qlora_4bit.py", "training/reward_ensemble.py",
    "prediction/lm_eval_task.py", "serving/generate_and_serve.py",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_an_example_runs(name, tmp_path):
    status, said = run_script(EXAMPLES / name, folder=tmp_path)
    assert status == 0, said[-2000:]
    assert said.strip()


@pytest.mark.slow
def test_the_client_says_that_nothing_answers(tmp_path):
    status, said = run_script(EXAMPLES / "serving/vllm_client.py", "http://127.0.0.1:9", folder=tmp_path)
    assert status == 1, said
    assert "Traceback" not in said
