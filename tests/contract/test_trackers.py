"""What a tracker behind the Trainer's ``report_to`` is told: the methods' figures, and calibration at evaluations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from support.methods_table import DROPOUT
from support.tiny import CHECKPOINTING, KINDS, arguments, make_model, make_task
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils
from trl import SFTConfig, SFTTrainer

from bayeslora.methods import Blob, Ensemble, Ivon, Map, Swag
from bayeslora.methods.blob.terms import kl_divergence, kl_weight
from bayeslora.methods.ivon.settings import default_ess
from bayeslora.methods.trainer_log import MetricsCallback
from bayeslora.metrics import classification as metrics
from bayeslora.params import read
from bayeslora.posteriors import Point
from bayeslora.posteriors.provenance import origin_of
from bayeslora.prediction import predict
from bayeslora.training.run import fit
from bayeslora.training.trainer import SCORES, scoring

ROWS = 24
FIGURES = {
    "ivon": {"hess_moved", "clipped", "ess", "sigma", "sigma_mean"},
    "blob": {"kl", "kl_weight", "sigma", "sigma_mean"},
    "swag": {"snapshots", "rank", "sigma", "sigma_mean"},
}
METHODS = {"ivon": Ivon(), "blob": Blob(), "swag": Swag(start=2, interval=1)}
EVALUATED = {f"eval_{name}" for name in SCORES}


class Tracker(TrainerCallback):
    """Keeps a copy of what it is told, when it is told, as a tracker sends it away."""

    said: ClassVar[list[dict[str, Any]]] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.said.append({**logs, "step": state.global_step})


@pytest.fixture(autouse=True)
def nothing_said():
    Tracker.said.clear()


@pytest.fixture
def tracked(monkeypatch):
    """Arguments of a run that reports to a tracker of the Trainer's own."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)

    def make(folder, **changes):
        return arguments(folder, report_to=["trackio"], logging_strategy="steps", logging_steps=1, **changes)

    return make


def losses():
    return [line for line in Tracker.said if "loss" in line]


def evaluations():
    return [line for line in Tracker.said if "eval_loss" in line]


@pytest.mark.parametrize("name", METHODS)
def test_a_tracker_is_told_the_methods_figures_with_each_loss(name, tracked, tokenizer, tmp_path):
    fit(make_model(), make_task(readout="likelihood"), METHODS[name], tracked(tmp_path), tokenizer=tokenizer)
    assert len(losses()) == 8
    wanted = {f"{name}_{figure}" for figure in FIGURES[name]}
    for line in losses()[3:]:  # SWAG has two snapshots from the fourth step on
        assert wanted <= line.keys()
        assert all(math.isfinite(line[key]) for key in wanted)


SENTENCES = [("Question: bag holds 1 red, 2 blue.\nAnswer:", " blue"), ("bag holds 2 red, 1 blue.\nAnswer:", " red")]


def stock(model, args, tokenizer, **kwargs):
    """A Trainer of a language model, as a user has it."""
    rows = [{"input_ids": (ids := tokenizer(a + b)["input_ids"]), "labels": ids} for a, b in SENTENCES[:1] * ROWS]
    return Trainer(model, args, train_dataset=rows, **kwargs)


