"""Tables of comparisons: what a row holds, and how a cell is written."""

import math

import pytest
import torch

from bayeslora.comparison.costs import Cost
from bayeslora.comparison.run import Comparison, Result
from bayeslora.comparison.tables import Row, comparison_rows, text_table
from bayeslora.metrics.evaluation import evaluate
from bayeslora.metrics.prediction import Prediction

LABELS = torch.tensor([0, 1, 1, 0])


def prediction(draws, seed):
    noise = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(draws, 4, 3, generator=noise).log_softmax(-1)
    mean = log_probs[0] if draws == 1 else torch.randn(4, 3, generator=noise).log_softmax(-1)
    return Prediction(log_probs, mean_log_probs=mean, seconds=2.0)


@pytest.fixture
def comparison():
    found = Comparison({"map": {}, "swag": {}})
    for method, draws in (("map", 1), ("swag", 3)):
        for seed in (0, 1):
            p = prediction(draws, seed)
            evaluation = evaluate(p, LABELS, {"other": p}, resamples=0)
            found.results[method][seed] = Result(p, {"other": p}, evaluation, Cost(100.0 + seed, 2.0, None, 4_000_000))
    return found


def test_a_point_has_one_row_and_every_other_posterior_one_for_its_mean_and_one_for_its_draws(comparison):
    assert [row.name for row in comparison_rows(comparison)] == ["map", "swag, mean", "swag, 3 draws"]


def test_a_row_holds_one_number_per_seed_and_they_are_the_evaluations(comparison):
    rows = {row.name: row.numbers for row in comparison_rows(comparison)}
    for name, method, predictor in (("map", "map", "draws"), ("swag, mean", "swag", "mean")):
        wanted = [r.evaluation.value(predictor, "nll") for r in comparison.results[method].values()]
        assert rows[name]["NLL"] == wanted
    assert rows["map"]["train s"] == [100.0, 101.0]
    assert "train s" not in rows["swag, mean"]
    assert "AUROC MI" in rows["swag, 3 draws"]
    assert "AUROC MI" not in rows["swag, mean"]


def test_cells_are_the_number_or_mean_and_sample_deviation_and_blank_where_there_is_none():
    numbers = {
        "a": {"NLL": [1.0, 2.0], "train s": [3.0, 4.0]},
        "b": {"NLL": [0.5], "train s": [120.4]},
        "c": {"NLL": [math.nan]},
    }
    rows = [Row(name, name, "draws", of_row) for name, of_row in numbers.items()]
    lines = text_table(rows).splitlines()
    assert lines[2].split("  ")[-2:] == ["1.500 ± 0.707", "3.5 ± 0.7"]
    assert lines[3].split() == ["b", "0.500", "120"]
    assert lines[4].split() == ["c"]


def test_lines_are_equally_long_and_markdown_has_a_rule(comparison):
    rows = comparison_rows(comparison)
    assert len({len(line) for line in text_table(rows).splitlines()}) == 1
    lines = text_table(rows, markdown=True).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[1].startswith("|---|---:|")
