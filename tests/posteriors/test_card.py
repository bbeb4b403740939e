"""The card in a posterior's folder: what it says, that the Hub and PEFT can read it, and where it comes from."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from support.cli_data import QUICK, Home, question_rows, write_rows
from support.tiny import gaussian, make_base, make_model, make_task, make_tokenizer, same_params

from bayeslora.cli import main
from bayeslora.errors import InputError
from bayeslora.metrics.evaluation import Estimate, evaluate
from bayeslora.metrics.prediction import Prediction
from bayeslora.params import read
from bayeslora.posteriors import Mixture, Point
from bayeslora.posteriors.card import name_card, write_card
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.provenance import origin_of


def named(base="org/base", method="swag", **settings):
    """A posterior of a base model that has a name on the Hub."""
    posterior = gaussian(make_model())
    origin = replace(posterior.origin, base_model=base, method=method, settings=settings, num_data=1234)
    return replace(posterior, origin=origin)


@pytest.fixture(scope="module")
def scores():
    logits = torch.randn(3, 13, 4, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    return evaluate(Prediction(log_p, mean_log_probs=log_p[0]), make_task().test.labels, resamples=50)


def metrics_of(card):
    return {(result.metric_args["predictor"], result.metric_type): result for result in card.data.eval_results}


def test_every_saved_posterior_has_a_card_that_the_hub_reads(tmp_path):
    named().save_pretrained(tmp_path / "p")
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["bayeslora", "lora", "swag", "base_model:adapter:org/base"]
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "model-index" not in card.content


def test_the_card_says_method_settings_data_files_and_how_to_load(tmp_path):
    named(start=0.5, rank=5, interval=None).save_pretrained(tmp_path / "p")
    text = (tmp_path / "p" / "README.md").read_text()
    for said in (
        "learned by `swag`",
        "1,234 training examples",
        "a Gaussian with a variance of its own for each parameter",
        "| `start` | `0.5` |",
        "| `interval` | `null` |",
        'name = "p"',
        'AutoModelForCausalLM.from_pretrained("org/base")',
        "PeftModel.from_pretrained(base, name)",
        "bl.load_posterior(name, model)",
        "bl.export_draws(",
        "| `posterior.safetensors` | the spread |",
        "- PEFT ",
    ):
        assert said in text
    assert "## Evaluation" not in text


def test_the_code_on_the_card_loads_the_posterior_and_exports_draws(tmp_path, monkeypatch, tokenizer):
    make_base("llama").save_pretrained(tmp_path / "org" / "base")
    posterior = named("org/base")
    monkeypatch.chdir(tmp_path / "org")  # so that the base's name is no folder when the card is written
    posterior.save_pretrained(tmp_path / "p")
    code = [part.split("```")[0] for part in (tmp_path / "p" / "README.md").read_text().split("```python\n")[1:]]
    assert len(code) == 2
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("org/base")
    here = {"split": make_task(readout="likelihood").test}
    for part in code:
        exec(part, here)
    assert here["prediction"].draws == 10
    assert same_params(read(here["model"]), posterior.mean)
    assert len(list((tmp_path / "adapters").iterdir())) == 10


def test_an_evaluation_is_in_the_metadata_with_its_intervals(tmp_path, scores):
    named().save_pretrained(tmp_path / "p", evaluation=scores, task="openbookqa/test")
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert card.data.model_name == "swag base"
    found = metrics_of(card)
    assert {key[1] for key in found} == {"accuracy", "nll", "brier", "ece", "ece_mass", "sce", "aurc"}
    for (predictor, metric), result in found.items():
        score = scores.rows[predictor][metric]
        assert result.metric_value == pytest.approx(score.value, rel=1e-5)
        assert (result.metric_args["low"], result.metric_args["high"]) == pytest.approx(
            (score.low, score.high), rel=1e-5
        )
        assert (result.dataset_type, result.dataset_name, result.dataset_split) == (
            "allenai/openbookqa",
            "openbookqa",
            "test",
        )
        assert result.task_type == "multiple-choice"
    score = scores.rows["draws"]["nll"]
    assert f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]" in card.text
    assert "13 examples of openbookqa (test)" in card.text
    assert "average over 3 draws" in card.text


def test_scores_of_other_data_are_in_the_table_alone_and_numbers_that_are_not_finite_in_no_metadata(tmp_path, scores):
    other = {"mmlu/auroc_entropy": Estimate(0.75, math.nan, math.nan), "nll": Estimate(math.inf, math.nan, math.nan)}
    changed = replace(scores, rows={"draws": scores.rows["draws"] | other}, ood={"mmlu": 9})
    named().save_pretrained(tmp_path / "p", evaluation=changed, task="My own quiz!")
    card = ModelCard.load(tmp_path / "p" / "README.md")
    found = metrics_of(card)
    assert ("draws", "nll") not in found
    assert not any("/" in metric for _, metric in found)
    assert "| mmlu/auroc_entropy | 0.7500 |" in card.text
    assert "against 9 of mmlu" in card.text
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in found.values()} == {
        ("my-own-quiz", "My own quiz!", None)
    }


def test_a_classifiers_card_is_one_of_text_classification(tmp_path, scores):
    posterior = gaussian(make_model("bert"))
    posterior.save_pretrained(tmp_path / "p", evaluation=scores)
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert {result.task_type for result in card.data.eval_results} == {"text-classification"}
    assert {result.dataset_name for result in card.data.eval_results} == {"own data"}
    assert "AutoModelForSequenceClassification" in card.text


def test_a_base_model_and_data_in_folders_are_not_named_on_the_card(tmp_path, scores):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "quiz.csv").write_text("")
    named(str(secret)).save_pretrained(tmp_path / "p", evaluation=scores, task=str(secret / "quiz.csv"))
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert card.data.base_model is None
    assert card.data.tags == ["bayeslora", "lora", "swag"]
    assert "secret" not in card.content
    assert "quiz.csv" in card.content


def test_a_mixtures_card_is_in_its_folder_and_says_how_many_members_it_has(tmp_path):
    model = make_model()
    Mixture((gaussian(model), gaussian(model)), origin_of(model, "ensemble")).save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    assert "(2 members)" in text
    assert "`member-0` …" in text
    assert not (tmp_path / "m" / "member-0" / "README.md").exists()


def test_a_posterior_of_which_nothing_is_known_has_a_card(tmp_path):
    model = make_model()
    origin = replace(
        origin_of(model), base_model="", adapter_config={**origin_of(model).adapter_config, "task_type": None}
    )
    Point(read(model), origin).save_pretrained(tmp_path / "p")
    card = ModelCard.load(tmp_path / "p" / "README.md")
    assert (card.data.tags, card.data.pipeline_tag) == (["bayeslora", "lora"], None)
    assert "one adapter, without a spread" in card.text


def test_peft_loads_the_folder_and_goes_on_with_the_card(tmp_path):
    posterior = named()
    posterior.save_pretrained(tmp_path / "p")
    plain = PeftModel.from_pretrained(make_base("llama"), tmp_path / "p")
    assert same_params(read(plain), posterior.mean)
    before = ModelCard.load(tmp_path / "p" / "README.md")
    plain.create_or_update_model_card(str(tmp_path / "p"))
    after = ModelCard.load(tmp_path / "p" / "README.md")
    assert after.data.library_name == "peft"
    assert after.text.rstrip() == before.text.rstrip()
    assert after.text.count("### Framework versions") == 1


def test_a_card_is_written_anew_with_the_evaluation_and_nothing_else_changes(tmp_path, scores):
    named().save_pretrained(tmp_path / "p")
    before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    write_card(tmp_path / "p", evaluation=scores, task="openbookqa", name="org/mine")
    after = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    assert b'name = "org/mine"' in after["README.md"]
    assert b"## Evaluation" in after["README.md"]
    assert before.pop("README.md") != after.pop("README.md")
    assert before == after
    load_posterior(tmp_path / "p")


def test_a_name_is_put_into_a_card_that_has_the_line_and_into_no_other(tmp_path):
    named().save_pretrained(tmp_path / "p")
    card = tmp_path / "p" / "README.md"
    before = card.read_text()
    name_card(tmp_path / "p", r"org/\1")
    assert card.read_text() == before.replace('name = "p"', r'name = "org/\1"')
    card.write_text("mine\n")
    name_card(tmp_path / "p", "org/p")
    assert card.read_text() == "mine\n"
    card.unlink()
    name_card(tmp_path / "p", "org/p")
    assert not card.exists()


def test_a_folder_without_a_posterior_gets_no_card(tmp_path):
    with pytest.raises(InputError, match="is not a posterior of bayeslora") as caught:
        write_card(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_card_as_it_was(tmp_path, monkeypatch):
    named().save_pretrained(tmp_path / "p")
    before = (tmp_path / "p" / "README.md").read_text()
    files = sorted(os.listdir(tmp_path / "p"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_card(tmp_path / "p", name="other")
    assert (tmp_path / "p" / "README.md").read_text() == before
    assert sorted(os.listdir(tmp_path / "p")) == files


def test_a_disk_that_is_full_at_the_card_leaves_no_posterior(tmp_path, monkeypatch):
    write = Path.write_text

    def stops(path, *args, **kwargs):
        if path.name == "README.md":
            full()
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", stops)
    with pytest.raises(InputError, match="No space left"):
        named().save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_the_command_line_ends_with_its_scores_on_the_card(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    for name, count, seed in (("train", 20, 0), ("test", 13, 2)):
        write_rows(tmp_path / "marbles" / f"{name}.jsonl", question_rows(name, count, seed))
    words = [*Home(tmp_path).marbles(), *QUICK, "--resamples", "20", "--draws", "3", "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    card = ModelCard.load(tmp_path / "run" / "posterior" / "README.md")
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    found = metrics_of(card)
    for predictor, scores in rows.items():
        for metric, score in scores.items():
            assert found[predictor, metric].metric_value == pytest.approx(score["value"], rel=1e-5)
    assert {(result.dataset_name, result.dataset_split) for result in found.values()} == {("marbles", "test")}
    assert "swag" in card.data.tags
