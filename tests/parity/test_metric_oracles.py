"""Scores against torchmetrics and scikit-learn on random predictions; the uncertainty of mixtures by the joint law."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score, roc_curve
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from bayeslora.metrics.classification import accuracy, brier, ece, nll
from bayeslora.metrics.detection import aupr_in, aupr_out, auroc, fpr95
from bayeslora.metrics.prediction import Prediction

CASES = [(500, 4, 0), (333, 3, 1), (64, 2, 2), (1000, 10, 3)]
cases = pytest.mark.parametrize(("rows", "choices", "seed"), CASES)


def predictions(rows, choices, seed):
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, choices, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    return log_p, torch.randint(choices, (rows,), generator=generator)


@cases
def test_accuracy_is_torchmetrics_micro_accuracy(rows, choices, seed):
    log_p, labels = predictions(rows, choices, seed)
    oracle = MulticlassAccuracy(num_classes=choices, average="micro")(log_p.exp(), labels)
    assert accuracy(log_p, labels) == pytest.approx(oracle.item(), abs=1e-6)  # the oracle counts in float32


@cases
@pytest.mark.parametrize("bins", [15, 10])
def test_ece_is_torchmetrics_l1_calibration_error(rows, choices, seed, bins):
    log_p, labels = predictions(rows, choices, seed)
    oracle = MulticlassCalibrationError(num_classes=choices, n_bins=bins, norm="l1")(log_p.exp(), labels)
    assert ece(log_p, labels, bins) == pytest.approx(oracle.item(), abs=1e-6)  # the oracle sums in float32


@cases
def test_nll_is_sklearns_log_loss(rows, choices, seed):
    log_p, labels = predictions(rows, choices, seed)
    oracle = log_loss(labels.numpy(), log_p.exp().numpy(), labels=range(choices))
    assert nll(log_p, labels) == pytest.approx(oracle, abs=1e-6)  # float32


@cases
def test_brier_is_the_sum_of_sklearns_one_against_all_brier_scores(rows, choices, seed):
    log_p, labels = predictions(rows, choices, seed)
    oracle = sum(brier_score_loss((labels == c).numpy(), log_p[:, c].exp().numpy()) for c in range(choices))
    assert brier(log_p, labels) == pytest.approx(oracle, abs=1e-6)  # float32


def scores(seed, negatives, positives, tied):
    generator = torch.Generator().manual_seed(seed)
    negative = torch.randn(negatives, generator=generator, dtype=torch.float64)
    positive = torch.randn(positives, generator=generator, dtype=torch.float64) + 1
    return (negative.mul(2).round(), positive.mul(2).round()) if tied else (negative, positive)


detection = pytest.mark.parametrize(
    ("seed", "negatives", "positives", "tied"),
    [(0, 300, 200, False), (1, 300, 200, True), (2, 40, 101, False), (3, 41, 60, True), (4, 7, 1, False)],
)


@detection
def test_auroc_and_average_precision_are_sklearns(seed, negatives, positives, tied):
    negative, positive = scores(seed, negatives, positives, tied)
    values, is_ood = torch.cat([negative, positive]).numpy(), [0] * negatives + [1] * positives
    is_known = [1] * negatives + [0] * positives
    assert auroc(negative, positive) == pytest.approx(roc_auc_score(is_ood, values), abs=1e-6)  # float32
    assert aupr_out(negative, positive) == pytest.approx(average_precision_score(is_ood, values), abs=1e-6)  # float32
    assert aupr_in(negative, positive) == pytest.approx(average_precision_score(is_known, -values), abs=1e-6)  # float32


@detection
def test_fpr95_is_the_first_point_of_sklearns_roc_curve_with_95_percent_of_the_positives(
    seed, negatives, positives, tied
):
    negative, positive = scores(seed, negatives, positives, tied)
    values, is_ood = torch.cat([negative, positive]).numpy(), [0] * negatives + [1] * positives
    false_rate, true_rate, _ = roc_curve(is_ood, values, drop_intermediate=False)
    enough = (true_rate * positives).round() * 100 >= 95 * positives  # in whole positives, free of rounding
    assert fpr95(negative, positive) == pytest.approx(false_rate[enough.argmax()], abs=1e-6)  # float32


@pytest.mark.parametrize("seed", range(5))
def test_a_mixtures_uncertainty_is_that_of_the_joint_law_of_member_draw_and_answer(seed, tmp_path):
    members, draws, rows, choices = 3, 4, 6, 5
    rng = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(members * draws, rows, choices, generator=rng, dtype=torch.float64).mul(2).log_softmax(-1)
    components = tuple(m for m in range(members) for _ in range(draws))
    prediction = Prediction(log_probs.float(), components=components)
    prediction.save(tmp_path / "p.safetensors")

    def entropy(p):
        return float(-(p * np.log(p)).sum())

    for each in (prediction, Prediction.load(tmp_path / "p.safetensors")):
        for row in range(rows):
            joint = log_probs[:, row].exp().numpy().reshape(members, draws, choices) / (members * draws)
            answer, member = joint.sum((0, 1)), joint.sum((1, 2))
            draw_and_member, member_and_answer = joint.sum(2), joint.sum(1)
            total = entropy(answer) + entropy(draw_and_member) - entropy(joint)  # I(answer; member, draw)
            between = entropy(answer) + entropy(member) - entropy(member_and_answer)  # I(answer; member)
            found = [float(getattr(each, name)[row]) for name in ("mutual_information", "between", "within")]
            assert found == pytest.approx([total, between, total - between], abs=1e-6)  # float32
            assert float(each.entropy[row]) == pytest.approx(entropy(answer), abs=1e-6)  # float32
            assert float(each.expected_entropy[row]) == pytest.approx(entropy(answer) - total, abs=1e-6)  # float32
            top = answer.argmax()
            others = np.mean(joint.reshape(-1, choices).argmax(1) != top)
            assert float(each.disagreement[row]) == pytest.approx(others, abs=1e-6)
