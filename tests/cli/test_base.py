"""``--base``, a temperature without labels, and the row of the base, on the command line."""

import json
import math

import pytest
from support.cli_data import POINTS, QUICK, question_rows, write_rows

from bayeslora.posteriors import Scaled
from bayeslora.posteriors.loading import load_posterior


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_predict_says_what_the_base_says_and_how_far_tuning_went(bay, swag_run, tmp_path):
    rows = write_rows(tmp_path / "new.jsonl", question_rows("new", 4, 5))
    found = lines(bay("predict", swag_run, "--input", rows, "--base").out)
    plain = lines(bay("predict", swag_run, "--input", rows).out)
    for with_base, without in zip(found, plain, strict=True):
        p, q = with_base["probs"], with_base["base_probs"]
        assert list(q) == list(p) == with_base["choices"]
        assert sum(q.values()) == pytest.approx(1, abs=1e-5)
        drift = sum(p[c] * math.log(p[c] / q[c]) for c in p)
        assert with_base["drift"] == pytest.approx(drift, abs=1e-4)
        ratio = math.log(p[with_base["answer"]] / q[with_base["answer"]])
        assert with_base["likelihood_ratio"] == pytest.approx(ratio, abs=1e-4)
        assert with_base["probs"] == pytest.approx(without["probs"], abs=1e-5)
        assert not {"base_probs", "drift", "likelihood_ratio"} & without.keys()


def test_evaluate_has_the_base_beside_mean_and_draws(bay, swag_run, home, tmp_path):
    words = ["--ood", str(home.path / "other.jsonl"), *POINTS, "--json", tmp_path / "numbers.json"]
    said = bay("evaluate", swag_run, *words, "--base")
    assert said.status == 0, said.err
    assert said.out.splitlines()[2].split() == ["mean", "draws", "base"]
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert {"accuracy", "nll", "ece", "other/auroc_entropy"} <= rows["base"].keys()
    assert {"other/auroc_likelihood_ratio", "other/auroc_drift"} <= rows["draws"].keys() & rows["mean"].keys()
    assert "other/auroc_prompt_ratio" in rows["mean"].keys() - rows["draws"].keys() - rows["base"].keys()
    told = ["--task", "", "--template", "{question}"]
    one = write_rows(tmp_path / "one.jsonl", [{"question": "red", "choices": ["blue", "gold"], "label": 0}])
    kept = ["--json", tmp_path / "one.json"]
    said = bay("evaluate", swag_run, "--ood", str(one), *POINTS, "--base", *told, *kept)
    assert "no likelihood ratio of the prompts: row 0" in said.err, said


def test_where_the_head_is_new_the_base_is_refused(refused, bert_run, home):
    for verb, words in (("evaluate", POINTS), ("predict", ["--input", home.path / "bags" / "test.csv"])):
        sentence = refused(verb, bert_run, *words, "--base")
        assert "the base has no answer of its own: its classification head" in sentence
    method = ["--method", "temperature", "--set", "labels=false", "--out", home.path / "never"]
    assert "the base has no answer of its own" in refused("fit", bert_run, *method, *POINTS)


def test_a_temperature_is_fitted_without_labels(bay, home, swag_run, tmp_path):
    words = ["--method", "temperature", "--set", "labels=false", "--validation", "12", *POINTS]
    said = bay("fit", swag_run, *words, "--out", tmp_path / "out")
    assert said.status == 0, said.err
    posterior = load_posterior(tmp_path / "out" / "posterior")
    assert isinstance(posterior, Scaled)
    assert posterior.origin.settings["labels"] is False


@pytest.mark.slow
def test_compare_has_the_base_and_rows_scaled_without_labels(bay, home, tmp_path):
    methods = ["--methods", "map", "free=temperature", "--set", "free.labels=false", "--validation", "8"]
    words = [*home.marbles(), *QUICK, *POINTS, *methods, "--draws", "2"]
    scaled = ["--temperature-scaling", "--temperature-without-labels"]
    said = bay("compare", *words, *scaled, "--ood", str(home.path / "other.jsonl"), "--out", tmp_path / "out")
    assert said.status == 0, said.err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["base", "map", "map + T", "map + T without labels", "free"]
    assert {"AUROC LR", "AUROC drift"} <= rows[1].keys()
    assert (tmp_path / "out" / "overconfidence.png").exists()
    parts, plan = tmp_path / "plan", [*words, *scaled]
    assert bay("compare", *plan, "--plan", parts).status == 0
    for job in sorted((parts / "jobs").glob("*.yaml")):
        assert bay("compare", "--config", job).status == 0
    said = bay("compare", "--gather", parts)
    assert said.status == 0, said.err
    gathered = json.loads((parts / "results.json").read_text())["rows"]
    assert [row["name"] for row in gathered] == [row["name"] for row in rows]
    for one, other in zip(gathered, rows, strict=True):
        assert one["NLL"] == pytest.approx(other["NLL"], abs=1e-5)