def sft(model, args, tokenizer, **kwargs):
    rows = Dataset.from_list([{"prompt": a, "completion": b} for a, b in SENTENCES * (ROWS // 2)])
    same = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "save_strategy", "report_to",
            "disable_tqdm", "logging_strategy", "logging_steps", "use_cpu", "seed")  # fmt: skip
    own = SFTConfig(**{name: getattr(args, name) for name in same}, **{CHECKPOINTING: True})
    return SFTTrainer(model, own, train_dataset=rows, processing_class=tokenizer, **kwargs)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("build", [stock, sft], ids=["transformers", "trl"])
def test_a_tracker_of_ones_own_trainer_is_told_them_too(build, name, tracked, tokenizer, tmp_path):
    model = make_model("llama", lora_dropout=DROPOUT)
    trainer = build(model, tracked(tmp_path), tokenizer, **METHODS[name].trainer_kwargs(model, ROWS))
    trainer.train()
    wanted = {f"{name}_{figure}" for figure in FIGURES[name]}
    assert losses()
    assert wanted <= losses()[-1].keys()
    assert wanted <= [line for line in trainer.state.log_history if "loss" in line][-1].keys()


def test_a_tracker_that_is_added_to_a_trainer_later_is_told_them_and_the_other_callbacks_keep_their_order(
    tokenizer, tmp_path
):
    model = make_model()
    kwargs = Swag(start=0).trainer_kwargs(model, ROWS)
    figures = next(one for one in kwargs["callbacks"] if isinstance(one, MetricsCallback))
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1)
    trainer = stock(model, args, tokenizer)
    others = list(trainer.callback_handler.callbacks)
    collector = kwargs["callbacks"][2]
    for callback in (Tracker(), collector, figures):
        trainer.add_callback(callback)
    trainer.train()
    kept = trainer.callback_handler.callbacks
    assert kept[0] is figures
    assert kept[1 : 1 + len(others)] == others
    assert kept[-1] is collector
    assert "swag_snapshots" in losses()[-1]


def test_every_member_of_an_ensemble_reports(tracked, tokenizer, tmp_path):
    fit(make_model(), make_task(readout="likelihood"), Ensemble(2, Ivon()), tracked(tmp_path), tokenizer=tokenizer)
    assert sum("ivon_sigma" in line for line in losses()) == 16


class Keep(TrainerCallback):
    """Keeps what the figures are made of as it is at the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        layers = [m for m in model.modules() if type(m).__name__ == "BlobLinear"]
        self.blob = [(layer.weight.detach().clone(), layer.spread.detach().clone()) for layer in layers]


def test_the_figures_of_ivon_are_those_of_its_posterior(tracked, tokenizer, tmp_path):
    posterior = fit(make_model(), make_task(readout="likelihood"), Ivon(), tracked(tmp_path), tokenizer=tokenizer)
    sigma = torch.cat([v.flatten() for v in posterior.variance.values()]).sqrt()
    last = losses()[-1]
    assert last["ivon_sigma"] == pytest.approx(float(sigma.median()), rel=1e-5)
    assert last["ivon_sigma_mean"] == pytest.approx(float(sigma.mean()), rel=1e-5)
    size = sum(v.numel() for v in posterior.variance.values())
    assert last["ivon_ess"] == pytest.approx(default_ess(ROWS, size))
    assert 0 <= last["ivon_clipped"] <= 1


def test_the_figures_of_blob_are_its_divergence_and_deviations(tracked, tokenizer, tmp_path):
    keep, method = Keep(), Blob(kl_cycle=3, prior_sigma=0.2, temperature=0.5)
    model = make_model()
    task = make_task(readout="likelihood")
    posterior = fit(model, task, method, tracked(tmp_path), tokenizer=tokenizer, callbacks=[keep])
    sigma = torch.cat([v.flatten() for v in posterior.variance.values()]).sqrt()
    last = losses()[-1]
    assert last["blob_sigma_mean"] == pytest.approx(float(sigma.mean()), rel=1e-5)
    kl = sum(float(kl_divergence(mean, spread, 0.2)) for mean, spread in keep.blob)
    assert last["blob_kl"] == pytest.approx(kl, rel=1e-5)
    assert [line["blob_kl_weight"] for line in losses()] == [0.5 * kl_weight(step, 3) for step in range(8)]


def test_the_figures_of_swag_are_what_it_has_collected(tracked, tokenizer, tmp_path):
    method = Swag("diagonal", start=2, interval=1, rank=3)
    posterior = fit(make_model(), make_task(readout="likelihood"), method, tracked(tmp_path), tokenizer=tokenizer)
    assert [line["swag_snapshots"] for line in losses()] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert [line["swag_rank"] for line in losses()] == [0, 0, 1, 2, 3, 3, 3, 3]
    assert "swag_sigma" not in losses()[2]
    sigma = torch.cat([v.flatten() for v in posterior.variance.values()]).sqrt()
    assert losses()[-1]["swag_sigma"] == pytest.approx(float(sigma.median()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name", ["llama-letters", "llama-likelihood", "llama-bf16", "bert", "bert-bf16"])
def test_each_evaluation_measures_the_adapter_as_it_is_then(name, tracked, tokenizer, tmp_path):
    kind = KINDS[name]
    model, task = kind.build(), kind.task()
    args = tracked(tmp_path, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=3)
    fit(model, task, Map(), args, tokenizer=tokenizer)
    first, last = evaluations()
    assert first.keys() >= EVALUATED
    here = Point(read(model), origin_of(model))
    log_p = predict(model, here, task.validation, 1, tokenizer=tokenizer).log_probs[0]
    tolerance = 0.05 if kind.dtype == torch.bfloat16 else 1e-4
    for score in ("accuracy", "nll", "brier", "ece"):
        wanted = float(getattr(metrics, score)(log_p, task.validation.labels))
        if kind.dtype == torch.float32 or score in ("nll", "brier"):
            assert last[f"eval_{score}"] == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    assert last["eval_nll"] == pytest.approx(last["eval_loss"], rel=1e-2)


@pytest.mark.parametrize("method", [Ivon(), Blob(), Swag()], ids=lambda m: m.name)
def test_the_scores_of_an_evaluation_do_not_change_what_is_learned(method, tokenizer, tmp_path):
    def train(folder, **changes):
        args = arguments(tmp_path / folder, eval_strategy="steps", eval_steps=2, **changes)
        return fit(make_model(), make_task(readout="likelihood"), method, args, tokenizer=tokenizer)

    plain, watched = train("plain", prediction_loss_only=True), train("watched")
    assert all(torch.equal(plain.draw(1)[name], watched.draw(1)[name]) for name in plain.mean)


def test_the_best_checkpoint_can_be_chosen_by_a_calibration_score(tracked, tokenizer, tmp_path):
    args = tracked(
        tmp_path, eval_strategy="steps", eval_steps=4, metric_for_best_model="brier", greater_is_better=False,
    )  # fmt: skip
    args.save_strategy, args.save_steps, args.load_best_model_at_end = "steps", 4, True
    fit(make_model(), make_task(readout="likelihood"), Map(), args, tokenizer=tokenizer)
    assert len(evaluations()) == 2


def test_members_that_are_trained_together_are_evaluated_by_their_loss_alone(tracked, tokenizer, tmp_path):
    args = tracked(tmp_path, eval_strategy="steps", eval_steps=4)
    method = Ensemble(2, together=True)
    fit(make_model(), make_task(readout="likelihood"), method, args, tokenizer=tokenizer)
    assert evaluations()
    assert not any(EVALUATED & line.keys() for line in evaluations())


@pytest.mark.parametrize("changes", [{"batch_eval_metrics": True}, {"prediction_loss_only": True}], ids=str)
def test_arguments_that_do_without_scores_still_serve(changes, tracked, tokenizer, tmp_path):
    args = tracked(tmp_path, eval_strategy="epoch", **changes)
    fit(make_model(), make_task(readout="likelihood"), Map(), args, tokenizer=tokenizer)
    assert evaluations()
    assert not any(EVALUATED & line.keys() for line in evaluations())


def test_choices_that_a_batch_lacks_have_no_probability_and_an_overflow_is_no_crash():
    run = scoring(4)
    log_p = run["preprocess_logits_for_metrics"](torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([1]))
    assert log_p.shape == (1, 4)
    assert log_p[0, 2:].tolist() == [-math.inf, -math.inf]
    assert float(log_p.exp().sum()) == pytest.approx(1)

    class Found:
        predictions, label_ids = torch.tensor([[math.nan, 0.0]]).numpy(), torch.tensor([0]).numpy()

    assert all(math.isnan(score) for score in run["compute_metrics"](Found).values())


REAL = """
import json, sys
sys.path.insert(0, sys.argv[2])
import torch
from support.tiny import arguments, make_model, make_task, make_tokenizer
from bayeslora.methods import Ivon
from bayeslora.training.run import fit

options = {"report_to": ["trackio"], "project": "bags", "run_name": "one", "logging_strategy": "steps",
           "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
fit(make_model(), make_task(readout="likelihood"), Ivon(), arguments(sys.argv[1], **options),
    tokenizer=make_tokenizer())
from trackio.sqlite_storage import SQLiteStorage
print("FOUND", json.dumps(SQLiteStorage.get_logs("bags", "one")))
"""


@pytest.mark.slow
def test_a_real_tracker_has_the_figures_on_its_disk(tmp_path):
    pytest.importorskip("trackio")
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    here = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "run"), here],
        capture_output=True, text=True, timeout=200, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found = json.loads(line.removeprefix("FOUND"))
    trained, evaluated = ([row for row in found if f"{part}/loss" in row] for part in ("train", "eval"))
    assert (len(trained), len(evaluated)) == (4, 2)
    assert all({f"train/ivon_{name}" for name in FIGURES["ivon"]} <= row.keys() for row in trained)
    assert all({f"eval/{name}" for name in SCORES} <= row.keys() for row in evaluated)
