"""Marks of a comparison's table: the best of a column, and what the test rows do not tell from it."""

import pytest
import torch

from bayeslora.comparison.costs import Cost
from bayeslora.comparison.run import Comparison, Result
from bayeslora.comparison.tables import LEGEND, comparison_rows, marked, text_table
from bayeslora.metrics.evaluation import evaluate
from bayeslora.metrics.prediction import Prediction

ROWS = 300


def prediction(labels, sharpness, seed):
    """Three draws that give the right answer a head start."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, ROWS, 3, generator=rng)
    logits[:, torch.arange(ROWS), labels] += sharpness
    return Prediction(logits.log_softmax(-1), mean_log_probs=logits[0].log_softmax(-1), seconds=1.0)


@pytest.fixture(scope="module")
def made():
    """A good method, the same once more, and a poor one, under two seeds."""
    labels = torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(9))
    flat = torch.zeros(ROWS, dtype=torch.long)
    found = Comparison()
    for name, sharpness in (("good", 2.0), ("alike", 2.0), ("poor", 0.3)):
        for seed in (0, 1):
            p = prediction(labels, sharpness, seed)
            other = {"other": prediction(flat, 0.0, 100 + seed)}
            result = Result(p, other, evaluate(p, labels, other, resamples=0), Cost(1.0, 1.0, None, 10))
            found.results.setdefault(name, {})[seed] = result
    return found, labels


def test_a_clearly_worse_row_has_no_mark_and_an_equal_one_is_tied(made):
    found, labels = made
    rows = {row.name: row.marks for row in marked(found, comparison_rows(found), labels, resamples=400)}
    for heading in ("accuracy", "NLL", "Brier", "AURC"):
        assert sorted(rows[f"{n}, 3 draws"][heading] for n in ("good", "alike")) == ["best", "tied"]
        assert heading not in rows["poor, 3 draws"]
        assert heading not in rows["poor, mean"]
    # entropy tells the other rows, on which nothing is sure, by the good methods only
    assert {rows[f"{n}, 3 draws"].get("AUROC H") for n in ("good", "alike")} == {"best", "tied"}
    assert "AUROC H" not in rows["poor, 3 draws"]
    assert not any("train s" in marks for marks in rows.values())


def test_the_tie_of_a_row_with_itself_is_a_tie_whatever_the_order(made):
    found, labels = made
    twice = Comparison({"a": found.results["poor"], "b": found.results["poor"]})
    rows = marked(twice, comparison_rows(twice), labels, resamples=50)
    marks = [row.marks["NLL"] for row in rows if row.predictor == "draws"]
    assert marks == ["best", "tied"]


def test_the_table_shows_the_marks_and_says_what_they_mean(made):
    found, labels = made
    rows = marked(found, comparison_rows(found), labels, resamples=50)
    for markdown in (False, True):
        text = text_table(rows, markdown=markdown)
        assert text.endswith(LEGEND)
        assert " * " in text
        assert " ~ " in text
    assert LEGEND not in text_table(comparison_rows(found))
