"""Temperature and vector scaling against known answers."""

import math
from dataclasses import replace

import pytest
import torch
from support.tiny import gaussian, make_model, make_task

from bayeslora.errors import InputError
from bayeslora.methods import Isotropic, Temperature
from bayeslora.methods.base import TrainedAdapter
from bayeslora.methods.isotropic import SIGMAS
from bayeslora.methods.search import smallest
from bayeslora.metrics.classification import nll
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.uncertainty import average
from bayeslora.params import read
from bayeslora.posteriors import Draws, Point, scale
from bayeslora.prediction import predict
from bayeslora.tasks.types import Example, Format, Split, Task

ROWS, CLASSES = 20_000, 4


@pytest.fixture(scope="module")
def truth():
    """True log-probabilities [N C], and rows whose labels are drawn from them."""
    rng = torch.Generator().manual_seed(0)
    log_p = torch.randn(ROWS, CLASSES, generator=rng).mul(1.5).log_softmax(-1)
    labels = torch.multinomial(log_p.exp(), 1, generator=rng)[:, 0].tolist()
    choices = tuple("abcd")
    return log_p, Split("rows", tuple(Example("", choices, k) for k in labels), Format(template=""), choices)


def test_temperature_scaling_recovers_a_known_temperature(truth):
    log_p, rows = truth
    # the estimate of log T has a standard error of about .01 here; a fixed seed makes the outcome fixed
    for temperature in (0.4, 2.5):
        said = (log_p / temperature).log_softmax(-1)
        found = Temperature().scaling(Prediction(said[None], mean_log_probs=said), rows)
        for of in ("draws", "mean"):
            assert 1 / float(found[f"{of}.weight"]) == pytest.approx(1 / temperature, rel=0.04)
            assert not found[f"{of}.bias"].any()


def test_vector_scaling_recovers_weights_and_biases(truth):
    log_p, rows = truth
    weight, bias = torch.tensor([0.5, 1.0, 2.0, 1.5]), torch.tensor([0.4, -0.4, 0.3, -0.3])
    true = scale(log_p, weight, bias)
    rng = torch.Generator().manual_seed(2)
    labels = torch.multinomial(true.exp(), 1, generator=rng)[:, 0]
    rows = replace(rows, examples=tuple(replace(e, label=int(k)) for e, k in zip(rows.examples, labels, strict=True)))
    found = Temperature("vector").scaling(Prediction(log_p[None], mean_log_probs=log_p), rows)
    # standard errors are about .02 with 20,000 rows
    torch.testing.assert_close(found["mean.weight"], weight, rtol=0.06, atol=0)
    torch.testing.assert_close(found["mean.bias"], bias, rtol=0, atol=0.1)
    fitted = scale(log_p, found["mean.weight"], found["mean.bias"])
    assert nll(fitted, rows.labels) <= nll(true, rows.labels)


def test_a_temperature_that_the_rows_do_not_bound_is_reported(truth, caplog):
    log_p, rows = truth
    answers = log_p.argmax(-1).tolist()
    right = replace(rows, examples=tuple(replace(e, label=k) for e, k in zip(rows.examples, answers, strict=True)))
    alone = Temperature(prior_sigma=math.inf)
    found = alone.scaling(Prediction(log_p[None], mean_log_probs=log_p), right)
    assert float(found["draws.weight"]) == pytest.approx(100, rel=1e-3)
    assert "do not bound the temperature of the draws, and it is at its limit, 0.01" in caplog.text
    caplog.clear()
    alone.scaling(Prediction(log_p[None], mean_log_probs=log_p), rows)
    assert not caplog.text


@pytest.mark.parametrize(("sigma", "gap", "count"), [(None, 2.0, 10), (0.5, 2.0, 40), (3.0, 0.5, 40)])
def test_where_all_rows_are_right_the_prior_alone_bounds_the_temperature(sigma, gap, count):
    said = torch.tensor([gap, 0.0]).log_softmax(-1).expand(count, 2)
    rows = Split("rows", tuple(Example("", ("a", "b"), 0) for _ in range(count)), Format(template=""), ("a", "b"))
    found = Temperature(prior_sigma=sigma).scaling(Prediction(said[None], mean_log_probs=said), rows)
    low, high = 0.0, 4.0  # of log w, where the derivative of N log(1 + exp(-w g)) + (log w)² / 2σ² is 0
    for _ in range(60):
        log_w = (low + high) / 2
        rises = log_w / (sigma or 1.0) ** 2 > count * gap * math.exp(log_w) / (1 + math.exp(gap * math.exp(log_w)))
        low, high = (low, log_w) if rises else (log_w, high)
    for of in ("draws", "mean"):
        assert float(found[f"{of}.weight"]) == pytest.approx(math.exp(log_w), rel=2e-3)


