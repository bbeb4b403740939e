"""``fit``: posteriors around adapters that are trained already."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from support.cli_data import POINTS, QUICK, question_rows, write_rows
from support.tiny import TARGETS, make_base

from bayeslora.cli import main
from bayeslora.methods.divergence import NOTE
from bayeslora.params import initialise
from bayeslora.posteriors import ColumnDropout, DiagonalGaussian, Linearised, LowRankGaussian, Point, Scaled
from bayeslora.posteriors.loading import load_posterior


@pytest.fixture(scope="module")
def map_run(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "map"
    words = ["--method", "map", "--dropout", "0.1", "--validation", "6"]
    assert main(["train", *home.marbles(), *QUICK, *POINTS, *words, "--out", str(out)]) == 0
    return out


def untrained(home):
    """Base and data, without the shape of an adapter."""
    words = [str(w) for w in home.marbles()]
    at = words.index("--target-modules")
    end = next((k for k in range(at + 1, len(words)) if words[k].startswith("--")), len(words))
    return words[:at] + words[end:]


@pytest.mark.parametrize(
    ("method", "settings", "family"),
    [
        ("laplace", ["prior=validation"], Linearised),
        ("tfb", ["sigma=0.01"], DiagonalGaussian),
        ("mc-dropout", ["kind=columns"], ColumnDropout),
        ("temperature", [], Scaled),
    ],
)
def test_a_runs_adapter_becomes_a_posterior_that_evaluate_reads(bay, map_run, tmp_path, method, settings, family):
    out = tmp_path / "out"
    words = [*(["--set", *settings] if settings else []), *POINTS, "--draws", "3", "--out", out]
    said = bay("fit", map_run, "--method", method, *words)
    assert said.status == 0, said.err
    posterior = load_posterior(out / "posterior")
    assert isinstance(posterior, family)
    assert posterior.origin is not None
    assert posterior.origin.method == method
    first = json.loads((out / "evaluation.json").read_text())
    said = bay("evaluate", out, *POINTS)
    assert said.status == 0, said.err
    assert json.loads((out / "evaluation.json").read_text()) == first


def test_a_plain_adapter_of_peft_becomes_a_posterior(bay, home, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    model = get_peft_model(make_base("llama"), config)
    initialise(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    words = [*untrained(home), *POINTS, "--draws", "2", "--out", tmp_path / "out"]
    said = bay("fit", tmp_path / "adapter", "--method", "isotropic", *words)
    assert said.status == 0, said.err
    assert isinstance(load_posterior(tmp_path / "out" / "posterior"), DiagonalGaussian)


@pytest.mark.parametrize(
    ("method", "settings", "family", "made_by"),
    [
        ("divergence", ["divergence=0.0001", "draws=4"], LowRankGaussian, "swag"),
        ("tfb", ["scale=divergence", "divergence=0.0001"], DiagonalGaussian, "tfb"),
        ("isotropic", ["scale=divergence", "divergence=0.0001"], DiagonalGaussian, "isotropic"),
    ],
)
def test_the_noise_of_a_run_is_scaled_by_divergence(bay, swag_run, tmp_path, method, settings, family, made_by):
    out = tmp_path / "out"
    said = bay("fit", swag_run, "--method", method, "--set", *settings, *POINTS, "--draws", "3", "--out", out)
    assert said.status == 0, said.err
    posterior = load_posterior(out / "posterior")
    assert isinstance(posterior, family)
    assert posterior.origin.method == made_by
    assert posterior.origin.settings[NOTE]["divergence"] == 0.0001
    assert posterior.origin.settings[NOTE]["scale"] > 0
    if method == "divergence":
        before = load_posterior(swag_run / "posterior")
        assert all((before.mean[name] == value).all() for name, value in posterior.mean.items())


def test_what_cannot_be_fitted_is_refused_in_one_sentence(refused, map_run, home, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "is trained: use bayeslora train" in refused("fit", map_run, "--method", "swag", *out)
    assert "name the adapter" in refused("fit", *out)
    assert "unknown method" in refused("fit", map_run, "--method", "laplas", *out)
    assert "a Point of 1 has no noise to scale" in refused("fit", map_run, "--method", "divergence", *out)
    (tmp_path / "empty").mkdir()
    assert "neither a posterior" in refused("fit", tmp_path / "empty", *untrained(home), *out)
    said = refused("fit", map_run, "--method", "temperature", "--validation", "0", *out)
    assert "validation" in said
    assert not (tmp_path / "out").exists()


def test_a_posterior_is_distilled_into_one_adapter_that_the_other_verbs_read(bay, refused, swag_run, home, tmp_path):
    out = tmp_path / "one"
    rows = [{k: v for k, v in row.items() if k != "label"} for row in question_rows("new", 9, 5)]
    unlabelled = write_rows(tmp_path / "new.jsonl", rows)
    words = ["--input", unlabelled, "--draws", "4", "--max-steps", "3", *POINTS, "--out", out]
    said = bay("distill", swag_run, *words)
    assert said.status == 0, said.err
    assert "on 2 held-out rows" in said.out
    posterior = load_posterior(out / "posterior")
    assert isinstance(posterior, Point)
    assert json.loads((out / "evaluation.json").read_text())["rows"]
    answers = bay("predict", out, "--input", unlabelled)
    assert answers.status == 0, answers.err
    assert len(answers.out.splitlines()) == 9
    assert "there already" in refused("distill", swag_run, *words)
    assert "name the posterior" in refused("distill", "--out", tmp_path / "two")
