"""TFB against its definition."""

import math
from dataclasses import replace

import pytest
import torch
from support.tiny import make_model, make_task, same_params

from bayeslora.cli.settings import build_method
from bayeslora.errors import InputError
from bayeslora.methods import Tfb
from bayeslora.methods.base import TrainedAdapter
from bayeslora.methods.search import anchored, largest
from bayeslora.methods.tfb import answered, reparametrised
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, Point
from bayeslora.posteriors.provenance import origin_of
from bayeslora.prediction import predict

A, B = "x.lora_A.weight", "x.lora_B.weight"


def matrices(rows=7, rank=3, columns=5):
    rng = torch.Generator().manual_seed(0)
    return {A: torch.randn(rank, columns, generator=rng), B: torch.randn(rows, rank, generator=rng)}


@pytest.mark.parametrize("rows", [7, 2])  # more and fewer than the rank
def test_the_product_stays_and_the_rows_of_b_are_orthogonal(rows):
    before = matrices(rows)
    after, unit = reparametrised(before)
    torch.testing.assert_close(after[B] @ after[A], before[B] @ before[A], rtol=1e-5, atol=1e-6)
    gram = after[B].T @ after[B]
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-5)
    kept = min(rows, 3)
    torch.testing.assert_close(unit[A][:kept, 0] * gram.diagonal()[:kept].sqrt(), torch.ones(kept), rtol=1e-4, atol=0)
    assert not unit[A][kept:].any()


def test_the_update_has_isotropic_noise_in_the_column_space_of_b():
    before, sigma = matrices(), 0.7
    after, unit = reparametrised(before)
    variance = (sigma * unit[A]).square()
    u = torch.linalg.svd(before[B], full_matrices=False)[0]
    for column in range(5):  # columns of the update are independent: A's entries are
        covariance = after[B] @ variance[:, column].diag() @ after[B].T
        torch.testing.assert_close(covariance, sigma**2 * u @ u.T, rtol=0, atol=1e-5)


def test_directions_that_b_lacks_have_no_noise_and_a_zero_b_is_refused():
    before = matrices()
    before[B][:, 2] = before[B][:, 0] + before[B][:, 1]
    after, unit = reparametrised(before)
    torch.testing.assert_close(after[B] @ after[A], before[B] @ before[A], rtol=1e-5, atol=1e-5)
    assert (unit[A][:, 0] > 0).tolist() == [True, True, False]
    with pytest.raises(InputError, match="not trained"):
        reparametrised({A: before[A], B: torch.zeros_like(before[B])})


@pytest.mark.parametrize("edge", [1e-4, 0.0099, 0.01, 0.37, 900.0])
def test_the_search_ends_just_below_the_edge(edge):
    found = largest(lambda sigma: sigma <= edge, 5, unbounded=str, nowhere=str)
    assert found <= edge < found * 2 ** (1 / 2**5) * (1 + 1e-9)


def test_a_search_without_an_end_is_refused():
    words = {"unbounded": lambda: "it does not matter", "nowhere": lambda: "it bears nothing"}
    with pytest.raises(InputError, match="it does not matter"):
        largest(lambda sigma: True, 5, **words)
    with pytest.raises(InputError, match="it bears nothing"):
        largest(lambda sigma: False, 5, **words)


def unlabelled(task):
    """The task with no label in its training and validation rows."""
    bare = {
        part: replace(split, examples=tuple(replace(e, label=None) for e in split))
        for part, split in (("train", task.train), ("validation", task.validation))
    }
    return replace(task, **bare)


def sharper(model, factor):
    """A model whose logits are larger, so that its adapter's answers are surer than they are right."""
    model.get_base_model().lm_head.weight.data.mul_(factor)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("anchors", ["train", "validation"])
