"""``--draws 0`` is the mean, in every verb that has draws."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.cli_data import POINTS, QUICK

from bayeslora.cli import main
from bayeslora.metrics.prediction import Prediction
from bayeslora.posteriors.loading import load_posterior

BAG = '{"question": "bag holds 3 red, 4 blue.", "choices": ["red", "blue"]}\n'


def numbers(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_evaluate_scores_the_mean_alone_and_advises_with_draws_only(bay, swag_run, tmp_path):
    found = {}
    for draws in ("0", "5"):
        said = bay("evaluate", swag_run, "--draws", draws, "--json", tmp_path / f"{draws}.json")
        assert said.status == 0, said.err
        found[draws] = numbers(tmp_path / f"{draws}.json")
        assert ("Cost: " in said.out) == (draws == "5")
    assert found["0"]["draws"] == 1
    assert found["0"]["rows"]["draws"]["nll"] == found["0"]["rows"]["mean"]["nll"]
    assert found["0"]["rows"]["mean"]["nll"] == pytest.approx(found["5"]["rows"]["mean"]["nll"], abs=1e-5)
    assert found["5"]["rows"]["draws"]["nll"] != found["5"]["rows"]["mean"]["nll"]
    assert found["0"]["recommendation"] is None
    advice = found["5"]["recommendation"]
    assert advice["gain"] == pytest.approx(
        found["5"]["rows"]["mean"]["nll"]["value"] - found["5"]["rows"]["draws"]["nll"]["value"], abs=1e-6
    )
    assert ("--draws 0" in advice["text"]) == advice["mean_suffices"]


def test_predict_answers_with_the_mean(bay, swag_run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(BAG, encoding="utf-8")
    answers = {}
    for words in (("--draws", "0"), ("--temperature", "0"), ("--draws", "3")):
        said = bay("predict", swag_run, "--input", rows, *words)
        assert said.status == 0, said.err
        answers[words] = json.loads(said.out)
    zero, cold, drawn = answers.values()
    assert zero["draws"] == 1
    assert zero["mutual_information"] == zero["monte_carlo_error"] == 0
    assert zero["probs"] == pytest.approx(cold["probs"], abs=1e-5)
    assert zero["probs"] != drawn["probs"]


def test_generate_writes_by_the_mean(bay, swag_run):
    words = ["generate", swag_run, "--prompt", "bag holds 3 red", "--max-new-tokens", "4", "--json"]
    zero, cold = (json.loads(bay(*words, *more).out) for more in (("--draws", "0"), ("--temperature", "0")))
    assert zero["text"] == cold["text"]
    assert all(token["mutual_information"] == pytest.approx(0, abs=1e-6) for token in zero["tokens"])
    each = json.loads(bay(*words, "--draws", "0", "--each").out)
    assert len(each["answers"]) == 1


def test_export_writes_the_mean(bay, swag_run, tmp_path):
    for name, words in (("zero", ["--draws", "0"]), ("mean", ["--mean"])):
        said = bay("export", swag_run, *words, "--out", tmp_path / name)
        assert said.status == 0, said.err
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("zero", "mean"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    mean = load_posterior(swag_run / "posterior").mean
    assert all(torch.equal(value, mean[key]) for key, value in one.items())


def test_distill_has_nothing_to_learn_from_the_mean(bay, swag_run, tmp_path):
    said = bay("distill", swag_run, "--draws", "0", "--out", tmp_path / "out")
    assert said.status == 2
    assert "the mean is one plain adapter already" in said.err


def test_train_and_what_goes_on_from_its_run_take_the_mean(bay, home, tmp_path):
    out = tmp_path / "run"
    said = bay("train", *home.marbles(), *QUICK, *POINTS, "--draws", "0", "--out", out)
    assert said.status == 0, said.err
    assert numbers(out / "evaluation.json")["draws"] == 1
    assert load_posterior(out / "posterior").standard_deviation()  # it has noise all the same
    said = bay("export", out, "--out", tmp_path / "exported")  # by the run's draws
    assert said.status == 0, said.err
    assert said.out.split() == [str(tmp_path / "exported")]
    said = bay("fit", out, "--method", "isotropic", "--draws", "0", "--out", tmp_path / "fitted")
    assert said.status == 0, said.err
    assert numbers(tmp_path / "fitted" / "evaluation.json")["draws"] == 1


@pytest.mark.slow
def test_compare_takes_the_mean_and_says_what_draws_add(bay, home, tmp_path):
    words = ["compare", *home.marbles(), *QUICK, "--methods", "map", "swag", "--resamples", "50"]
    words += ["--out", tmp_path / "out"]
    said = bay(*words, "--draws", "4")
    assert said.status == 0, said.err
    assert "Cost: swag, seed 0: " in said.out
    assert "Cost: map" not in said.out
    assert "Cost: swag, seed 0: " in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    said = bay(*words, "--draws", "0", "--resume")
    assert said.status == 0, said.err
    assert "Cost: " not in said.out
    files = (tmp_path / "out" / "seed-0").glob("swag-*.safetensors")
    assert sorted(Prediction.load(file).draws for file in files) == [1, 4]
    rows = numbers(tmp_path / "out" / "results.json")["rows"]
    assert [row["predictor"] for row in rows] == ["draws"] * 3  # one for the base and for each method


def test_fewer_are_refused(refused, swag_run):
    for verb in ("evaluate", "predict", "generate"):
        words = ["--prompt", "a"] if verb == "generate" else []
        assert "--draws must be a number of at least 0" in refused(verb, swag_run, *words, "--draws", "-1")
    assert main(["export", str(swag_run), "--draws", "-2", "--out", "x"]) == 2
