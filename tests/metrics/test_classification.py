"""Scores against values worked out by hand, and their invariances."""

import math
from functools import partial

import pytest
import torch

from bayeslora.errors import InputError
from bayeslora.metrics.classification import (
    accuracy,
    brier,
    classwise_calibration_error,
    ece,
    kl_to_truth,
    nll,
    reliability,
    static_calibration_error,
)
from bayeslora.metrics.detection import aurc

LABELLED = {
    "accuracy": accuracy,
    "nll": nll,
    "brier": brier,
    "ece": ece,
    "ece_mass": partial(ece, binning="mass"),
    "sce": static_calibration_error,
    "sce_mass": partial(static_calibration_error, binning="mass"),
    "aurc": aurc,
}
labelled = pytest.mark.parametrize("score", LABELLED.values(), ids=LABELLED.keys())


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


def test_accuracy_by_hand():
    assert accuracy(LOG_P, LABELS) == pytest.approx(2 / 3, abs=1e-15)


def test_nll_by_hand():
    assert nll(LOG_P, LABELS) == pytest.approx(-math.log(0.9 * 0.6 * 0.3) / 3, abs=1e-14)


def test_brier_sums_over_the_choices():
    assert brier(LOG_P, LABELS) == pytest.approx(2 * (0.1**2 + 0.4**2 + 0.7**2) / 3, abs=1e-14)


def test_ece_by_hand_with_every_example_in_its_own_bin():
    assert ece(LOG_P, LABELS, bins=15) == pytest.approx((0.1 + 0.4 + 0.7) / 3, abs=1e-14)


def test_ece_by_hand_with_two_examples_in_one_bin():
    # Bins (0.5, 0.75] with confidences 0.6, 0.7 and accuracy 1/2, and (0.75, 1] with confidence 0.9 and accuracy 1.
    assert ece(LOG_P, LABELS, bins=4) == pytest.approx((2 * abs(0.5 - 0.65) + 0.1) / 3, abs=1e-14)


def test_ece_with_one_bin_is_the_gap_between_mean_confidence_and_accuracy():
    log_p, labels = random_case()
    gap = abs(log_p.max(-1).values.exp().mean().item() - accuracy(log_p, labels).item())
    assert ece(log_p, labels, bins=1) == pytest.approx(gap, abs=1e-14)
    assert ece(log_p, labels, bins=1, binning="mass") == pytest.approx(gap, abs=1e-14)


def test_reliability_by_hand():
    diagram = reliability(LOG_P, LABELS, bins=4)
    torch.testing.assert_close(diagram.edges, floats(0, 0.25, 0.5, 0.75, 1))
    torch.testing.assert_close(diagram.confidence, floats(math.nan, math.nan, 0.65, 0.9), equal_nan=True)
    torch.testing.assert_close(diagram.accuracy, floats(math.nan, math.nan, 0.5, 1), equal_nan=True)
    assert diagram.count.tolist() == [0, 0, 2, 1]


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    log_p = logs([0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25])
    assert reliability(log_p, torch.tensor([0, 0, 0]), bins=4).count.tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(("rows", "bins"), [(200, 15), (15, 15), (7, 3), (2, 5)])
def test_equal_mass_bins_hold_equally_many_examples_to_within_one(rows, bins):
    log_p, labels = random_case(rows)
    count = reliability(log_p, labels, bins, "mass").count
    assert count.sum() == rows
    assert count.max() - count.min() <= 1


def test_equal_confidences_share_an_equal_mass_bin():
    log_p = logs([0.6, 0.4], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1])
    diagram = reliability(log_p, torch.zeros(6, dtype=torch.long), bins=3, binning="mass")
    assert diagram.count.tolist() == [4, 0, 2]
    torch.testing.assert_close(diagram.edges, floats(0.6, 0.7, 0.7, 0.9))


def test_certain_and_right_predictions_are_perfect_under_every_score():
    log_p, labels = logs([1.0, 0.0], [0.0, 1.0]), torch.tensor([0, 1])
    assert {name: score(log_p, labels) for name, score in LABELLED.items()} == {
        **dict.fromkeys(LABELLED, 0),
        "accuracy": 1,
    }


def test_classwise_error_by_hand():
    # One bin: each class's mean probability against its frequency, 2/3 against 1/3 and 1/3 against 2/3.
    errors = classwise_calibration_error(LOG_P, LABELS, bins=1)
    torch.testing.assert_close(errors, floats(1 / 3, 1 / 3))
    # Two bins, class 0: (0, 0.5] has p = 0.4, y = 0; (0.5, 1] has p = 0.9, 0.7 and y = 1, 0. Class 1 mirrors it.
    errors = classwise_calibration_error(LOG_P, LABELS, bins=2)
    torch.testing.assert_close(errors, floats((0.4 + 0.6) / 3, (0.4 + 0.6) / 3))


