"""The warning where the draws lose right answers that the mean has: when it is there, and when it is not."""

import json
import math

import pytest
import torch
from scipy.stats import binomtest

from bayeslora.comparison.costs import Cost
from bayeslora.comparison.run import Comparison, Result
from bayeslora.comparison.tables import warnings
from bayeslora.metrics.evaluation import evaluate, mcnemar
from bayeslora.metrics.prediction import Prediction

ROWS = 200
LABELS = torch.zeros(ROWS, dtype=torch.long)


def prediction(lost, won, *, mean=True):
    """Draws that lose some right answers of the mean, and win others; both are wrong on the last fifty rows."""
    right, wrong = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.1, 0.9]).log()
    by_mean = [right] * 150 + [wrong] * 50
    by_draws = [wrong] * lost + [right] * (150 - lost + won) + [wrong] * (50 - won)
    return Prediction(torch.stack(by_draws).expand(3, -1, -1), mean_log_probs=torch.stack(by_mean) if mean else None)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 5), (0, 6), (3, 3), (4, 14), (70, 40)])
def test_the_p_value_is_that_of_the_exact_binomial_test(one, other):
    exact = binomtest(one, one + other).pvalue if one + other else 1.0
    assert mcnemar(one, other) == pytest.approx(exact, rel=1e-12) == mcnemar(other, one)


def test_a_loss_beyond_chance_is_told_in_one_sentence_with_advice():
    found = evaluate(prediction(14, 4), LABELS, resamples=0)
    assert found.warning is not None
    assert "0.700 against 0.750" in found.warning
    assert "tempered(posterior, 1 / 4)" in found.warning
    assert found.warning in found.table()
    assert json.loads(json.dumps(found.to_dict()))["warning"] == found.warning


@pytest.mark.parametrize(
    "quiet",
    [prediction(10, 4), prediction(4, 14), prediction(0, 0), prediction(40, 0, mean=False)],
    ids=["within chance", "a gain", "the same", "no mean"],
)
def test_there_is_no_warning_without_a_loss_beyond_chance(quiet):
    found = evaluate(quiet, LABELS, resamples=0)
    assert found.warning is None
    assert "arning" not in found.table()


@pytest.mark.slow
def test_equal_predictors_are_warned_of_in_less_than_five_of_a_hundred_test_sets():
    # the test is exact and two-sided, so 2.5 % at most; 400 sets, more than 22 warnings has probability 1e-3
    rng = torch.Generator().manual_seed(0)
    count = 0
    for _ in range(400):
        logits = torch.randn(2, ROWS, 2, generator=rng)
        found = evaluate(
            Prediction(logits[:1].log_softmax(-1), mean_log_probs=logits[1].log_softmax(-1)), LABELS, resamples=0
        )
        count += found.warning is not None
    assert 0 < count <= 22


def test_a_comparison_names_the_method_and_the_seeds_once():
    found = Comparison()
    for seed, lost in ((0, 14), (1, 0), (2, 30)):
        for name, p in (("blob", prediction(lost, 0)), ("map", prediction(0, 0))):
            result = Result(p, {}, evaluate(p, LABELS, resamples=0), Cost(1.0, 1.0, None, 10))
            found.results.setdefault(name, {})[seed] = result
    (line,) = warnings(found)
    assert line.startswith("Warning: blob, seed 0, 2: the draws cost accuracy: 0.680 against 0.750")
    assert math.isclose(found.results["blob"][0].evaluation.value("draws", "accuracy"), 0.68)
