"""`evaluate`: every predictor, every score, the same numbers as the pure functions."""

import json
import math
from dataclasses import replace

import pytest
import torch

from bayeslora.errors import InputError
from bayeslora.metrics import classification as metrics
from bayeslora.metrics.bootstrap import bootstrap
from bayeslora.metrics.detection import aupr_in, aupr_out, aurc, auroc, fpr95
from bayeslora.metrics.evaluation import Estimate, Evaluation, evaluate
from bayeslora.metrics.foreign import with_score
from bayeslora.metrics.prediction import Prediction
from bayeslora.tasks.types import Example, Format, Split

LABELLED = ["accuracy", "nll", "brier", "ece", "ece_mass", "sce", "aurc"]
DETECTION = {"auroc": auroc, "aupr_out": aupr_out, "aupr_in": aupr_in, "fpr95": fpr95}


def random_prediction(rows=40, seed=0, with_mean=True):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(5, rows, 3, generator=generator).mul(2).log_softmax(-1)
    mean = torch.randn(rows, 3, generator=generator).mul(2).log_softmax(-1)
    return Prediction(log_probs, mean_log_probs=mean if with_mean else None)


def split_of(labels, probs=None):
    probs = probs or [None] * len(labels)
    examples = tuple(Example("?", ("a", "b", "c"), label, p) for label, p in zip(labels, probs, strict=True))
    return Split("toy/test", examples, Format("{text}"))


PREDICTION = random_prediction()
LABELS = torch.arange(40) % 3


def test_both_predictors_have_every_score_in_the_same_order():
    rows = evaluate(PREDICTION, LABELS, resamples=0).rows
    assert list(rows) == ["mean", "draws"]
    assert [list(row) for row in rows.values()] == [LABELLED, LABELLED]


def test_without_a_mean_pass_only_the_draws_are_scored():
    assert list(evaluate(random_prediction(with_mean=False), LABELS, resamples=0).rows) == ["draws"]


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_the_scores_are_those_of_the_pure_functions(binning):
    result = evaluate(PREDICTION, LABELS, bins=7, binning=binning, resamples=0)
    for predictor, log_p in (("mean", PREDICTION.mean_log_probs), ("draws", PREDICTION.log_p)):
        for name in ("accuracy", "nll", "brier"):
            assert result.value(predictor, name) == getattr(metrics, name)(log_p, LABELS)
        assert result.value(predictor, "ece") == metrics.ece(log_p, LABELS, 7, binning)
        assert result.value(predictor, "ece_mass") == metrics.ece(log_p, LABELS, 7, "mass")
        assert result.value(predictor, "sce") == metrics.static_calibration_error(log_p, LABELS, 7, binning)
        assert result.value(predictor, "aurc") == aurc(log_p, LABELS)


def test_the_intervals_are_those_of_the_bootstrap_with_the_same_seed():
    other = random_prediction(rows=30, seed=1)
    result = evaluate(PREDICTION, LABELS, other, resamples=20, seed=3)
    nll = result.rows["draws"]["nll"]
    assert (nll.low, nll.high) == bootstrap(metrics.nll, (PREDICTION.log_p, LABELS), resamples=20, seed=3)
    area = result.rows["draws"]["ood/auroc_entropy"]
    samples = (PREDICTION.entropy,), (other.entropy,)
    assert (area.low, area.high) == bootstrap(auroc, *samples, resamples=20, seed=3)


def test_a_split_scores_like_its_labels():
    assert evaluate(PREDICTION, split_of(LABELS.tolist()), resamples=5) == evaluate(PREDICTION, LABELS, resamples=5)


def test_known_truth_adds_the_divergence_from_it():
    truth = random_prediction(seed=2).probs
    split = split_of(LABELS.tolist(), [tuple(row) for row in truth.tolist()])
    result = evaluate(PREDICTION, split, resamples=0)
    assert result.value("draws", "kl_to_truth") == metrics.kl_to_truth(PREDICTION.log_p, truth)
    assert result.value("mean", "kl_to_truth") == metrics.kl_to_truth(PREDICTION.mean_log_probs, truth)


def test_truth_with_fewer_choices_than_the_prediction_counts_the_rest_as_impossible():
    log_p = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]).log()
    split = split_of([0, 0], [(0.25, 0.75), (0.5, 0.25, 0.25)])
    assert evaluate(Prediction(log_p[None]), split, resamples=0).value("draws", "kl_to_truth") == pytest.approx(
        0, abs=1e-7
    )


def test_truth_that_one_example_lacks_is_not_scored():
    split = split_of([0, 1], [(0.2, 0.3, 0.5), None])
    assert "kl_to_truth" not in evaluate(random_prediction(rows=2), split, resamples=0).rows["draws"]


def test_detection_scores_compare_the_uncertainties_of_both_sets():
    other = random_prediction(rows=30, seed=1)
    result = evaluate(PREDICTION, LABELS, {"far": other, "near": PREDICTION}, resamples=0)
    for name, score in DETECTION.items():
        expected = score(PREDICTION.entropy, other.entropy)
        assert result.value("draws", f"far/{name}_entropy") == expected
        expected = score(PREDICTION.mutual_information, other.mutual_information)
        assert result.value("draws", f"far/{name}_mutual_information") == expected
        assert f"far/{name}_entropy" in result.rows["mean"]
        assert f"far/{name}_mutual_information" not in result.rows["mean"]
    assert result.value("draws", "near/auroc_entropy") == pytest.approx(0.5, abs=1e-15)
    assert result.ood == {"far": 30, "near": 40}


def test_detection_by_the_mean_needs_the_mean_on_both_sets():
    other = random_prediction(rows=30, seed=1, with_mean=False)
    result = evaluate(PREDICTION, LABELS, other, resamples=0)
    assert list(result.rows["mean"]) == LABELLED
    assert "ood/auroc_entropy" in result.rows["draws"]