def test_classwise_error_of_two_classes_is_the_same_for_both():
    log_p, labels = random_case(choices=2)
    first, second = classwise_calibration_error(log_p, labels, bins=1)
    assert first.item() == pytest.approx(second.item(), abs=1e-14)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_static_calibration_error_is_the_mean_of_the_classwise_errors(binning):
    log_p, labels = random_case()
    classwise = classwise_calibration_error(log_p, labels, 15, binning)
    assert static_calibration_error(log_p, labels, 15, binning) == pytest.approx(classwise.mean().item(), abs=1e-15)


@pytest.mark.parametrize("bins", [1, 5, 50])
def test_classwise_error_of_a_class_does_not_depend_on_the_other_classes_bins(bins):
    log_p, labels = random_case(choices=3)
    for c in range(3):
        one_against_all = torch.stack([log_p[:, c], torch.log1p(-log_p[:, c].exp())], -1)
        alone = classwise_calibration_error(one_against_all, (labels != c).long(), bins, "mass")[0]
        together = classwise_calibration_error(log_p, labels, bins, "mass")[c]
        assert alone.item() == pytest.approx(together.item(), abs=1e-14)


def test_kl_to_truth_by_hand():
    truth = floats([0.5, 0.5], [1, 0], [0.7, 0.3])
    by_hand = (0.5 * math.log(0.25 / 0.09) - math.log(0.4)) / 3
    assert kl_to_truth(LOG_P, truth) == pytest.approx(by_hand, abs=1e-14)


def test_kl_of_the_truth_to_itself_is_zero_with_missing_choices():
    truth = floats([0.2, 0.8, 0], [0.3, 0.3, 0.4])
    assert kl_to_truth(truth.log(), truth) == pytest.approx(0, abs=1e-15)


def test_kl_is_expected_nll_minus_the_entropy_of_the_truth():
    log_p, truth = random_case()[0], random_case(seed=1)[0].exp()
    expected_nll = -(truth * log_p).sum(-1).mean().item()
    entropy = -(truth * truth.log()).sum(-1).mean().item()
    assert kl_to_truth(log_p, truth) == pytest.approx(expected_nll - entropy, abs=1e-13)


def test_a_possible_choice_with_probability_zero_costs_infinity():
    log_p = logs([1.0, 0.0])
    assert nll(log_p, torch.tensor([1])) == math.inf
    assert kl_to_truth(log_p, floats([0.5, 0.5])) == math.inf


def test_true_probabilities_that_do_not_sum_to_one_are_refused_with_their_row():
    with pytest.raises(InputError, match="row 1 is not a distribution"):
        kl_to_truth(LOG_P[:2], floats([0.5, 0.5], [0.5, 0.4]))


@labelled
def test_the_order_of_the_rows_does_not_matter(score):
    log_p, labels = random_case()
    log_p = log_p.mul(4).round().log_softmax(-1)  # many equal confidences
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    assert score(log_p[order], labels[order]) == pytest.approx(score(log_p, labels).item(), abs=1e-12)


@labelled
def test_the_names_of_the_choices_do_not_matter(score):
    log_p, labels = random_case()
    assert score(log_p.flip(-1), 3 - labels) == pytest.approx(score(log_p, labels).item(), abs=1e-12)


@pytest.mark.parametrize("name", sorted(LABELLED.keys() - {"sce", "sce_mass"}))
def test_a_choice_that_no_example_has_changes_nothing(name):
    log_p, labels = random_case()
    wider = torch.cat([log_p, torch.full((len(labels), 1), -math.inf)], -1)
    assert LABELLED[name](wider, labels) == pytest.approx(LABELLED[name](log_p, labels).item(), abs=1e-14)


def test_a_choice_that_no_example_has_is_a_perfectly_calibrated_class():
    log_p, labels = random_case()
    wider = torch.cat([log_p, torch.full((len(labels), 1), -math.inf)], -1)
    assert classwise_calibration_error(wider, labels)[-1] == 0


@labelled
def test_float32_predictions_score_like_float64_ones(score):
    log_p, labels = random_case()
    single = log_p.float()
    assert score(single, labels) == pytest.approx(score(single.double(), labels).item(), rel=1e-12)


@labelled
def test_an_unknown_label_is_refused_with_its_row(score):
    with pytest.raises(InputError, match=r"row 1 has no known answer \(-1\)"):
        score(LOG_P, torch.tensor([0, -1, 1]))


@labelled
@pytest.mark.parametrize("label", [2, -2])
def test_a_label_out_of_range_is_refused_with_its_row(score, label):
    with pytest.raises(InputError, match=f"row 2 is {label}, but the predictions have 2 choices"):
        score(LOG_P, torch.tensor([0, 1, label]))


@labelled
def test_a_prediction_that_is_nan_is_refused_with_its_row(score):
    log_p = LOG_P.clone()
    log_p[2] = math.nan
    with pytest.raises(InputError, match="row 2 is NaN"):
        score(log_p, LABELS)


def test_no_bins_are_refused():
    with pytest.raises(InputError, match="at least one bin"):
        ece(LOG_P, LABELS, bins=0)
