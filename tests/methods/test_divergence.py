"""Noise scaled by the divergence of the answers: against closed forms, for every family, and what is refused."""

import logging
import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from support.families import scaling
from support.tiny import arguments, gaussian, make_model, make_task, same_params

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.methods.base import TrainedAdapter
from bayeslora.methods.divergence import NOTE, ScaleByDivergence, scalable
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import divergences
from bayeslora.params import read
from bayeslora.posteriors import AnswerNoise
from bayeslora.posteriors.provenance import Origin, origin_of
from bayeslora.training.keys import of_method

STEP = 2 ** (1 / 2**5)
"""The factor within which the default search ends below the edge."""
WEIGHT = "w"


@cache
def numbers(sampling):
    """The first thousand standard normal numbers of a sampling."""
    unit = bl.DiagonalGaussian({WEIGHT: torch.zeros(1)}, {WEIGHT: torch.ones(1)})
    return torch.stack([unit.draw(k, 0, sampling)[WEIGHT][0] for k in range(1024)])


@dataclass(frozen=True)
class Logistic:
    """A stand-in of a trained adapter: p(1 | x) = sigmoid(f(w) x) for rows x, whatever split is asked for."""

    task: bl.tasks.types.Task
    inputs: torch.Tensor
    sampling: str = "independent"
    seed: int = 0
    origin: Origin = Origin({}, "", {})  # noqa: RUF009
    link: object = staticmethod(lambda w: w)

    def predict(self, posterior, rows, draws, *, mean=True):
        count = posterior.count(bl.Draws(draws, sampling=self.sampling))
        if posterior.standard_deviation()[WEIGHT] == 0:
            count = 1
        if self.sampling == "independent":
            weights = torch.stack([posterior.draw(k, self.seed)[WEIGHT][0] for k in range(count)])
        else:  # the same numbers, made once
            weights = posterior.mean[WEIGHT] + posterior.standard_deviation()[WEIGHT] * numbers(self.sampling)[:count]
        logits = self.link(weights)[:, None] * self.inputs
        return Prediction(torch.stack([torch.zeros_like(logits), logits], -1).log_softmax(-1))


def logistic(mean, deviation, *, rows=12, **more):
    inputs = torch.linspace(0.3, 2.0, rows)
    posterior = bl.DiagonalGaussian({WEIGHT: torch.tensor([mean])}, {WEIGHT: torch.tensor([deviation**2])})
    return Logistic(make_task(), inputs, **more), posterior


def exact(inputs, mean, deviation):
    """The mean divergence by Gauss and Hermite's rule, to ten digits."""
    points, weights = np.polynomial.hermite_e.hermegauss(200)
    w = mean + deviation * points  # far out with weights of next to nothing

    def chance(w):
        return 0.5 + 0.5 * np.tanh(np.multiply.outer(w, inputs.double().numpy()) / 2)

    p, q = chance(np.array([mean]))[0], (weights / weights.sum()) @ chance(w)
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("mean", "divergence"), [(4.0, 0.02), (4.0, 0.2), (1.5, 0.01)])
def test_the_scale_of_a_logistic_model_is_that_of_gauss_and_hermites_rule(mean, divergence):
    adapter, posterior = logistic(mean, 0.05, sampling="sobol")
    found = ScaleByDivergence(divergence, draws=1024, steps=9).scaled(adapter, posterior)
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if exact(adapter.inputs, mean, middle) <= divergence else (low, middle)
    assert math.sqrt(float(found.variance[WEIGHT][0])) == pytest.approx(low, rel=0.01)
    assert found.mean is posterior.mean


def brute(adapter, posterior, scale, draws):
    """The divergence by a loop over the draws' numbers, which are those of the posterior as it was."""
    noise = [float(posterior.draw(k, adapter.seed)[WEIGHT][0] - posterior.mean[WEIGHT][0]) for k in range(draws)]
    x, mean, total = adapter.inputs.double(), float(posterior.mean[WEIGHT][0]), 0.0
    p = torch.sigmoid(mean * x)
    q = torch.stack([torch.sigmoid((mean + scale * z) * x) for z in noise]).mean(0)
    total = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return float(total.mean())


