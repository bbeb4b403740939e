"""Evaluations while a run trains: their randomness is their own, so that what is learned does not depend on them."""

import random

import numpy as np
import pytest
import torch
from support.methods_table import DROPOUT, LEARNERS, TABLE
from support.tiny import arguments, make_model, make_task, same_params
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from bayeslora.methods import Ensemble, Map
from bayeslora.methods.steps import random_state
from bayeslora.training.run import fit

TASK = make_task(readout="likelihood")
ROWS = [{"input_ids": [3, 7, 11, 5 + k, 9], "labels": [3, 7, 11, 5 + k, 9]} for k in range(16)]
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
METHODS = {row.name: row.method for row in LEARNERS} | {
    "laplace": TABLE["laplace"].method,
    "together": Ensemble(2, together=True),
}
QUICK = ("map", "blob", "ivon", "swag")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_evaluating_does_not_change_what_fit_learns(name, tokenizer, tmp_path):
    def learned(folder, **evaluating):
        model = make_model(lora_dropout=DROPOUT)
        args = arguments(tmp_path / folder, **evaluating)
        return fit(model, TASK, METHODS[name], args, tokenizer=tokenizer)

    plain, evaluated = learned("plain"), learned("evaluated", **EVALUATING)
    for k in range(3):
        assert same_params(plain.draw(k), evaluated.draw(k))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluating_does_not_change_what_the_stock_trainer_learns(strategy, tmp_path):
    def learned(folder, **evaluating):
        model = make_model(lora_dropout=DROPOUT)
        kwargs = Map().trainer_kwargs(model, len(ROWS))
        sets = {"one": ROWS[:4], "other": ROWS[4:9]}  # two evaluations in one
        args = arguments(tmp_path / folder, **evaluating)
        Trainer(model, args, train_dataset=ROWS, eval_dataset=sets, **kwargs).train()
        return Map().posterior(model).mean

    assert same_params(learned("plain"), learned("evaluated", **EVALUATING | {"eval_strategy": strategy}))


def test_the_state_that_is_put_back_is_that_of_python_numpy_and_torch():
    put_back = random_state()
    before = random.random(), np.random.rand(), torch.rand(2).tolist()
    next(iter(DataLoader([1, 2])))
    put_back()
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == before


def test_an_evaluation_after_the_training_leaves_the_generators_alone(tmp_path):
    class Note(TrainerCallback):
        def on_evaluate(self, *_, **__):
            self.state = torch.get_rng_state()

    model, note = make_model(), Note()
    kwargs = Map().trainer_kwargs(model, len(ROWS))
    trainer = Trainer(model, arguments(tmp_path, **EVALUATING), train_dataset=ROWS, eval_dataset=ROWS[:4], **kwargs)
    trainer.train()
    trainer.add_callback(note)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert not torch.equal(note.state, before)