def test_draws_that_are_votes_on_the_rows_at_hand_are_not_made_sure_of_everything():
    rng = torch.Generator().manual_seed(5)
    votes = torch.randn(3, 4000, 1, generator=rng) + 0.7  # three members, each right on three rows of four
    draws = torch.cat([votes, -votes], -1).log_softmax(-1)
    few = (votes > 0).all(0)[:, 0].nonzero()[:40, 0]  # rows that all have right
    rows = Split("rows", tuple(Example("", ("a", "b"), 0) for _ in few), Format(template=""), ("a", "b"))
    at = {}
    for sigma in (None, math.inf):
        found = Temperature(prior_sigma=sigma).scaling(Prediction(draws[:, few], mean_log_probs=draws[0, few]), rows)
        scaled = average(scale(draws, found["draws.weight"], found["draws.bias"]))
        at[sigma] = float(nll(scaled, torch.zeros(4000, dtype=torch.long)))
    assert at[None] < at[math.inf] / 2


def test_a_prior_of_no_width_is_refused():
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="prior_sigma must be finite and positive"):
            Temperature(prior_sigma=sigma)


def test_draws_are_scaled_one_by_one_and_have_a_temperature_of_their_own(truth):
    log_p, rows = truth
    rng = torch.Generator().manual_seed(1)
    draws = (3 * log_p + 2 * torch.randn(5, ROWS, CLASSES, generator=rng)).log_softmax(-1)
    found = Temperature().scaling(Prediction(draws, mean_log_probs=(3 * log_p).log_softmax(-1)), rows)
    assert float(found["mean.weight"]) == pytest.approx(1 / 3, rel=0.04)
    best = float(found["draws.weight"])
    at = [nll(average(scale(draws, torch.tensor([best * f]), torch.zeros(1))), rows.labels) for f in (0.9, 1.0, 1.1)]
    assert at[1] < min(at[0], at[2])


def test_scaling_keeps_the_answers_of_the_mean_and_absent_choices():
    log_probs = torch.tensor([[0.1, 0.5, 0.4], [0.7, 0.3, 0.0]]).log()
    found = scale(log_probs, torch.tensor([0.3]), torch.zeros(1))
    assert torch.equal(found.argmax(-1), log_probs.argmax(-1))
    assert found[1, 2] == -math.inf
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))
    with pytest.raises(InputError, match="for 2 classes"):
        scale(log_probs, torch.ones(2), torch.zeros(2))


def test_a_scaled_posterior_predicts_what_scaling_its_predictions_gives(tokenizer):
    model, task = make_model("bert"), make_task(classes=True)
    inner = gaussian(model)
    scaled = Temperature("vector").fit(model, task, start=inner, tokenizer=tokenizer, seed=2)
    plain = predict(model, inner, task.test, draws=Draws(4, seed=5), tokenizer=tokenizer)
    found = predict(model, scaled, task.test, draws=Draws(4, seed=5), tokenizer=tokenizer)
    assert torch.equal(found.log_probs, scaled.apply(plain.log_probs, "draws"))
    assert torch.equal(found.mean_log_probs, scaled.apply(plain.mean_log_probs, "mean"))


def test_what_cannot_be_scaled_is_refused(tokenizer):
    model, task = make_model(), make_task(readout="likelihood")
    few = task.train.take([k for k, e in enumerate(task.train) if len(e.choices) == 4][:3])
    with pytest.raises(InputError, match=r"at least 4 of them, and .* has 3"):
        Temperature().fit(model, Task(task.name, task.train, few, task.test), tokenizer=tokenizer)
    with pytest.raises(InputError, match="validation"):
        Temperature().fit(model, Task(task.name, task.train, None, task.test), tokenizer=tokenizer)
    with pytest.raises(InputError, match="the same classes in every row"):
        Temperature("vector").fit(model, task, tokenizer=tokenizer)
    with pytest.raises(InputError, match="'vector'"):
        Temperature("matrix")


def agreeing(log_probs, temperature):
    """The base of which the tuned model, scaled by a temperature, is a copy."""
    return average(scale(log_probs, torch.tensor([1 / temperature]), torch.zeros(1)))


@pytest.fixture(scope="module")
def unlabelled():
    """Draws and a mean [N C], and their rows without labels."""
    rng = torch.Generator().manual_seed(3)
    log_probs = 3 * torch.randn(300, CLASSES, generator=rng) + torch.randn(5, 300, CLASSES, generator=rng)
    choices = tuple("abcd")
    rows = Split("rows", tuple(Example("", choices, None) for _ in range(300)), Format(template=""), choices)
    return log_probs.log_softmax(-1), rows


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_without_labels_the_temperature_is_that_with_which_the_tuned_model_says_what_the_base_says(
    unlabelled, temperature
):
    draws, rows = unlabelled
    for log_probs in (draws, draws[:1]):
        base = agreeing(log_probs, temperature)
        same = average(log_probs).argmax(-1) == base.argmax(-1)
        assert same.float().mean() > 0.9
        found = Temperature(labels=False).scaling(Prediction(log_probs, base_log_probs=base), rows)
        assert 1 / float(found["draws.weight"]) == pytest.approx(temperature, rel=1e-3)
    point = draws[0]
    base = agreeing(point[None], temperature)
    found = Temperature(labels=False).scaling(Prediction(draws, mean_log_probs=point, base_log_probs=base), rows)
    assert 1 / float(found["mean.weight"]) == pytest.approx(temperature, rel=1e-3)


