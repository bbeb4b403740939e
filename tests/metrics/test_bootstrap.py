"""The bootstrap against known sampling distributions, and its invariances."""

import math

import pytest
import torch

from bayeslora.errors import InputError
from bayeslora.metrics.bootstrap import bootstrap, paired_bootstrap, resampled
from bayeslora.metrics.classification import accuracy, check_labels, kl_to_truth, nll
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.measures import measures


def logs(*probs):
    return torch.tensor(probs, dtype=torch.float64).log()


def floats(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_case(rows=200, choices=4, seed=0):
    """Calibrated predictions: the labels are drawn from the probabilities."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.randn(rows, choices, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    return log_p, torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(-1)


def mean(values):
    return values.mean(-1)


def test_the_bootstrap_interval_of_a_mean_covers_it_as_often_as_its_level_says():
    # 400 normal samples of 100, 80 % intervals. A percentile interval is the normal one but for the factor
    # sqrt(99/100) and a Monte Carlo error of the ends, so the coverage is between 0.78 and 0.81; counts outside
    # 270..360 then have a probability under 1e-5 (binomial tails).
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(400, 100, generator=generator, dtype=torch.float64)
    covered = 0
    for seed, sample in enumerate(samples):
        low, high = bootstrap(mean, [sample], resamples=150, level=0.8, seed=seed)
        covered += low <= 0 <= high
    assert 270 <= covered <= 360


def test_the_bootstrap_interval_of_an_accuracy_is_the_binomial_one():
    # Resampled accuracies of 400 rows with 300 right are Binomial(400, 3/4) / 400: the 2.5 % and 97.5 % quantiles are
    # 0.7075 and 0.7925. With 4000 resamples an end errs by more than two steps of 1/400 with probability under 1e-6.
    log_p = logs([0.9, 0.1]).expand(400, 2)
    labels = (torch.arange(400) < 100).long()
    low, high = bootstrap(accuracy, [log_p, labels], resamples=4000)
    assert abs(low - 0.7075) <= 2 / 400 + 1e-12
    assert abs(high - 0.7925) <= 2 / 400 + 1e-12


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    log_p, labels = random_case()
    first = bootstrap(nll, [log_p, labels], resamples=50, seed=1)
    assert bootstrap(nll, [log_p, labels], resamples=50, seed=1) == first
    assert bootstrap(nll, [log_p, labels], resamples=50, seed=2) != first


def test_the_bootstrap_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    bootstrap(mean, [floats(1, 2, 3)], resamples=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_are_resampled_jointly():
    values = torch.arange(50)
    assert bootstrap(lambda a, b: (a - b).abs().amax(-1), [values, values], resamples=20) == (0, 0)


def test_an_infinite_score_gives_an_infinite_end_and_no_nan():
    log_p, labels = logs([1.0, 0.0], [0.9, 0.1], [0.4, 0.6], [0.7, 0.3]), torch.tensor([1, 0, 1, 1])
    low, high = bootstrap(nll, [log_p, labels], resamples=200)
    assert math.isfinite(low)
    assert high == math.inf


def test_the_paired_interval_of_a_predictor_with_itself_is_zero():
    arrays = random_case()
    assert paired_bootstrap(nll, arrays, arrays, resamples=20) == (0, 0)


def test_the_paired_interval_of_a_constant_difference_is_that_difference():
    values = torch.arange(8, dtype=torch.float64)
    assert paired_bootstrap(mean, [values + 2], [values], resamples=20) == (2, 2)


def test_swapping_the_predictors_mirrors_the_paired_interval():
    first, second = random_case(), (random_case(seed=1)[0], random_case()[1])
    low, high = map(float, paired_bootstrap(nll, first, second, resamples=99))
    assert paired_bootstrap(nll, second, first, resamples=99) == pytest.approx((-high, -low), abs=1e-12)


def test_two_samples_are_resampled_each_on_its_own():
    low, high = bootstrap(lambda a, b: a.sum(-1) + 100 * b.sum(-1), [torch.ones(3)], [torch.ones(5)], resamples=9)
    assert (low, high) == (503, 503)
    # Of one sample against itself the difference of means would be 0 if both were drawn jointly.
    sample = torch.arange(30, dtype=torch.float64)
    low, high = bootstrap(lambda a, b: mean(a) - mean(b), [sample], [sample], resamples=100)
    assert low < 0 < high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(mean), "at least one"),
        (lambda: bootstrap(mean, [torch.zeros(0)]), "at least one"),
        (lambda: bootstrap(lambda a, b: a, [torch.zeros(2), torch.zeros(3)]), "same number of examples"),
        (lambda: bootstrap(mean, [torch.zeros(2)], resamples=0), "at least one resample"),
        (lambda: bootstrap(mean, [torch.zeros(2)], level=1.0), "level"),
        (lambda: bootstrap(auroc, [torch.zeros(2)], [torch.zeros(0)]), "at least one"),
        (lambda: paired_bootstrap(mean, [torch.zeros(2)], [torch.zeros(3)]), "same number of examples"),
    ],
)
def test_a_bootstrap_of_nothing_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


LABELLED = [name for name, measure in measures().items() if measure.needs == "labels"]
DETECTION = [name for name, measure in measures().items() if measure.needs == "ood"]


@pytest.mark.parametrize("name", LABELLED)
def test_a_measure_of_many_resamples_at_once_is_that_of_each_alone(name):
    score = measures()[name].score
    log_p, labels = random_case(rows=60, choices=3)
    log_p[::7] = log_p[0]  # equal confidences
    drawn = torch.randint(60, (40, 60), generator=torch.Generator().manual_seed(2))
    one_by_one = torch.stack([score(log_p[rows], labels[rows]) for rows in drawn])
    torch.testing.assert_close(score(log_p[drawn], labels[drawn]), one_by_one, rtol=1e-9, atol=0)
    torch.testing.assert_close(score(log_p[drawn][None], labels[drawn][None])[0], one_by_one, rtol=1e-9, atol=0)
    torch.testing.assert_close(resampled(score, (log_p, labels), resamples=40, seed=2), one_by_one, rtol=1e-9, atol=0)


def test_the_divergence_of_many_resamples_at_once_is_that_of_each_alone():
    log_p, truth = (random_case(rows=30, seed=seed)[0] for seed in (0, 1))
    drawn = torch.randint(30, (9, 30), generator=torch.Generator().manual_seed(2))
    one_by_one = torch.stack([kl_to_truth(log_p[rows], truth[rows].exp()) for rows in drawn])
    torch.testing.assert_close(kl_to_truth(log_p[drawn], truth[drawn].exp()), one_by_one)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_of_many_resamples_at_once_is_that_of_each_alone(name):
    score = measures()[name].score
    known, unknown = (
        torch.randn(30, n, generator=torch.Generator().manual_seed(n)).round(decimals=1) for n in (40, 70)
    )
    one_by_one = torch.stack([score(*pair) for pair in zip(known, unknown, strict=True)])
    torch.testing.assert_close(score(known, unknown), one_by_one)


def test_a_row_that_cannot_be_scored_is_named_in_a_batch_too():
    log_p, labels = random_case(rows=6)
    labels[4] = -1
    with pytest.raises(InputError, match="row 4 has no known answer"):
        nll(log_p.expand(3, -1, -1), labels.expand(3, -1))
    with pytest.raises(InputError, match="log_p has shape"):
        check_labels(log_p.expand(3, -1, -1), labels)
    with pytest.raises(InputError, match="negative_scores has shape"):
        auroc(torch.zeros(2, 5), torch.zeros(5))
