"""The closing sentences of a comparison: they follow from the numbers."""

import pytest
import torch

from bayeslora.comparison.verdict import in_words, verdicts
from bayeslora.errors import InputError
from bayeslora.metrics.prediction import Prediction

ROWS = 400
RIGHT = torch.arange(ROWS) % 10 < 7  # 70 % right, spread evenly
LABELS = torch.where(RIGHT, 1, 0)


def says(confidence, right=RIGHT):
    """A predictor that always says so much, and is right on those rows."""
    yes = torch.where(right == RIGHT, confidence, 1 - confidence)
    return Prediction(torch.stack([1 - yes, yes], -1).log()[None])


def outcomes(**predictions):
    return {v.name: v.outcome for v in verdicts(predictions, LABELS)}


def test_a_predictor_is_judged_by_the_calibration_error_and_the_accuracy_of_the_first():
    wrong = RIGHT.clone()
    wrong[:40] = ~wrong[:40]  # 40 rows answered the other way, of which 28 were right: four points of accuracy
    found = outcomes(
        map=says(0.97), exact=says(0.7), some=says(0.87), same=says(0.97), more=says(0.999), other=says(0.7, wrong)
    )
    assert found == {
        "map": "reference", "exact": "cured", "some": "better", "same": "same", "more": "worse", "other": "worse",
    }  # fmt: skip


def test_many_lost_answers_are_worse_whatever_the_calibration():
    coin = torch.arange(ROWS) % 2 == 0
    assert outcomes(map=says(0.97), coin=says(0.55, coin))["coin"] == "worse"


def test_where_the_truth_is_known_a_cure_is_closer_to_it_than_a_guess():
    truth = torch.tensor([0.3, 0.7]).expand(ROWS, 2)
    found = verdicts({"map": says(0.97), "exact": says(0.7), "shy": says(0.53)}, LABELS, None, truth)
    assert [v.outcome for v in found] == ["reference", "cured", "better"]
    assert found[1].kl == pytest.approx(0.0, abs=1e-6)


def test_the_sentences_say_what_cured_what_did_not_and_what_to_try_next():
    found = verdicts({"map": says(0.97), "temperature": says(0.72), "swag": says(0.97), "ivon": says(0.7)}, LABELS)
    said = "\n".join(in_words(found))
    assert "map says 97% on average and is right 70% of the time; calibration error 0.270." in said
    assert "over-confident by 27 points" in said
    assert "two points of accuracy lost): temperature, ivon." in said
    assert "No difference beyond chance: swag." in said
    assert "Better, but not cured: –." in said
    assert "bayeslora train --method ivon …" in said
    assert "--method ivon --set sigma0=0.1 …" in "\n".join(in_words(found, settings={"ivon": "sigma0=0.1"}))
    assert "raise swag.learning_rate" in said
    assert "does no worse" not in said  # .02 against .00
    better = verdicts({"map": says(0.97), "temperature": says(0.7), "ivon": says(0.72)}, LABELS)
    assert "one number fitted on held-out rows (temperature) does no worse" in "\n".join(in_words(better))
    alone = verdicts({"map": says(0.97), "temperature": says(0.7), "swag": says(0.97)}, LABELS)
    assert "one number fitted on held-out rows does it" in "\n".join(in_words(alone))


def test_there_is_little_to_cure_where_the_first_is_not_over_confident():
    said = "\n".join(in_words(verdicts({"map": says(0.72), "ivon": says(0.7)}, LABELS)))
    assert "hardly over-confident" in said
    assert "Next" not in said


def test_other_data_and_the_divergence_of_a_guess_are_named_where_they_are_known():
    truth = torch.tensor([0.3, 0.7]).expand(ROWS, 2)
    unsure = Prediction(torch.full((1, 50, 2), 0.5).log())
    found = verdicts({"map": says(0.97), "ivon": says(0.7)}, LABELS, {"map": says(0.97), "ivon": unsure}, truth)
    said = "\n".join(in_words(found, 0.08, "weather"))
    assert "KL 0.08" in said
    assert "weather: AUROC 0.50 by map, at best 1.00 by ivon" in said


def test_nothing_to_judge_is_refused():
    with pytest.raises(InputError, match="nothing to judge"):
        verdicts({}, LABELS)
