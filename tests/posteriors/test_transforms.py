"""What can be done to a posterior of any family, against values worked out by hand."""

import math

import pytest
import torch
from support.families import (
    A0,
    A1,
    B0,
    FAMILIES,
    HEAD,
    SHAPES,
    dense_covariance,
    dense_kronecker,
    diagonal,
    dropout,
    low_rank,
    mean,
    variance,
    vector,
)
from support.tiny import same_params

from bayeslora.errors import InputError
from bayeslora.posteriors import (
    ColumnDropout,
    DiagonalGaussian,
    KroneckerGaussian,
    LowRankGaussian,
    Mixture,
    Point,
)
from bayeslora.posteriors.transforms import pruned, restricted, tempered


@pytest.fixture(params=FAMILIES)
def posterior(request):
    return FAMILIES[request.param]()


@pytest.mark.parametrize(
    ("members", "asked", "given"),
    [
        (None, 7, 7),  # a Gaussian
        ("P", 7, 1),
        ("PPP", 1, 3),  # every member gets a draw
        ("PPP", 10, 3),  # and none is drawn twice
        ("GG", 5, 6),  # equally many for each
        ("GG", 6, 6),
        ("GGG", 1, 3),
        ("PG", 5, 6),
    ],
)
def test_draws_are_shared_equally_and_never_repeated(members, asked, given):
    made = {"P": Point(mean()), "G": diagonal()}
    p = diagonal() if members is None else made["P"] if members == "P" else Mixture(tuple(made[m] for m in members))
    assert p.count(asked) == given


def test_fewer_than_no_draws_are_refused():
    with pytest.raises(InputError, match="at least 0"):
        Point(mean()).count(-3)


def covariance_of(posterior):
    """Exact covariance of a family that has a simple one."""
    match posterior:
        case DiagonalGaussian():
            return vector(posterior.variance | {HEAD: torch.zeros(SHAPES[HEAD])}).diag()
        case LowRankGaussian():
            return dense_covariance(posterior)
        case KroneckerGaussian():
            return dense_kronecker(posterior)
        case ColumnDropout(mean=centre, rate=rate, strength=strength):
            size = {n: strength.get(n, 0.0) * centre[n] * math.sqrt(rate / (1 - rate)) for n in SHAPES}
            return vector(size).square().diag()  # its diagonal; a column's entries are wholly correlated
    raise AssertionError(posterior)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("family", ["diagonal", "low-rank", "dropout", "kronecker"])
def test_temperature_multiplies_the_covariance_and_keeps_the_mean(family, temperature):
    p = FAMILIES[family]()
    hot = tempered(p, temperature)
    assert type(hot) is type(p)
    assert same_params(hot.mean, p.mean)
    torch.testing.assert_close(covariance_of(hot), temperature * covariance_of(p), rtol=1e-5, atol=1e-7)
    # and the same noise: each draw moves √T as far from the mean
    moved = (vector(p.draw(3)) - vector(p.mean)) * math.sqrt(temperature)
    torch.testing.assert_close(vector(hot.draw(3)) - vector(p.mean), moved, rtol=1e-4, atol=1e-5)


def test_temperature_zero_is_the_mean_for_every_family(posterior):
    cold = tempered(posterior, 0.0)
    for k in range(4):
        member = posterior.members[k % 2] if isinstance(posterior, Mixture) else posterior
        torch.testing.assert_close(vector(cold.draw(k)), vector(member.mean), rtol=0, atol=0)


def test_a_mixture_is_tempered_member_by_member():
    hot = tempered(Mixture((diagonal(), low_rank())), 2.0)
    assert isinstance(hot, Mixture)
    for found, wanted in zip(hot.members, (tempered(diagonal(), 2.0), tempered(low_rank(), 2.0)), strict=True):
        assert same_params(found.draw(1), wanted.draw(1))


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_a_temperature_without_meaning_is_refused(temperature):
    with pytest.raises(InputError, match="temperature"):
        tempered(diagonal(), temperature)


@pytest.mark.parametrize(("layers", "noisy"), [(0, set()), (1, {A1}), (2, {A0, B0, A1}), (9, {A0, B0, A1})])
@pytest.mark.parametrize("family", ["diagonal", "low-rank"])
def test_noise_stays_in_the_last_layers(family, layers, noisy):
    p = FAMILIES[family]()
    kept = restricted(p, layers)
    draw, free = kept.draw(2), p.draw(2)
    for name in SHAPES:
        torch.testing.assert_close(draw[name], free[name] if name in noisy else p.mean[name], rtol=0, atol=1e-6)
        assert same_params(kept.mean, p.mean)


