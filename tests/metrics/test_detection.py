"""Selective answering and out-of-distribution detection against values worked out by hand, ties included."""

import math

import pytest
import torch

from bayeslora.errors import InputError
from bayeslora.metrics.classification import accuracy
from bayeslora.metrics.detection import aupr_in, aupr_out, aurc, auroc, fpr95, risk_coverage

DETECTION = {"auroc": auroc, "aupr_out": aupr_out, "aupr_in": aupr_in, "fpr95": fpr95}
detection = pytest.mark.parametrize("score", DETECTION.values(), ids=DETECTION.keys())


def logs(*probs):
    return torch.tensor(probs, dtype=torch.float64).log()


def floats(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_case(rows=200, choices=4, seed=0):
    """Calibrated predictions: the labels are drawn from the probabilities."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, choices, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    return log_p, torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(-1)


# Three examples: sure and right, unsure and right, rather sure and wrong.
LOG_P = logs([0.9, 0.1], [0.4, 0.6], [0.7, 0.3])
LABELS = torch.tensor([0, 1, 1])


def test_risk_coverage_by_hand():
    coverage, risk = risk_coverage(LOG_P, LABELS)
    torch.testing.assert_close(coverage, floats(1 / 3, 2 / 3, 1))
    torch.testing.assert_close(risk, floats(0, 1 / 2, 1 / 3))
    assert aurc(LOG_P, LABELS) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3, abs=1e-15)


def test_risk_coverage_follows_a_given_score():
    _, risk = risk_coverage(LOG_P, LABELS, floats(1, 2, 3))
    torch.testing.assert_close(risk, floats(1, 1 / 2, 1 / 3))


def test_risk_of_tied_examples_is_the_mean_over_their_orders():
    _, risk = risk_coverage(LOG_P, LABELS, floats(2, 1, 1))
    torch.testing.assert_close(risk, floats(0, 1 / 4, 1 / 3))


def test_aurc_of_a_score_that_says_nothing_is_the_error_rate():
    log_p, labels = random_case()
    constant = torch.zeros(len(labels))
    assert aurc(log_p, labels, constant) == pytest.approx(1 - accuracy(log_p, labels).item(), abs=1e-14)


def test_auroc_by_hand():
    # Of the four negatives 2 beats two and ties with one, 4 and 5 beat all.
    assert auroc(floats(0, 1, 2, 3), floats(2, 4, 5)) == pytest.approx((2.5 + 4 + 4) / 12, abs=1e-15)


def test_average_precision_by_hand():
    # Descending: 5+ 4+ 3- (2+ 2-) 1- 0-: precision 1 at 5, 1 at 4, 3/5 at the tied 2.
    assert aupr_out(floats(0, 1, 2, 3), floats(2, 4, 5)) == pytest.approx((1 + 1 + 3 / 5) / 3, abs=1e-15)
    # ID positive, ascending: 0 1 (2 2) 3: precision 1, 1, 3/4, 4/5.
    assert aupr_in(floats(0, 1, 2, 3), floats(2, 4, 5)) == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4, abs=1e-15)


def test_fpr95_by_hand():
    positive = torch.arange(20, dtype=torch.float64)  # 19 of 20 is 95 %, so the threshold is 1
    assert fpr95(floats(0, 0.5, 1, 7, -3), positive) == pytest.approx(2 / 5, abs=1e-15)
    # Of 19 positives 95 % are more than 18, so the threshold is the lowest, 0.
    assert fpr95(floats(0, 0.5, 1, 7, -3), positive[:19]) == pytest.approx(4 / 5, abs=1e-15)


def test_perfect_separation_scores_perfectly():
    negative, positive = floats(0, 1, 2), floats(3, 4)
    assert {name: score(negative, positive) for name, score in DETECTION.items()} == {
        "auroc": 1, "aupr_out": 1, "aupr_in": 1, "fpr95": 0,
    }  # fmt: skip


def test_scores_that_are_all_equal_say_nothing():
    negative, positive = torch.zeros(30), torch.zeros(10)
    assert {name: score(negative, positive) for name, score in DETECTION.items()} == {
        "auroc": 0.5, "aupr_out": 0.25, "aupr_in": 0.75, "fpr95": 1,
    }  # fmt: skip


@detection
def test_detection_depends_only_on_the_ranks(score):
    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    assert score(negative.exp(), positive.exp()) == score(negative, positive)


def test_negating_the_scores_reverses_the_auroc():
    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 50, generator=generator, dtype=torch.float64).mul(3).round()
    assert auroc(-negative, -positive) == pytest.approx(1 - auroc(negative, positive).item(), abs=1e-15)


@detection
def test_a_score_that_is_nan_and_an_empty_sample_are_refused(score):
    with pytest.raises(InputError, match="row 1 is NaN"):
        score(floats(0, math.nan), floats(1))
    with pytest.raises(InputError, match="at least one example"):
        score(floats(0), torch.zeros(0))
