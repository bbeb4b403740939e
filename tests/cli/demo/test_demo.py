"""``demo``: methods side by side, on its own data and on a known task, and a summary made of the numbers."""

import json

import pytest
from support.cli_data import question_rows, write_rows

import bayeslora.cli.demo.model

SMALL = ["--train-rows", "10", "--test-rows", "8", "--epochs", "4", "--draws", "2"]
METHODS = ["--methods", "map", "temperature", "ensemble:2", "swag"]


@pytest.fixture
def tiny_demo(home, monkeypatch):
    """The demo with tiny models in the place of MiniLM and SmolLM2."""
    monkeypatch.setattr(bayeslora.cli.demo.model, "demo_encoder", lambda: home.path / "bert")
    monkeypatch.setattr(bayeslora.cli.demo.model, "demo_model", lambda: home.path / "llama")


def check(said, out, truth, base=True):
    assert said.status == 0, said.err
    rows = json.loads((out / "results.json").read_text())["rows"]
    predictors = {"map", "temperature", "ensemble:2, mean", "ensemble:2, 2 draws", "swag, mean", "swag, 2 draws"}
    assert {row["name"] for row in rows} == predictors | ({"base"} if base else set())
    assert all(("KL to truth" in row) == truth for row in rows)
    assert (out / "overconfidence.png").stat().st_size > 10_000
    lines = said.out.splitlines()
    right = next(row["accuracy"][0] for row in rows if row["name"] == "map")
    (for_map,) = [line for line in lines if line.startswith("map says ")]
    assert f"is right {right:.0%} of the time" in for_map
    assert ("KL to the truth" in for_map) == truth
    for name in ("temperature", "ensemble:2", "swag"):
        assert sum(line.startswith(f"{name} says ") for line in lines) == 1
    assert any("over-confident" in line for line in lines)


@pytest.mark.slow
def test_it_compares_on_questions_whose_odds_are_known(bay, tiny_demo, tmp_path):
    out = tmp_path / "out"
    said = bay("demo", *SMALL, *METHODS, "--out", out)
    check(said, out, truth=True, base=False)  # an encoder's head is new
    assert "no row base: the base has no answer of its own" in said.err
    again = bay("demo", *SMALL, *METHODS, "--out", out)
    assert again.status == 2
    assert "--resume" in again.err
    assert bay("demo", *SMALL, *METHODS, "--out", out, "--resume").out.splitlines()[-3:] == said.out.splitlines()[-3:]


@pytest.mark.slow
def test_it_asks_a_language_model_about_odds(bay, tiny_demo, tmp_path):
    out = tmp_path / "out"
    check(bay("demo", "--task", "chance", *SMALL, *METHODS, "--out", out), out, truth=True)


@pytest.mark.slow
def test_it_compares_on_a_known_task_from_local_files(bay, tiny_demo, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for place, seed in (("openbookqa/train", 0), ("openbookqa/test", 1), ("mmlu/mmlu_chemistry", 2)):
        write_rows(data / f"{place}.jsonl", question_rows(place, 40, seed))
    check(bay("demo", "--task", "openbookqa", "--data", data, *SMALL, *METHODS, "--out", out), out, truth=False)


def test_a_task_that_is_not_known_is_refused_in_words(refused, tiny_demo, tmp_path):
    assert "no_such_task" in refused("demo", "--task", "no_such_task", "--out", tmp_path / "out")
