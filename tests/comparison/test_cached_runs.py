"""What a comparison takes over from its folder: what depends on nothing that has changed, and only that."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from support.tiny import arguments, make_model, make_task

from bayeslora.comparison import cached_runs as module
from bayeslora.comparison.cached_runs import CachedRuns, planned
from bayeslora.comparison.run import compare
from bayeslora.methods import Ensemble, Isotropic, Laplace, Map, ScaleByDivergence, Swag, Temperature
from bayeslora.tasks.types import Example, Format, Split
from bayeslora.training.keys import of_arguments, of_model, of_rows

METHODS = {"map": Map(), "swag": Swag("diagonal"), "noise": Isotropic(0.01)}
"""A run, one that goes on from it, and one that is fitted to it."""


@dataclass
class Work:
    """What was done since the last look: trainings, and predictions."""

    trained: int = 0
    predicted: int = 0
    lines: list[str] = field(default_factory=list)

    def taken(self):
        found = (self.trained, self.predicted)
        self.trained = self.predicted = 0
        return found


@pytest.fixture
def work(monkeypatch):
    seen = Work()
    train, predict = transformers.Trainer.train, module.predict

    def training(self, *args, **kwargs):
        seen.trained += 1
        return train(self, *args, **kwargs)

    def predicting(*args, **kwargs):
        seen.predicted += 1
        return predict(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", training)
    monkeypatch.setattr(module, "predict", predicting)
    return seen


def cached(tokenizer, out, lines, **changes):
    args = arguments(out / "training", max_steps=4)
    return CachedRuns(
        make_model(lora_dropout=0.1), tokenizer, make_task(readout="likelihood"), args, out, resamples=0, draws=2,
        report=lines.append, **changes,
    )  # fmt: skip


def rated(own):
    return replace(own, args=arguments(own.out / "training", max_steps=4, learning_rate=7e-3))


def other_rows(own, split):
    rows = getattr(own.task, split)
    return replace(own, task=replace(own.task, **{split: rows.take(range(len(rows) - 1))}))


def other_text(own):
    rows = own.task.train
    assert rows is not None
    changed = tuple(replace(e, text=e.text.replace("bag", "dark bag")) for e in rows)
    return replace(own, task=replace(own.task, train=replace(rows, examples=changed)))


def other_template(own):
    splits = {
        name: replace(rows, format=replace(rows.format, template="{text}"))
        for name in ("train", "validation", "test")
        if (rows := getattr(own.task, name)) is not None
    }
    return replace(own, task=replace(own.task, **splits))


def other_base(own):
    with torch.no_grad():
        own.model.get_input_embeddings().weight.mul_(1.01)
    return own


CHANGES = {
    "nothing": (lambda own: own, (0, 0)),
    "learning rate": (rated, (2, 3)),
    "train rows": (lambda own: other_rows(own, "train"), (2, 3)),
    "train texts": (other_text, (2, 3)),
    "template": (other_template, (2, 4)),
    "base": (other_base, (2, 4)),
    "rank": (lambda own: replace(own, model=make_model(r=4, lora_dropout=0.1)), (2, 4)),
    "dtype": (lambda own: replace(own, model=make_model(dtype=torch.bfloat16, lora_dropout=0.1)), (2, 4)),
    "length of SWAG": (lambda own: replace(own, swag_share=1.0), (1, 1)),
    "draws": (lambda own: replace(own, draws=3), (0, 3)),
    "test rows": (lambda own: other_rows(own, "test"), (0, 4)),
    "token budget": (lambda own: replace(own, token_budget=64), (0, 0)),
    "logging": (lambda own: replace(own, args=arguments(own.out / "x", max_steps=4, logging_steps=1)), (0, 0)),
}
QUICK = ("nothing", "learning rate", "draws")


@pytest.mark.parametrize("what", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CHANGES])
def test_what_depends_on_a_change_is_made_anew_and_the_rest_is_taken_over(what, work, tokenizer, tmp_path):
    change, wanted = CHANGES[what]
    before = compare(cached(tokenizer, tmp_path, work.lines), METHODS, [0])
    assert work.taken() == (2, 4)  # the base answers too
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    own = change(cached(tokenizer, tmp_path, work.lines))
    found = compare(own, METHODS, [0])
    assert work.taken() == wanted
    assert all(path.read_bytes() == content for path, content in kept.items())  # nothing is overwritten
    fresh = compare(replace(own, out=tmp_path / "fresh"), METHODS, [0])
    for name in METHODS:
        one, other = found.results[name][0].prediction.log_probs, fresh.results[name][0].prediction.log_probs
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    if wanted != (0, 0):
        was = before.results["swag"][0].prediction.log_probs
        assert was.shape != found.results["swag"][0].prediction.log_probs.shape or not torch.equal(
            was, found.results["swag"][0].prediction.log_probs
        )
    work.taken()
    again = compare(cached(tokenizer, tmp_path, work.lines), METHODS, [0])
    assert work.taken() == (0, 0)  # what was there before the change is there still
    assert torch.equal(again.results["swag"][0].prediction.log_probs, before.results["swag"][0].prediction.log_probs)


def test_more_seeds_and_more_methods_take_over_what_is_there(work, tokenizer, tmp_path):
    own = cached(tokenizer, tmp_path, work.lines)
    compare(own, {"map": Map()}, [0])
    assert work.taken() == (1, 2)  # the base, which has no seed, and MAP
    compare(own, {"map": Map()}, [0, 1])
    assert work.taken() == (1, 1)
    compare(own, {"map": Map(), "ensemble": Ensemble(2), "swag": Swag("diagonal")}, [0, 1])
    assert work.taken() == (4, 4)  # under each seed a second member and SWAG


def test_of_a_tempered_posterior_too_the_prediction_follows_the_run(work, tokenizer, tmp_path):
    own = replace(cached(tokenizer, tmp_path, work.lines), temperatures=(0.1, 1.0), scaling=True)
    compare(own, {"noise": Isotropic(0.01)}, [0])
    work.taken()
    compare(own, {"noise": Isotropic(0.01)}, [0])
    assert work.taken() == (0, 0)
    compare(own, {"noise": Isotropic(0.3)}, [0])  # the same name in the table
    assert work.taken() == (0, 4)  # test rows, and validation rows at two temperatures, and the better of them


def test_the_report_says_what_differs_from_the_run_that_is_there(work, tokenizer, tmp_path):
    compare(cached(tokenizer, tmp_path, work.lines), {"map": Map()}, [0])
    assert not any("has other" in line for line in work.lines)
    compare(rated(cached(tokenizer, tmp_path, work.lines)), {"map": Map()}, [0])
    assert "seed 0: training map, run 1 (one that is there has other training.learning_rate)" in work.lines


def test_the_key_of_arguments_knows_what_chooses_the_best_state(tmp_path):
    plain = of_arguments(arguments(tmp_path))
    assert of_arguments(arguments(tmp_path / "x", save_strategy="steps", save_steps=3, report_to="none")) == plain
    choosing = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    every = [of_arguments(arguments(tmp_path, **choosing, eval_steps=n, save_steps=n)) for n in (2, 4)]
    assert plain != every[0] != every[1]
    for name, value in {"weight_decay": 0.3, "max_grad_norm": 0.2, "per_device_train_batch_size": 5}.items():
        assert of_arguments(arguments(tmp_path, **{name: value})) != plain


def test_names_and_paths_are_no_part_of_a_key(tokenizer):
    split = make_task(readout="likelihood").test
    assert of_rows(replace(split, name="elsewhere")) == of_rows(split)
    model, moved = make_model(), make_model()
    moved.peft_config["default"].base_model_name_or_path = "/elsewhere"
    assert of_model(model) == of_model(moved)


def test_a_method_fitted_afterwards_does_not_depend_on_how_it_was_trained_but_on_what_came_of_it(
    work, tokenizer, tmp_path
):
    own = cached(tokenizer, tmp_path, work.lines)
    runs = [planned(one, Laplace(), 0) for one in (own, rated(own))]
    assert runs[0].depends["training"] is None
    assert runs[0].key != runs[1].key  # by the key of the MAP run that they start from


def test_rows_that_differ_in_a_column_of_the_template_alone_have_another_digest():
    shape = Format(template="{premise} {hypothesis}")
    splits = [
        Split("t", (Example("", ("no", "yes"), 0, columns=(("premise", text), ("hypothesis", "It rains."))),), shape)
        for text in ("It is wet.", "It is dry.")
    ]
    assert of_rows(splits[0]) != of_rows(splits[1])


@pytest.mark.slow
def test_a_row_by_divergence_is_for_what_has_noise_and_its_scale_is_searched_once(
    work, tokenizer, tmp_path, monkeypatch
):
    searched, fit = [], ScaleByDivergence.fit

    def searching(self, *args, **kwargs):
        searched.append(self)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(ScaleByDivergence, "fit", searching)
    lines = []
    methods = {"map": Map(), "noise": Isotropic(0.05), "scaled": Temperature(), "both": Ensemble(2, Swag("diagonal"))}
    found = compare(cached(tokenizer, tmp_path, lines, divergence=1e-4), methods, [0])
    rows = [f"{name}, scaled by divergence" for name in ("noise", "both")]
    assert [name for name in found.results if "divergence" in name] == rows
    assert searched == 2 * [ScaleByDivergence(1e-4, draws=2)]
    result, plain = found.results[rows[0]][0], found.results["noise"][0]
    assert result.temperature > 0
    assert result.cost.train_seconds > plain.cost.train_seconds  # the search is a part of it
    assert torch.equal(result.prediction.mean_log_probs, plain.prediction.mean_log_probs)
    assert not torch.equal(result.prediction.log_probs, plain.prediction.log_probs)
    work.taken()
    again = compare(cached(tokenizer, tmp_path, lines, divergence=1e-4), methods, [0])
    assert work.taken() == (0, 0)
    assert len(searched) == 2
    assert again.results[rows[0]][0].temperature == result.temperature
    compare(cached(tokenizer, tmp_path, lines, divergence=2e-4), methods, [0])
    assert (len(searched), work.taken()) == (4, (0, 2))


def test_a_row_by_divergence_that_cannot_be_is_reported_and_the_method_keeps_its_own(tokenizer, tmp_path):
    lines = []
    found = compare(cached(tokenizer, tmp_path, lines, divergence=50.0), {"noise": Isotropic(0.05)}, [0, 1])
    assert list(found.results) == ["base", "noise"]
    assert list(found.results["noise"]) == [0, 1]
    (reason,) = found.failures["noise, scaled by divergence"].values()
    assert "no scale of the noise moves the answers" in reason
    assert sum("searching the scale" in line for line in lines) == 1
