"""Whether the draws are worth their passes: against differences that are known."""

import math

import pytest
import torch

from bayeslora.metrics.bootstrap import paired_bootstrap
from bayeslora.metrics.classification import nll
from bayeslora.metrics.evaluation import evaluate
from bayeslora.metrics.prediction import Prediction
from bayeslora.metrics.recommendation import recommended

ROWS, CHOICES = 200, 3


def predicted(gain, spread=0.5, components=None):
    """Two draws whose average gives the right choice ``gain`` nats more than the mean, give or take ``spread``."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(CHOICES, (ROWS,), generator=rng)
    at_mean = torch.full((ROWS,), -1.5) + 0.3 * torch.randn(ROWS, generator=rng)
    at_draws = (at_mean + gain + spread * torch.randn(ROWS, generator=rng)).clamp(max=-0.01)

    def whole(right):
        rest = torch.log1p(-right.exp()) - math.log(CHOICES - 1)
        return rest[:, None].repeat(1, CHOICES).scatter(1, labels[:, None], right[:, None])

    return Prediction(whole(at_draws).expand(2, -1, -1), whole(at_mean), components=components), labels


@pytest.mark.parametrize(
    ("gain", "suffices", "words"),
    [
        (0.4, False, "2 draws add something to the mean alone"),
        (0.0, True, "the mean alone is within the interval of 2 draws"),
        (-0.4, True, "the mean alone does better than 2 draws"),
    ],
)
def test_draws_are_kept_where_they_gain_more_than_chance_allows(gain, suffices, words):
    prediction, labels = predicted(gain)  # forty standard errors off, or none
    found = recommended(prediction, labels)
    of_mean, of_draws = (prediction.mean_log_probs, labels), (prediction.log_p, labels)
    assert found.gain == pytest.approx(float(nll(*of_mean) - nll(*of_draws)), abs=1e-6)
    assert (found.low, found.high) == tuple(map(float, paired_bootstrap(nll, of_mean, of_draws)))
    assert found.mean_suffices is suffices
    assert words in found.text
    assert ("predict with --draws 0" in found.text) is suffices


def test_an_evaluation_says_it_in_its_table_and_its_numbers():
    prediction, labels = predicted(0.4)
    found = evaluate(prediction, labels, resamples=100, seed=3)
    assert found.recommendation == recommended(prediction, labels, resamples=100, seed=3)
    assert found.table().endswith(f"\nCost: {found.recommendation.text}.")
    assert found.to_dict()["recommendation"]["low"] == found.recommendation.low


def test_a_mixture_is_compared_with_its_first_member():
    assert "the first member's mean alone" in recommended(*predicted(0.0, components=(0, 1))).text


def test_nothing_is_said_where_there_is_nothing_to_compare():
    prediction, labels = predicted(0.4)
    mean = prediction.mean_log_probs
    assert recommended(prediction, labels, resamples=0) is None
    assert recommended(Prediction(prediction.log_probs), labels) is None
    assert recommended(Prediction(mean[None], mean), labels) is None
    never = torch.full_like(mean, -math.inf).scatter(1, (labels[:, None] + 1) % CHOICES, 0.0)
    assert recommended(Prediction(prediction.log_probs, never), labels) is None
