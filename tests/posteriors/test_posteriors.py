"""The families of posteriors against their closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from support.families import (
    A0,
    A1,
    HEAD,
    SHAPES,
    SPREAD,
    dense_covariance,
    dense_kronecker,
    diagonal,
    dropout,
    kronecker,
    low_rank,
    mean,
    scaling,
    snapshots,
    variance,
    vector,
)
from support.tiny import same_params

from bayeslora.errors import InputError
from bayeslora.posteriors import (
    ColumnDropout,
    DiagonalGaussian,
    Linearised,
    LowRankGaussian,
    Mixture,
    Point,
    Scaled,
    TokenDropout,
)
from bayeslora.posteriors.noise import MERSENNE_TWISTER, PHILOX
from bayeslora.posteriors.provenance import Origin

DRAWS = 5_000
Z = 5.0
"""Standard errors allowed. With at most 300 comparisons in a test a false alarm has probability 300 · 6e-7 = 2e-4, and
the draws are the same in every run."""


def sample(posterior, count=DRAWS):
    """Draws as rows of a matrix."""
    return torch.stack([vector(posterior.draw(k)) for k in range(count)])


def assert_moments(draws, centre, covariance):
    """Compare sample moments with the true ones, in units of their standard errors under normality."""
    sd = covariance.diagonal().sqrt()
    noise = sd > 0
    assert torch.equal(draws[:, ~noise], centre[~noise].expand(len(draws), -1))
    draws, centre, covariance, sd = draws[:, noise], centre[noise], covariance[noise][:, noise], sd[noise]
    assert ((draws.mean(0) - centre).abs() <= Z * sd / math.sqrt(len(draws))).all()
    found = (draws - centre).T @ (draws - centre) / len(draws)
    error = ((sd[:, None] * sd).square() + covariance.square()).sqrt() / math.sqrt(len(draws))
    assert ((found - covariance).abs() <= Z * error).all()


@pytest.mark.slow
def test_a_low_rank_gaussian_has_the_covariance_of_its_formula():
    p = low_rank()
    assert_moments(sample(p), vector(p.mean), dense_covariance(p))


def test_a_diagonal_gaussian_has_its_mean_and_variance_and_no_covariance():
    p = diagonal()
    full = vector(p.variance | {HEAD: torch.zeros(SHAPES[HEAD])})
    assert_moments(sample(p), vector(p.mean), full.diag())


@pytest.mark.slow
def test_a_kronecker_gaussian_has_the_inverse_of_its_precision_as_covariance():
    p = kronecker()
    assert_moments(sample(p), vector(p.mean), dense_kronecker(p))


def test_a_kronecker_gaussians_products_and_variances_are_those_of_the_dense_matrix():
    p = kronecker()
    covariance, offset = dense_kronecker(p), 0
    for name in SHAPES:
        size = p.mean[name].numel()
        block = covariance[offset : offset + size, offset : offset + size]
        offset += size
        if name in p.strength:
            matrix = torch.randn(4, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            found = p.multiply(name, matrix.view(4, *p.mean[name].reshape(len(p.mean[name]), -1).shape))
            torch.testing.assert_close(found.reshape(4, size), matrix @ block, rtol=1e-5, atol=1e-6)
            expected = block.diagonal().float().view_as(p.mean[name])
            torch.testing.assert_close(p.variance(name), expected, rtol=1e-5, atol=1e-6)


def test_a_low_rank_draw_is_linear_in_its_noise_with_the_factor_of_the_covariance():
    # the draw is mean + [√(scale·Σ) | √(scale/(K−1)) Dᵀ] (ε₁, ε₂): with the diagonal off a draw reveals its ε₂, and the
    # same ε₂ then predicts the draws of other snapshots exactly
    p = replace(low_rank(), variance={name: torch.zeros(SHAPES[name]) for name in SPREAD}, scale=1.0)
    deviations = torch.stack(
        [torch.cat([(p.snapshots[n][k] - p.mean[n]).flatten() for n in SPREAD]) for k in range(p.rank)]
    ).double()
    for index in range(5):
        draw = p.draw(index)
        moved = torch.cat([(draw[n] - p.mean[n]).flatten() for n in SPREAD]).double()
        noise = torch.linalg.lstsq(deviations.T, moved).solution
        torch.testing.assert_close(deviations.T @ noise, moved, rtol=0, atol=1e-5)  # one ε₂ for all parameters
        other = replace(p, snapshots=snapshots(4) | {A0: snapshots()[A0] * 2}, scale=0.3).draw(index)
        expected = math.sqrt(0.3) * torch.einsum("k,kij->ij", noise, 2 * snapshots()[A0].double() - p.mean[A0].double())
        torch.testing.assert_close((other[A0] - p.mean[A0]).double(), expected, rtol=0, atol=1e-5)


def test_the_diagonal_part_of_a_low_rank_draw_is_a_diagonal_draw():
    still = {name: mean()[name].expand(4, *SHAPES[name]) for name in SPREAD}
    p = LowRankGaussian(mean(), variance(), still, scale=0.5)
    half = DiagonalGaussian(mean(), {name: v / 2 for name, v in variance().items()})
    for index in range(3):
        torch.testing.assert_close(vector(p.draw(index)), vector(half.draw(index)), rtol=0, atol=1e-6)


def test_column_dropout_keeps_the_mean_and_has_the_variance_of_inverted_dropout():
    p, rate = dropout(), 0.25
    draws = sample(p)
    noisy = vector({name: torch.full(SHAPES[name], float(name in p.strength)) for name in SHAPES}) > 0
    centre = vector(p.mean)
    assert torch.equal(draws[:, ~noisy], centre[~noisy].expand(DRAWS, -1))
    # a column is 0 with probability p, else a / (1 − p): mean a, variance a² p / (1 − p)
    sd = centre[noisy].abs() * math.sqrt(rate / (1 - rate))
    kept = (draws[:, noisy] != 0).double().mean(0)
    assert ((kept - (1 - rate)).abs() <= Z * math.sqrt(rate * (1 - rate) / DRAWS)).all()
    assert ((draws[:, noisy].mean(0) - centre[noisy]).abs() <= Z * sd / math.sqrt(DRAWS)).all()
    values = torch.where(draws[:, noisy] == 0, 0.0, centre[noisy] / (1 - rate))
    torch.testing.assert_close(draws[:, noisy], values, rtol=1e-6, atol=0)


def test_column_dropout_drops_whole_columns_of_each_matrix_by_itself():
    p = dropout()
    zeros = {name: torch.stack([p.draw(k)[name] == 0 for k in range(200)]) for name in p.strength}
    for found in zeros.values():
        assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(zeros[A0], zeros[A1])


GOLDEN = {
    PHILOX: {"a": [-1.07487106, 1.75687122, -1.74434829], "b": [1.60403442, -1.64519238, -2.27802300]},
    MERSENNE_TWISTER: {"a": [1.74893439, 1.86700821, -0.03356599], "b": [0.39449903, -0.77374285, -1.00828111]},
}


@pytest.mark.parametrize("source", GOLDEN)
def test_a_draw_is_a_fixed_function_of_seed_index_and_name(source):
    # golden numbers: a draw must not change from one release to the next, or saved predictions could not be repeated
    mean, ones = ({"a": torch.full((3,), value), "b": torch.full((3,), value)} for value in (0.0, 1.0))
    draw = DiagonalGaussian(mean, ones, Origin({}, "", {}, noise=source)).draw(1, seed=2)
    for name, wanted in GOLDEN[source].items():
        torch.testing.assert_close(draw[name], torch.tensor(wanted), rtol=0, atol=1e-6)


def test_draw_k_of_a_mixture_is_draw_k_div_m_of_member_k_mod_m():
    members = tuple(Point({"a": torch.full((2,), float(m))}) for m in range(3))
    mixture = Mixture(members)
    assert [int(mixture.draw(k)["a"][0]) for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    first = Mixture((diagonal(), low_rank()))
    assert same_params(first.draw(6, seed=4), diagonal().draw(3, seed=4))


def test_equal_members_of_a_mixture_have_independent_streams():
    p = DiagonalGaussian({"a": torch.zeros(50)}, {"a": torch.ones(50)})
    mixture = Mixture((p, p, p))
    draws = torch.stack([mixture.draw(k)["a"] for k in range(3 * 400)]).view(400, 3, 50)
    assert len({tuple(d.tolist()) for d in draws.flatten(0, 1)}) == 1200
    # correlations of 20 000 pairs have standard deviation 1/√20000; 5 of them by chance: 6e-7 each
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((draws[:, i] * draws[:, j]).mean().item()) <= Z / math.sqrt(400 * 50)


def test_a_mixtures_mean_is_its_first_members():
    members = (Point({"a": torch.ones(2)}), Point({"a": torch.zeros(2)}))
    assert same_params(Mixture(members).mean, members[0].mean)


def with_noise(value):
    return {"mean": mean(), "variance": variance() | {A0: torch.full(SHAPES[A0], value)}}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DiagonalGaussian(**with_noise(-1.0)), "negative"),
        (lambda: DiagonalGaussian(**with_noise(math.nan)), "not finite"),
        (lambda: DiagonalGaussian(mean(), {"other": torch.ones(1)}), "'other' has no mean"),
        (lambda: DiagonalGaussian(mean(), {A0: torch.ones(1)}), "no mean of the same shape"),
        (lambda: LowRankGaussian(**with_noise(math.inf), snapshots=snapshots()), "not finite"),
        (lambda: LowRankGaussian(mean(), variance(), snapshots(1)), "at least 2 snapshots, and there are 1"),
        (lambda: LowRankGaussian(mean(), variance(), {A0: snapshots()[A0]}), "different parameters"),
        (lambda: LowRankGaussian(mean(), variance(), snapshots() | {A0: torch.ones(4, 3, 2)}), "does not fit the mean"),
        (lambda: LowRankGaussian(mean(), variance(), snapshots() | {A0: snapshots(3)[A0]}), "equally many snapshots"),
        (lambda: ColumnDropout(mean(), 0.0, {A0: 1.0}), "rate in"),
        (lambda: ColumnDropout(mean(), 1.0, {A0: 1.0}), "rate in"),
        (lambda: kronecker(0.0), "prior precision must be finite and positive"),
        (lambda: kronecker(math.nan), "prior precision must be finite and positive"),
        (
            lambda: replace(kronecker(), left_values=kronecker().left_values | {A0: torch.ones(3)}),
            "do not fit its shape",
        ),
        (lambda: replace(kronecker(), right_values=kronecker().right_values | {A0: -torch.ones(2)}), "negative"),
        (lambda: Linearised(Point(mean())), "a Point cannot be linearised"),
        (lambda: TokenDropout(mean(), 0.0), "rate in"),
        (lambda: Scaled(Point(mean()), {}), "needs weight and bias"),
        (lambda: Scaled(Point(mean()), scaling(-1.0)), "and positive"),
        (lambda: Scaled(Point(mean()), scaling(math.nan)), "must be finite"),
        (lambda: Mixture(()), "at least one member"),
        (lambda: Mixture((Point(mean()), Point({A0: mean()[A0]}))), "member 1"),
    ],
)
def test_a_posterior_that_cannot_be_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()