@pytest.mark.parametrize("factor", [1.0, 40.0])  # an unsure adapter, and one with a loss of next to nothing
def test_the_loss_against_the_adapters_own_answers_ends_within_the_change_that_is_borne(anchors, factor, tokenizer):
    model, task = sharper(make_model(), factor), unlabelled(make_task(readout="likelihood"))
    start = Point(read(model))
    method = Tfb(tolerance=0.01, anchors=anchors, floor=0.3)
    found = method.fit(model, task, start=start, tokenizer=tokenizer, seed=4)
    adapter = TrainedAdapter(model, task, start, origin_of(model), tokenizer, 4, 2048)
    rows = answered(adapter, getattr(task, anchors), start)
    assert rows.labels.tolist() == predict(model, start, rows, draws=1, tokenizer=tokenizer).answer.tolist()
    own = adapter.nll(start, rows, 1)
    assert (own < 0.3) == (factor > 1)
    borne = 0.01 * max(own, 0.3)
    assert abs(adapter.nll(found, rows, method.draws) - own) <= borne
    wider = DiagonalGaussian(found.mean, {n: v * 2 ** (2 / 2**method.steps) * 1.001 for n, v in found.variance.items()})
    assert abs(adapter.nll(wider, rows, method.draws) - own) > borne


def test_noise_that_helps_an_over_confident_adapter_has_an_end_also_against_true_labels(tokenizer):
    model, task = sharper(make_model(), 400.0), make_task(readout="likelihood")
    start = Point(read(model))
    adapter = TrainedAdapter(model, task, start, origin_of(model), tokenizer, 4, 2048)
    own = adapter.nll(start, task.train, 1)
    assert own > 3.0  # it is wrong, and sure of it
    found = Tfb(tolerance=0.1, labels="true", floor=0.0).fit(model, task, tokenizer=tokenizer, seed=4)
    assert 0 <= own - adapter.nll(found, task.train, 10) <= 0.1 * own  # the near side of the minimum
    wider = DiagonalGaussian(found.mean, {n: 1.1 * v for n, v in found.variance.items()})
    assert own - adapter.nll(wider, task.train, 10) > 0.1 * own
    method = build_method("tfb", ["labels=true"])  # the word, which JSON takes for a truth value
    assert method == Tfb(labels="true")
    with pytest.raises(InputError, match="has no label"):
        method.check(model, unlabelled(task))


def test_the_anchors_of_rows_sorted_by_class_have_every_class():
    rows = make_task(classes=True, rows=600).train
    rows = rows.take(sorted(range(len(rows)), key=lambda i: rows.examples[i].label))
    found = anchored(rows, 60, 3)
    assert len(found) == 60
    assert set(found.labels.tolist()) == {0, 1, 2}
    assert found.examples == anchored(rows, 60, 3).examples
    assert found.examples != anchored(rows, 60, 4).examples
    assert anchored(rows, 600, 3) is rows


def test_a_task_without_anchors_is_refused():
    model, task = make_model(), make_task(readout="likelihood")
    with pytest.raises(InputError, match="the task has none"):
        Tfb(anchors="validation").check(model, replace(task, validation=None))


def test_the_mean_answers_as_the_adapter_did_and_a_given_sigma_is_taken(tokenizer):
    model, task = make_model("gpt2"), make_task(readout="letters")
    before = read(model)
    found = Tfb(sigma=0.01).fit(model, task, tokenizer=tokenizer)
    assert same_params(read(model), before)
    plain, mean = (
        predict(model, p, task.test, draws=1, tokenizer=tokenizer) for p in (Point(before), Point(found.mean))
    )
    torch.testing.assert_close(mean.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
    unit = reparametrised(before)[1]
    assert all(torch.allclose(v.sqrt(), 0.01 * unit[n]) for n, v in found.variance.items())
    for settings in (
        {"tolerance": 0.0},
        {"anchors": "test"},
        {"draws": 0},
        {"sigma": math.nan},
        {"labels": "own"},
        {"floor": -1.0},
    ):
        with pytest.raises(InputError):
            Tfb(**settings)
