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
    found = Temperature().scaling(Prediction(log_p[None], mean_log_probs=log_p), right)
    assert float(found["draws.weight"]) == pytest.approx(100, rel=1e-3)
    assert "do not bound the temperature of the draws, and it is at its limit, 0.01" in caplog.text
    caplog.clear()
    Temperature().scaling(Prediction(log_p[None], mean_log_probs=log_p), rows)
    assert not caplog.text


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