@pytest.mark.parametrize("steps", [0, 3, 5, 8])
@pytest.mark.parametrize("deviation", [0.001, 0.7, 300.0])  # the search goes up, or down
def test_the_scale_is_the_largest_within_the_divergence_up_to_the_bisections(steps, deviation):
    adapter, posterior = logistic(3.0, deviation)
    method = ScaleByDivergence(0.05, draws=6, steps=steps)
    scale = float(method.scaled(adapter, posterior).origin.settings[NOTE]["scale"])
    edge = scale * 2 ** (1 / 2**steps) * (1 + 1e-5)
    assert brute(adapter, posterior, scale, 6) <= 0.05 + 1e-6 < brute(adapter, posterior, edge, 6)


def test_the_divergence_rises_with_the_scale_by_the_same_numbers():
    adapter, posterior = logistic(3.0, 0.5)
    values = [brute(adapter, posterior, 1.1**k, 10) for k in range(-30, 20)]
    assert values == sorted(values)
    scales = [ScaleByDivergence(0.003 * 2**k).scaled(adapter, posterior).variance[WEIGHT].item() for k in range(6)]
    assert scales == sorted(scales)
    assert len(set(scales)) == 6


def test_a_seed_gives_its_scale_again_and_another_gives_another():
    adapter, posterior = logistic(3.0, 0.5)
    found = [ScaleByDivergence(0.05).scaled(replace(adapter, seed=seed), posterior) for seed in (4, 4, 5)]
    assert same_params(found[0].variance, found[1].variance)
    assert not same_params(found[0].variance, found[2].variance)


def test_a_divergence_that_falls_is_told_and_the_smallest_scale_that_reaches_it_is_taken(caplog):
    adapter, posterior = logistic(3.0, 1.0)
    folded = replace(adapter, link=lambda w: 3 - (torch.sin(w - 3.0)).abs())  # the one draw's logit comes back
    z = abs(float(posterior.draw(0)[WEIGHT][0]) - 3.0)
    narrow = replace(posterior, variance={WEIGHT: torch.tensor([(2.2 / z) ** 2])})  # sin 2.2 < sin 1.1
    with caplog.at_level(logging.WARNING):
        found = ScaleByDivergence(0.9 * hump(folded, 2.2), draws=1, steps=3).scaled(folded, narrow)
    assert "it falls from" in caplog.text
    assert "smallest scale" in caplog.text
    assert math.sqrt(float(found.variance[WEIGHT][0])) * z < math.pi / 2  # on the first slope
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ScaleByDivergence(0.05).scaled(adapter, posterior)
    assert caplog.text == ""


def hump(adapter, shift):
    """The divergence where the one draw is moved by so much."""
    x = adapter.inputs.double()
    p, q = torch.sigmoid(3.0 * x), torch.sigmoid((3.0 - abs(math.sin(shift))) * x)
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def test_noise_that_cannot_move_the_answers_so_far_is_refused_in_one_sentence():
    adapter, posterior = logistic(3.0, 0.5)
    still = replace(posterior, variance={WEIGHT: torch.zeros(1)})
    with pytest.raises(
        InputError, match=r"moves the answers to bags/validation by 0\.1 nats a row; the furthest is 0: ask for less"
    ):
        ScaleByDivergence(0.1).scaled(adapter, still)
    with pytest.raises(InputError, match="no scale of the noise moves"):  # the average of two answers is never so far
        ScaleByDivergence(5.0, draws=8).scaled(adapter, posterior)
    for settings in ({"divergence": 0.0}, {"divergence": math.inf}, {"anchors": "test"}, {"draws": 0}, {"steps": -1}):
        with pytest.raises(InputError):
            ScaleByDivergence(**settings)


