"""The bar of a prediction: its total is known at the start, so that the time left is right, and it ends there."""

import re

import pytest
import torch
from support.families import scaling
from support.preferences import TEXTS, reward_model
from support.tiny import gaussian, make_model, make_split, make_task

from bayeslora.cli import progress
from bayeslora.methods import Isotropic, Laplace, Temperature, Tfb
from bayeslora.params import read
from bayeslora.posteriors import Linearised, Mixture, Point, Scaled, TokenDropout
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction.rewards import predict_rewards

ROWS, DRAWS = 5, 4
FAMILIES = {
    "gaussian": (gaussian, 4, 1),
    "point": (lambda model: Point(read(model)), 1, 0),
    "tokens": (lambda model: TokenDropout(read(model), 0.2), 4, 1),
    "linearised": (lambda model: Linearised(gaussian(model)), 1, 0),
    "scaled": (lambda model: Scaled(Linearised(gaussian(model)), scaling()), 1, 0),
    "mixture": (lambda model: Mixture((gaussian(model), gaussian(model))), 4, 1),
    "with-tokens": (lambda model: Mixture((gaussian(model), TokenDropout(read(model), 0.2))), 4, 2),
    "with-linearised": (lambda model: Mixture((Linearised(gaussian(model)), Point(read(model)))), 129, 0),
}
"""Posteriors with the passes that their draws take, and those of the mean."""


def shown(text):
    """Return what the bar said: how many rows are done, and of how many."""
    return [(int(done), int(total)) for done, total in re.findall(r"(\d+)/(\d+) \[", text)]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bar_knows_its_total_at_the_start_and_reaches_it(family, mean, tokenizer, capsys):
    make, passes, at_mean = FAMILIES[family]
    model, split = make_model("llama"), make_split("test", ROWS, 2, classes=False, readout="letters")
    predict(model, make(model), split, DRAWS, mean=mean, tokenizer=tokenizer, options=PassOptions(progress=True))
    steps, total = shown(capsys.readouterr().err), ROWS * (passes + at_mean * mean)
    assert steps[0] == (0, total)
    assert steps[-1] == (total, total)
    assert {end for _, end in steps} == {total}


def test_rewards_show_a_bar_too(tokenizer, capsys):
    model = reward_model()
    options = PassOptions(progress=True)
    found = predict_rewards(model, gaussian(model), TEXTS, DRAWS, tokenizer=tokenizer, options=options)
    steps, total = shown(capsys.readouterr().err), DRAWS * len(TEXTS)
    assert [steps[0], steps[-1]] == [(0, total), (total, total)]
    assert torch.equal(found, predict_rewards(model, gaussian(model), TEXTS, DRAWS, tokenizer=tokenizer))
    assert not capsys.readouterr().err


FITS = {
    "laplace": (Laplace(), {"curvature", "prior precision"}),
    "laplace by draws": (Laplace(predictive="draws", draws=2), {"curvature", "predict"}),
    "tfb": (Tfb(draws=2, steps=1), {"predict"}),
    "isotropic": (Isotropic("validation", draws=2), {"predict"}),
    "temperature": (Temperature(draws=2), {"predict"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_every_fit_shows_what_it_does_to_its_end_unless_told_not_to(name, tokenizer, capsys):
    (method, stages), task = FITS[name], make_task(readout="letters")
    method.fit(make_model("llama"), task, tokenizer=tokenizer)
    text = capsys.readouterr().err
    ends = re.findall(r"([a-z][a-z ]*): 100%[^|]*\|[^|]*\| (\d+)/(\d+) \[", text)
    assert {stage for stage, *_ in ends} == stages
    assert all(done == total for _, done, total in ends)
    method.fit(make_model("llama"), task, tokenizer=tokenizer, progress=False)
    assert not capsys.readouterr().err


def test_where_nobody_looks_on_lines_say_how_far_a_fit_is(tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    task = make_task(readout="letters")
    with progress.own_progress():
        Laplace(prior=1.0).fit(make_model("llama"), task, tokenizer=tokenizer, token_budget=60)
    rows, text = len(task.train), capsys.readouterr().err
    assert re.search(rf"  curvature: \d+ of {rows} rows, \d+ s left\n", text)
    assert "\r" not in text