def test_without_labels_rows_where_the_base_says_something_else_do_not_count(unlabelled):
    draws, rows = unlabelled
    base = agreeing(draws[:1], 2.0)
    base[150:] = base[150:].roll(1, -1)  # another answer, as sure
    found = Temperature(labels=False).scaling(Prediction(draws[:1], base_log_probs=base), rows)
    assert 1 / float(found["draws.weight"]) == pytest.approx(2.0, rel=1e-3)

    def loss(exponent):
        scaled = scale(draws[0], torch.tensor([math.exp(exponent)]), torch.zeros(1))
        return -float((base.exp() * scaled).sum())

    assert math.exp(-smallest(loss, -4, 4)) > 4  # as the paper says, these rows would push it up


def test_without_labels_absent_choices_are_left_out(unlabelled):
    draws, rows = unlabelled
    absent = draws[:1].clone()
    absent[:, ::2, -1] = -math.inf
    absent = absent.log_softmax(-1)
    base = agreeing(absent, 1.7)
    found = Temperature(labels=False).scaling(Prediction(absent, base_log_probs=base), rows)
    assert 1 / float(found["draws.weight"]) == pytest.approx(1.7, rel=1e-3)


def test_without_labels_a_base_that_does_not_bound_the_temperature_is_reported(unlabelled, caplog):
    draws, rows = unlabelled
    flat = torch.full((300, CLASSES), 1 / CLASSES).log()
    found = Temperature(labels=False).scaling(Prediction(draws[:1], base_log_probs=flat), rows)
    assert float(found["draws.weight"]) == pytest.approx(0.01, rel=1e-2)
    assert (
        "rows with the base's answer do not bound the temperature of the draws, and it is at its limit" in caplog.text
    )


def test_a_temperature_without_labels_is_fitted_to_any_posterior_on_rows_without_labels(tokenizer):
    model, task = make_model(), make_task(readout="likelihood", rows=60)
    task = replace(task, validation=task.train)
    rows = replace(task.train, examples=tuple(replace(e, label=None) for e in task.train))
    inner, method = gaussian(model), Temperature(labels=False)
    fitted = method.fit(model, Task(task.name, None, rows, None), start=inner, tokenizer=tokenizer, seed=2)
    said = predict(model, inner, rows, draws=Draws(10, seed=2), tokenizer=tokenizer, base=True)
    assert fitted.scaling == method.scaling(said, rows)
    assert fitted.origin.settings["labels"] is False
    labelled = Temperature().fit(model, task, start=inner, tokenizer=tokenizer, seed=2)
    assert labelled.scaling != fitted.scaling


def test_what_cannot_be_scaled_without_labels_is_refused(unlabelled, tokenizer):
    draws, rows = unlabelled
    method = Temperature(labels=False)
    with pytest.raises(InputError, match="predict with base=True"):
        method.scaling(Prediction(draws), rows)
    other = average(draws).roll(1, -1)
    with pytest.raises(InputError, match="agrees with the draws on none of 300 validation rows"):
        method.scaling(Prediction(draws, base_log_probs=other), rows)
    with pytest.raises(InputError, match="the base has no answer of its own"):
        method.fit(make_model("bert"), make_task(classes=True), tokenizer=tokenizer)
    task = make_task(readout="likelihood")
    with pytest.raises(InputError, match="fitted on validation rows, and the task has none"):
        method.fit(make_model(), Task(task.name, task.train, None, task.test), tokenizer=tokenizer)
    with pytest.raises(InputError, match="vector scaling is fitted to labels"):
        Temperature("vector", labels=False)


def test_the_line_search_finds_the_smallest_of_several_minima_and_ends():
    assert smallest(lambda x: math.cos(3 * x) + 0.1 * (x - 3) ** 2, 0, 6) == pytest.approx(3.13851, abs=1e-4)
    assert smallest(lambda x: x, -1, 1) == -1
    assert smallest(lambda x: -x, -1, 1) == 1


def test_isotropic_noise_chosen_on_validation_rows_is_the_best_of_its_grid(tokenizer):
    model, task = make_model(), make_task(readout="likelihood")
    found = Isotropic("validation", draws=4).fit(model, task, tokenizer=tokenizer, seed=1)
    (sigma,) = {round(float(v.sqrt().max()), 6) for v in found.variance.values()}
    assert sigma in {round(s, 6) for s in SIGMAS}
    adapter = TrainedAdapter(model, task, Point(read(model)), found.origin, tokenizer, 1, 2048)
    scores = {s: adapter.nll(Isotropic(s).fit(model, task), task.validation, 4) for s in SIGMAS}
    assert sigma == pytest.approx(min(scores, key=lambda s: (scores[s], s)), abs=1e-6)
    with pytest.raises(InputError, match="validation"):
        Isotropic("validation").fit(model, Task(task.name, task.train, None, task.test), tokenizer=tokenizer)
    with pytest.raises(InputError, match="'guess'"):
        Isotropic("guess")