def test_parameters_outside_the_numbered_layers_keep_their_noise():
    p = DiagonalGaussian(mean(), variance() | {HEAD: torch.ones(SHAPES[HEAD])})
    assert not torch.equal(restricted(p, 0).draw(0)[HEAD], p.mean[HEAD])


def test_dropout_noise_stays_in_the_last_layers():
    p = dropout()
    draws = [restricted(p, 1).draw(k) for k in range(20)]
    assert all(torch.equal(d[A0], p.mean[A0]) for d in draws)
    assert all(same_params({A1: d[A1]}, {A1: p.draw(k)[A1]}) for k, d in enumerate(draws))


def test_noise_stays_where_a_predicate_says(posterior):
    kept = restricted(posterior, lambda name: "lora_A" in name)
    for k in range(4):
        draw, free = kept.draw(k), posterior.draw(k)
        torch.testing.assert_close(draw[A0], free[A0], rtol=0, atol=1e-6)
        torch.testing.assert_close(draw[B0], posterior.mean[B0], rtol=0, atol=0)


def test_the_marginal_deviation_is_the_root_of_the_covariances_diagonal():
    for p in (diagonal(), low_rank()):
        found = p.standard_deviation() | {HEAD: torch.zeros(SHAPES[HEAD])}
        torch.testing.assert_close(vector(found), covariance_of(p).diagonal().sqrt(), rtol=1e-5, atol=0)
    assert Point(mean()).standard_deviation() == {}


def test_pruning_removes_exactly_the_lowest_signal_to_noise_of_each_matrix():
    signal = {
        A0: torch.tensor([[1.0, -8.0, 3.0], [-4.0, 5.0, 6.0]]),
        B0: torch.tensor([[100.0, 200.0], [-300.0, 400.0]]),
    }
    noise = {A0: torch.tensor([[1.0, 16.0, 1.0], [1.0, 1.0, 1.0]]), B0: torch.tensor([[1.0, 1.0], [1.0, 1e4]])}
    p = DiagonalGaussian(signal, {n: s.square() for n, s in noise.items()})
    cut = pruned(p, 0.5)  # |m|/σ of A: 1 0.5 3 4 5 6; of B: 100 200 300 0.04
    assert torch.equal(cut.mean[A0], torch.tensor([[0.0, 0.0, 0.0], [-4.0, 5.0, 6.0]]))
    assert torch.equal(cut.mean[B0], torch.tensor([[0.0, 200.0], [-300.0, 0.0]]))
    for k in range(3):
        for name in signal:
            gone = cut.mean[name] == 0
            assert (cut.draw(k)[name][gone] == 0).all()
            assert torch.equal(cut.draw(k)[name][~gone], p.draw(k)[name][~gone])


@pytest.mark.parametrize(("fraction", "removed"), [(0.0, 0), (0.4, 2), (1.0, 6)])
@pytest.mark.parametrize("family", ["diagonal", "low-rank"])
def test_pruning_removes_the_share_asked_for_rounded_down(family, fraction, removed):
    p = FAMILIES[family]()
    cut = pruned(p, fraction)
    assert int((cut.mean[A0] == 0).sum()) == removed
    ratio = p.mean[A0].abs() / p.standard_deviation()[A0]
    assert set(ratio[cut.mean[A0] == 0].tolist()) == set(ratio.flatten().sort().values[:removed].tolist())
    gone = cut.mean[A0] == 0
    for k in range(3):
        assert (cut.draw(k)[A0][gone] == 0).all()
        torch.testing.assert_close(cut.draw(k)[A0][~gone], p.draw(k)[A0][~gone], rtol=0, atol=1e-6)
    assert torch.equal(cut.mean[HEAD], p.mean[HEAD])  # without noise


def test_a_parameter_without_noise_is_never_pruned():
    p = DiagonalGaussian({A0: torch.tensor([0.001, 5.0])}, {A0: torch.tensor([0.0, 1.0])})
    assert torch.equal(pruned(p, 1.0).mean[A0], torch.tensor([0.001, 0.0]))


def test_a_point_is_not_pruned_and_a_mixture_member_by_member():
    assert same_params(pruned(Point(mean()), 1.0).mean, mean())
    cut = pruned(Mixture((diagonal(), low_rank())), 0.4)
    assert isinstance(cut, Mixture)
    assert same_params(cut.members[1].mean, pruned(low_rank(), 0.4).mean)


def test_dropout_cannot_be_pruned():
    with pytest.raises(InputError, match="ColumnDropout"):
        pruned(dropout(), 0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_share_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(InputError, match="fraction"):
        pruned(diagonal(), fraction)
