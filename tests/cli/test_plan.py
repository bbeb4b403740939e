"""A comparison in jobs for a scheduler gives the table of the comparison in one."""

import json
import shutil

import pytest
from support.cli_data import POINTS, QUICK


@pytest.fixture(scope="module")
def words(home):
    return [
        *home.marbles(), *QUICK, *POINTS, "--methods", "map", "fast=swag", "--set", "fast.rank=2", "--seeds", "0", "1",
        "--ood", str(home.path / "other.jsonl"), "--draws", "3",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_jobs_of_a_plan_make_the_table_of_one_comparison(bay, refused, words, tmp_path):
    plan = tmp_path / "plan"
    said = bay("compare", *words, "--plan", plan)
    assert "4 jobs" in said.out
    assert "4 of 4 jobs are not done, the first of them 0 (map, seed 0)" in refused("compare", "--gather", plan)
    jobs = sorted((plan / "jobs").iterdir())
    for job in reversed(jobs):
        assert bay("compare", "--config", job).status == 0
    again = bay("compare", "--config", jobs[0])
    assert again.status == 0
    assert "training" not in again.err
    gathered, whole = bay("compare", "--gather", plan), bay("compare", *words, "--out", tmp_path / "whole")
    assert (gathered.status, whole.status) == (0, 0), gathered.err
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (plan, tmp_path / "whole"))
    assert one["evaluations"] == other["evaluations"]
    assert [row["method"] for row in one["rows"]] == [row["method"] for row in other["rows"]]
    shutil.rmtree(plan / "runs" / "3")
    assert "1 of 4 jobs are not done, the first of them 3 (fast=swag, seed 1)" in refused("compare", "--gather", plan)


def test_plans_that_cannot_be_written_or_gathered_are_refused(refused, words, tmp_path):
    (tmp_path / "file").touch()
    assert "is there already" in refused("compare", *words, "--plan", tmp_path)
    assert "holds no plan" in refused("compare", "--gather", tmp_path)
    assert "names none of the methods mop" in refused(
        "compare", *words, "--methods", "mop", "--plan", tmp_path / "plan"
    )
    assert "name a base model" in refused("compare", "--task", "openbookqa", "--plan", tmp_path / "plan")