def test_the_result_says_how_it_was_made():
    result = evaluate(PREDICTION, LABELS, bins=9, binning="mass", resamples=4)
    assert (result.n, result.draws, result.bins, result.binning, result.resamples) == (40, 5, 9, "mass", 4)


def test_the_dictionary_is_json_with_none_for_what_is_not_finite():
    prediction = Prediction(torch.tensor([[[1.0, 0.0]]]).log())
    content = evaluate(prediction, torch.tensor([1]), resamples=0).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["rows"]["draws"]["nll"] == {"value": None, "low": None, "high": None}
    assert content["rows"]["draws"]["brier"] == {"value": 2.0, "low": None, "high": None}
    assert (content["n"], content["draws"]) == (1, 1)


def test_the_table_aligns_one_line_per_score_and_one_column_per_predictor():
    rows = {
        "mean": {"nll": Estimate(1.5, 1.0, 2.0)},
        "draws": {"nll": Estimate(0.5, 0.25, math.inf), "x": Estimate(1.0, math.nan, math.nan)},
    }
    table = Evaluation(rows, n=7, draws=3, bins=15, binning="width", resamples=100, ood={"far": 2}).table()
    assert table.splitlines() == [
        "7 examples, 3 draws, 15 bins of equal width, 95 % intervals from 100 resamples, far: 2 examples",
        "",
        "     mean                     draws",
        "nll  1.5000 [1.0000, 2.0000]  0.5000 [0.2500, inf]",
        "x                             1.0000",
    ]


def test_an_unknown_predictor_or_score_is_refused_with_what_there_is():
    result = evaluate(PREDICTION, LABELS, resamples=0)
    with pytest.raises(InputError, match="choose from mean, draws"):
        result.value("median", "nll")
    with pytest.raises(InputError, match="choose from accuracy, nll"):
        result.value("mean", "f1")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(39, dtype=torch.long), "must be 40 integers"),
        (torch.zeros(40), "must be 40 integers"),
        (torch.zeros(40, 1, dtype=torch.long), "must be 40 integers"),
        (torch.full((40,), 3), "row 0 is 3"),
        (split_of([0] * 39 + [None]), r"toy/test: row 39 has no known answer \(-1\)"),
        (split_of([0] * 40, [(0.25,) * 4] * 40), "toy/test: row 0 has 4 true probabilities"),
        (split_of([0] * 40, [(0.5, 0.6)] * 40), "row 0 is not a distribution"),
    ],
)
def test_answers_that_do_not_fit_are_refused_in_words(labels, message):
    with pytest.raises(InputError, match=message):
        evaluate(PREDICTION, labels, resamples=0)


def test_settings_out_of_range_are_refused_in_words():
    with pytest.raises(InputError, match="resamples is -1"):
        evaluate(PREDICTION, LABELS, resamples=-1)
    with pytest.raises(InputError, match="at least one bin"):
        evaluate(PREDICTION, LABELS, bins=0)


def with_base(prediction, seed):
    rows = prediction.log_probs.shape[1]
    base = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    return replace(prediction, base_log_probs=base)


def test_the_base_is_a_predictor_and_a_witness_for_the_others():
    known, unknown = with_base(PREDICTION, 5), with_base(random_prediction(25, seed=1), 6)
    result = evaluate(known, LABELS, {"other": unknown}, resamples=0)
    assert list(result.rows) == ["mean", "draws", "base"]
    base = known.base_log_probs
    assert result.value("base", "nll") == metrics.nll(base, LABELS)
    assert result.value("base", "ece") == metrics.ece(base, LABELS, 15)
    assert "other/auroc_likelihood_ratio" not in result.rows["base"]
    for name, score in DETECTION.items():
        for predictor in ("mean", "draws"):
            one, other = (replace(p, log_probs=p.mean_log_probs[None]) if predictor == "mean" else p
                          for p in (known, unknown))  # fmt: skip
            by_ratio = score(-one.likelihood_ratio, -other.likelihood_ratio)
            assert result.value(predictor, f"other/{name}_likelihood_ratio") == pytest.approx(float(by_ratio))
            by_drift = score(-one.drift, -other.drift)
            assert result.value(predictor, f"other/{name}_drift") == pytest.approx(float(by_drift))


def test_what_tuning_raised_above_the_base_is_not_foreign():
    sure, flat = torch.tensor([[0.9, 0.05, 0.05]] * 40).log(), torch.full((40, 3), 1 / 3).log()
    known = Prediction(sure[None], base_log_probs=flat)
    foreign = Prediction(sure[None], base_log_probs=sure)  # the base has always been as sure
    rows = evaluate(known, LABELS, foreign, resamples=0).rows["draws"]
    assert rows["ood/auroc_likelihood_ratio"].value == rows["ood/auroc_drift"].value == 1
    assert rows["ood/auroc_entropy"].value == 0.5


def test_a_set_whose_base_was_not_asked_is_told_by_the_uncertainties_alone():
    rows = evaluate(with_base(PREDICTION, 5), LABELS, random_prediction(9), resamples=0).rows["draws"]
    assert "ood/auroc_entropy" in rows
    assert "ood/auroc_drift" not in rows


def test_a_score_of_ones_own_is_scored_like_the_uncertainties():
    other = random_prediction(25, seed=1)
    plain = evaluate(PREDICTION, LABELS, {"other": other}, resamples=30)
    found = with_score(plain, "own", PREDICTION.mutual_information, {"other": other.mutual_information})
    for name in DETECTION:
        assert found.rows["mean"][f"other/{name}_own"] == plain.rows["draws"][f"other/{name}_mutual_information"]
    assert found.rows["draws"] == plain.rows["draws"]