def families(model, tokenizer):
    """A posterior of each family around the adapter of a model, with its name."""
    plain = gaussian(model)
    mean, origin = plain.mean, plain.origin
    rng = torch.Generator().manual_seed(1)
    snapshots = {n: m + 0.02 * torch.randn(3, *m.shape, generator=rng) for n, m in mean.items()}
    low_rank = bl.LowRankGaussian(mean, plain.variance, snapshots, 0.5, origin)
    other = replace(plain, mean={n: 1.1 * m for n, m in mean.items()})
    laplace = bl.Laplace(prior=30.0, predictive="draws").fit(
        model, make_task(readout="likelihood"), tokenizer=tokenizer
    )
    return {
        "diagonal": plain,
        "low-rank": low_rank,
        "kronecker": laplace,
        "linearised": bl.Linearised(laplace, origin),
        "mixture": bl.Mixture((plain, other), origin),
        "answer": AnswerNoise(plain, origin),
        "dropout": bl.ColumnDropout(mean, 0.2, {n: 1.0 for n in mean if "lora_A" in n}, origin),
    }


def sure():
    """A model whose answers are sure, so that noise can move them far."""
    model = make_model()
    model.get_base_model().lm_head.weight.data.mul_(20.0)
    return model


@pytest.fixture(scope="module")
def around(tokenizer):
    """Such a model, and posteriors around its adapter."""
    model = sure()
    return model, families(model, tokenizer)


NAMES = ("diagonal", "low-rank", "kronecker", "linearised", "mixture", "answer", "dropout")


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_of_every_family_end_at_the_divergence(name, around, tokenizer):
    model, posteriors = around
    posterior, task, divergence = posteriors[name], unlabelled(make_task(readout="likelihood")), 0.02

    def distance(asked):
        without = bl.predict(model, bl.tempered(asked, 0.0), task.validation, 1, tokenizer=tokenizer).log_p
        answers = bl.predict(model, asked, task.validation, bl.Draws(10, seed=4), tokenizer=tokenizer).log_p
        return float(divergences(without.double(), answers.double()).mean())

    found = ScaleByDivergence(divergence).fit(model, task, start=posterior, tokenizer=tokenizer, seed=4)
    assert type(found) is type(posterior)
    assert same_params(found.mean, posterior.mean)
    assert found.origin.method == posterior.origin.method
    assert found.origin.settings[NOTE]["divergence"] == divergence
    assert distance(found) <= divergence + 1e-6 < distance(bl.tempered(found, (STEP * 1.0001) ** 2)) + 2e-6
    assert scalable(found)


def unlabelled(task):
    """The task with no label in its training and validation rows."""
    bare = {
        part: replace(split, examples=tuple(replace(e, label=None) for e in split))
        for part, split in (("train", task.train), ("validation", task.validation))
    }
    return replace(task, **bare)


def test_a_posterior_without_noise_to_scale_is_refused_in_words(tokenizer):
    model, task = make_model(lora_dropout=0.1), make_task(readout="likelihood")
    plain = gaussian(model)
    point = bl.Point(plain.mean, plain.origin)
    for posterior, words in (
        (None, "a Point of 1 has no noise to scale"),
        (bl.Mixture((point, point), plain.origin), "a Mixture of 2 has no noise to scale"),
        (bl.Scaled(plain, scaling(), plain.origin), "scale its noise first"),
        (bl.TokenDropout(plain.mean, 0.1, plain.origin), "dropout token by token has no noise in the weights"),
    ):
        with pytest.raises(InputError, match=words):
            ScaleByDivergence().fit(model, task, start=posterior, tokenizer=tokenizer)
        assert posterior is None or not scalable(posterior)


def test_anchors_are_validation_rows_else_training_rows_and_only_so_many(tokenizer):
    task = make_task(readout="likelihood")
    assert ScaleByDivergence().rows(task) is task.validation
    assert ScaleByDivergence(anchors="train").rows(task) is task.train
    assert ScaleByDivergence().rows(replace(task, validation=None)) is task.train
    with pytest.raises(InputError, match="taken on validation rows, and the task has none"):
        ScaleByDivergence(anchors="validation").check(make_model(), replace(task, validation=None))
    with pytest.raises(InputError, match="validation or training rows, and the task has none"):
        ScaleByDivergence().check(make_model(), replace(task, validation=None, train=None))
    model = sure()
    few = ScaleByDivergence(0.01, most_anchors=5).fit(model, task, start=gaussian(model), tokenizer=tokenizer)
    assert few.origin.settings[NOTE]["anchors"] == "bags/validation, 5 anchors"


@pytest.mark.parametrize(
    ("method", "unit"),
    [
        (bl.Tfb(scale="divergence", divergence=0.02), bl.Tfb(sigma=0.03)),
        (bl.Isotropic("validation", scale="divergence", divergence=0.02), bl.Isotropic(0.1)),
        (bl.Laplace(prior=3.0, scale="divergence", divergence=0.02), bl.Laplace(prior=3.0)),
    ],
)
def test_a_method_by_divergence_is_its_noise_at_the_scale_and_asks_for_no_label(method, unit, tokenizer):
    model, task = sure(), make_task(readout="likelihood")
    if method.name != "laplace":  # whose curvature is that of labelled rows
        task = unlabelled(task)
    bare = replace(task, validation=unlabelled(task).validation)
    found = method.fit(model, bare, tokenizer=tokenizer, seed=2)
    start = unit.fit(model, bare, tokenizer=tokenizer, seed=2)
    other = ScaleByDivergence(0.02, steps=8).fit(model, bare, start=start, tokenizer=tokenizer, seed=2)
    spread, wanted = found.standard_deviation(), other.standard_deviation()
    ratios = torch.cat([(spread[n] / wanted[n])[wanted[n] > 0].flatten() for n in spread])
    assert 1 / (STEP * 1.01) < ratios.min() <= ratios.max() < 1.01
    assert ratios.max() / ratios.min() < 1 + 1e-4
    assert found.origin.settings["scale"] == "divergence"


def test_swag_by_divergence_is_swag_and_then_scaled(tokenizer, tmp_path):
    task = make_task(readout="likelihood")
    made = []
    for method in (bl.Swag(scale="divergence", divergence=0.02), bl.Swag()):
        model = sure()
        made.append(bl.fit(model, task, method, arguments(tmp_path / str(len(made))), tokenizer=tokenizer))
    found, plain = made
    assert same_params(found.mean, plain.mean)
    scaled = ScaleByDivergence(0.02).fit(model, task, start=plain, tokenizer=tokenizer, seed=3)
    assert same_params(found.standard_deviation(), scaled.standard_deviation())
    assert found.origin.method == "swag"
    assert not same_params(found.standard_deviation(), plain.standard_deviation())
    with pytest.raises(InputError, match=r"use bl.fit, or Swag\(\) and then ScaleByDivergence"):
        bl.Swag(scale="divergence").trainer_kwargs(model, 10)


def test_settings_that_say_two_things_are_refused():
    for make in (
        lambda: bl.Tfb(scale="loss"),
        lambda: bl.Tfb(scale="divergence", sigma=0.01),
        lambda: bl.Isotropic(scale="validation"),
        lambda: bl.Laplace(scale="divergence", divergence=0.0),
        lambda: bl.Swag(scale="wide"),
        lambda: bl.Swag("swa", scale="divergence"),
        lambda: bl.Swag(divergence=math.inf),
    ):
        with pytest.raises(InputError):
            make()


def test_runs_that_were_made_before_these_settings_came_are_found_by_their_keys():
    for method in (bl.Tfb(), bl.Isotropic(), bl.Laplace(), bl.Swag()):
        assert "divergence" not in of_method(method)
        assert ("scale" in of_method(method)) == (method.name == "swag")
        assert of_method(replace(method, scale="divergence"))["scale"] == "divergence"
        assert of_method(replace(method, scale="divergence", divergence=0.02))["divergence"] == 0.02


def test_the_adapter_stays_as_it_is(tokenizer):
    model = sure()
    before = read(model)
    start = bl.DiagonalGaussian(before, {n: torch.full_like(m, 0.01) for n, m in before.items()})  # without an origin
    adapter = TrainedAdapter(
        model, make_task(readout="likelihood"), start, origin_of(model, "mine"), tokenizer, 0, None
    )
    found = ScaleByDivergence(0.02).scaled(adapter, start)
    assert same_params(read(model), before)
    assert found.origin.method == "mine"
