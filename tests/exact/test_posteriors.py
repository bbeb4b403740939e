"""The families against their closed forms, and what can be done to any of them against values worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import same_params
from torch import Tensor

from bayeslora.errors import InputError
from bayeslora.operations import draw_count, pruned, restricted, standard_deviation, tempered
from bayeslora.params import Params
from bayeslora.posteriors import ColumnDropout, DiagonalGaussian, LowRankGaussian, Mixture, Point, Posterior

A0, B0, A1, HEAD = (
    "base_model.model.layers.0.q.lora_A.weight",
    "base_model.model.layers.0.q.lora_B.weight",
    "base_model.model.layers.1.q.lora_A.weight",
    "base_model.model.score.weight",
)
SHAPES = {A0: (2, 3), B0: (2, 2), A1: (2, 3), HEAD: (3,)}
SPREAD = (A0, B0, A1)  # the head has no noise
DRAWS = 5_000
Z = 5.0
"""Standard errors allowed. With at most 300 comparisons in a test a false alarm has probability 300 · 6e-7 = 2e-4, and
the draws are the same in every run."""


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean() -> Params:
    return {name: normal(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}


def variance() -> Params:
    return {name: 0.1 + normal(SHAPES[name], 10 + i).square() for i, name in enumerate(SPREAD)}


def snapshots(count: int = 4) -> Params:
    return {name: mean()[name] + normal((count, *SHAPES[name]), 20 + i) for i, name in enumerate(SPREAD)}


def diagonal() -> DiagonalGaussian:
    return DiagonalGaussian(mean(), variance())


def low_rank(scale: float = 0.5) -> LowRankGaussian:
    return LowRankGaussian(mean(), variance(), snapshots(), scale)


def dropout() -> ColumnDropout:
    return ColumnDropout(mean(), 0.25, {A0: 1.0, A1: 1.0})


FAMILIES: dict[str, Callable[[], Posterior]] = {
    "point": lambda: Point(mean()),
    "diagonal": diagonal,
    "low-rank": low_rank,
    "dropout": dropout,
    "mixture": lambda: Mixture((diagonal(), low_rank())),
}


@pytest.fixture(params=FAMILIES)
def posterior(request: pytest.FixtureRequest) -> Posterior:
    return FAMILIES[request.param]()


def vector(params: Params) -> Tensor:
    return torch.cat([params[name].flatten() for name in SHAPES]).double()


def sample(posterior: Posterior, count: int = DRAWS) -> Tensor:
    """Draws as rows of a matrix."""
    return torch.stack([vector(posterior.draw(k)) for k in range(count)])


def dense_covariance(p: LowRankGaussian) -> Tensor:
    """scale · (diag + DᵀD / (K − 1)), the head's rows zero."""
    full = p.variance | {HEAD: torch.zeros(SHAPES[HEAD])}
    raw = p.snapshots | {HEAD: p.mean[HEAD].expand(p.rank, -1)}
    deviations = torch.stack([vector({n: raw[n][k] - p.mean[n] for n in SHAPES}) for k in range(p.rank)])
    return p.scale * (vector(full).diag() + deviations.T @ deviations / (p.rank - 1))


def assert_moments(draws: Tensor, centre: Tensor, covariance: Tensor) -> None:
    """Compare sample moments with the true ones, in units of their standard errors under normality."""
    sd = covariance.diagonal().sqrt()
    noise = sd > 0
    assert torch.equal(draws[:, ~noise], centre[~noise].expand(len(draws), -1))
    draws, centre, covariance, sd = draws[:, noise], centre[noise], covariance[noise][:, noise], sd[noise]
    assert ((draws.mean(0) - centre).abs() <= Z * sd / math.sqrt(len(draws))).all()
    found = (draws - centre).T @ (draws - centre) / len(draws)
    error = ((sd[:, None] * sd).square() + covariance.square()).sqrt() / math.sqrt(len(draws))
    assert ((found - covariance).abs() <= Z * error).all()


def test_a_low_rank_gaussian_has_the_covariance_of_its_formula() -> None:
    p = low_rank()
    assert_moments(sample(p), vector(p.mean), dense_covariance(p))


def test_a_diagonal_gaussian_has_its_mean_and_variance_and_no_covariance() -> None:
    p = diagonal()
    full = vector(p.variance | {HEAD: torch.zeros(SHAPES[HEAD])})
    assert_moments(sample(p), vector(p.mean), full.diag())


def test_a_low_rank_draw_is_linear_in_its_noise_with_the_factor_of_the_covariance() -> None:
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


def test_the_diagonal_part_of_a_low_rank_draw_is_a_diagonal_draw() -> None:
    still = {name: mean()[name].expand(4, *SHAPES[name]) for name in SPREAD}
    p = LowRankGaussian(mean(), variance(), still, scale=0.5)
    half = DiagonalGaussian(mean(), {name: v / 2 for name, v in variance().items()})
    for index in range(3):
        torch.testing.assert_close(vector(p.draw(index)), vector(half.draw(index)), rtol=0, atol=1e-6)


def test_column_dropout_keeps_the_mean_and_has_the_variance_of_inverted_dropout() -> None:
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


def test_column_dropout_drops_whole_columns_of_each_matrix_by_itself() -> None:
    p = dropout()
    zeros = {name: torch.stack([p.draw(k)[name] == 0 for k in range(200)]) for name in p.strength}
    for found in zeros.values():
        assert torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(zeros[A0], zeros[A1])


GOLDEN = {"a": [1.74893439, 1.86700821, -0.03356599], "b": [0.39449903, -0.77374285, -1.00828111]}


def test_a_draw_is_a_fixed_function_of_seed_index_and_name() -> None:
    # golden numbers: a draw must not change from one release to the next, or saved predictions could not be repeated
    p = DiagonalGaussian({"a": torch.zeros(3), "b": torch.zeros(3)}, {"a": torch.ones(3), "b": torch.ones(3)})
    draw = p.draw(1, seed=2)
    torch.testing.assert_close(draw["a"], torch.tensor(GOLDEN["a"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(draw["b"], torch.tensor(GOLDEN["b"]), rtol=0, atol=1e-6)


def test_draw_k_of_a_mixture_is_draw_k_div_m_of_member_k_mod_m() -> None:
    members = tuple(Point({"a": torch.full((2,), float(m))}) for m in range(3))
    mixture = Mixture(members)
    assert [int(mixture.draw(k)["a"][0]) for k in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    first = Mixture((diagonal(), low_rank()))
    assert same_params(first.draw(6, seed=4), diagonal().draw(3, seed=4))


def test_equal_members_of_a_mixture_have_independent_streams() -> None:
    p = DiagonalGaussian({"a": torch.zeros(50)}, {"a": torch.ones(50)})
    mixture = Mixture((p, p, p))
    draws = torch.stack([mixture.draw(k)["a"] for k in range(3 * 400)]).view(400, 3, 50)
    assert len({tuple(d.tolist()) for d in draws.flatten(0, 1)}) == 1200
    # correlations of 20 000 pairs have standard deviation 1/√20000; 5 of them by chance: 6e-7 each
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs((draws[:, i] * draws[:, j]).mean().item()) <= Z / math.sqrt(400 * 50)


def test_a_mixtures_mean_is_its_first_members() -> None:
    members = (Point({"a": torch.ones(2)}), Point({"a": torch.zeros(2)}))
    assert same_params(Mixture(members).mean, members[0].mean)


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
def test_draws_are_shared_equally_and_never_repeated(members: str | None, asked: int, given: int) -> None:
    made = {"P": Point(mean()), "G": diagonal()}
    p: Posterior = (
        diagonal() if members is None else made["P"] if members == "P" else Mixture(tuple(made[m] for m in members))
    )
    assert draw_count(p, asked) == given


@pytest.mark.parametrize("draws", [0, -3])
def test_no_draws_is_refused(draws: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        draw_count(Point(mean()), draws)


def covariance_of(posterior: Posterior) -> Tensor:
    """Exact covariance of a family that has a simple one."""
    match posterior:
        case DiagonalGaussian():
            return vector(posterior.variance | {HEAD: torch.zeros(SHAPES[HEAD])}).diag()
        case LowRankGaussian():
            return dense_covariance(posterior)
        case ColumnDropout(mean=centre, rate=rate, strength=strength):
            size = {n: strength.get(n, 0.0) * centre[n] * math.sqrt(rate / (1 - rate)) for n in SHAPES}
            return vector(size).square().diag()  # its diagonal; a column's entries are wholly correlated
    raise AssertionError(posterior)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("family", ["diagonal", "low-rank", "dropout"])
def test_temperature_multiplies_the_covariance_and_keeps_the_mean(family: str, temperature: float) -> None:
    p = FAMILIES[family]()
    hot = tempered(p, temperature)
    assert type(hot) is type(p)
    assert same_params(hot.mean, p.mean)
    torch.testing.assert_close(covariance_of(hot), temperature * covariance_of(p), rtol=1e-5, atol=1e-7)
    # and the same noise: each draw moves √T as far from the mean
    moved = (vector(p.draw(3)) - vector(p.mean)) * math.sqrt(temperature)
    torch.testing.assert_close(vector(hot.draw(3)) - vector(p.mean), moved, rtol=1e-4, atol=1e-5)


def test_temperature_zero_is_the_mean_for_every_family(posterior: Posterior) -> None:
    cold = tempered(posterior, 0.0)
    for k in range(4):
        member = posterior.members[k % 2] if isinstance(posterior, Mixture) else posterior
        torch.testing.assert_close(vector(cold.draw(k)), vector(member.mean), rtol=0, atol=0)


def test_a_mixture_is_tempered_member_by_member() -> None:
    hot = tempered(Mixture((diagonal(), low_rank())), 2.0)
    assert isinstance(hot, Mixture)
    for found, wanted in zip(hot.members, (tempered(diagonal(), 2.0), tempered(low_rank(), 2.0)), strict=True):
        assert same_params(found.draw(1), wanted.draw(1))


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan])
def test_a_temperature_without_meaning_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        tempered(diagonal(), temperature)


@pytest.mark.parametrize(("layers", "noisy"), [(0, set()), (1, {A1}), (2, {A0, B0, A1}), (9, {A0, B0, A1})])
@pytest.mark.parametrize("family", ["diagonal", "low-rank"])
def test_noise_stays_in_the_last_layers(family: str, layers: int, noisy: set[str]) -> None:
    p = FAMILIES[family]()
    kept = restricted(p, layers)
    draw, free = kept.draw(2), p.draw(2)
    for name in SHAPES:
        torch.testing.assert_close(draw[name], free[name] if name in noisy else p.mean[name], rtol=0, atol=1e-6)
        assert same_params(kept.mean, p.mean)


def test_parameters_outside_the_numbered_layers_keep_their_noise() -> None:
    p = DiagonalGaussian(mean(), variance() | {HEAD: torch.ones(SHAPES[HEAD])})
    assert not torch.equal(restricted(p, 0).draw(0)[HEAD], p.mean[HEAD])


def test_dropout_noise_stays_in_the_last_layers() -> None:
    p = dropout()
    draws = [restricted(p, 1).draw(k) for k in range(20)]
    assert all(torch.equal(d[A0], p.mean[A0]) for d in draws)
    assert all(same_params({A1: d[A1]}, {A1: p.draw(k)[A1]}) for k, d in enumerate(draws))


def test_noise_stays_where_a_predicate_says(posterior: Posterior) -> None:
    kept = restricted(posterior, lambda name: "lora_A" in name)
    for k in range(4):
        draw, free = kept.draw(k), posterior.draw(k)
        torch.testing.assert_close(draw[A0], free[A0], rtol=0, atol=1e-6)
        torch.testing.assert_close(draw[B0], posterior.mean[B0], rtol=0, atol=0)


def test_the_marginal_deviation_is_the_root_of_the_covariances_diagonal() -> None:
    for p in (diagonal(), low_rank()):
        found = standard_deviation(p) | {HEAD: torch.zeros(SHAPES[HEAD])}
        torch.testing.assert_close(vector(found), covariance_of(p).diagonal().sqrt(), rtol=1e-5, atol=0)
    assert standard_deviation(Point(mean())) == {}


def test_pruning_removes_exactly_the_lowest_signal_to_noise_of_each_matrix() -> None:
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
def test_pruning_removes_the_share_asked_for_rounded_down(family: str, fraction: float, removed: int) -> None:
    p = FAMILIES[family]()
    cut = pruned(p, fraction)
    assert int((cut.mean[A0] == 0).sum()) == removed
    ratio = p.mean[A0].abs() / standard_deviation(p)[A0]
    assert set(ratio[cut.mean[A0] == 0].tolist()) == set(ratio.flatten().sort().values[:removed].tolist())
    gone = cut.mean[A0] == 0
    for k in range(3):
        assert (cut.draw(k)[A0][gone] == 0).all()
        torch.testing.assert_close(cut.draw(k)[A0][~gone], p.draw(k)[A0][~gone], rtol=0, atol=1e-6)
    assert torch.equal(cut.mean[HEAD], p.mean[HEAD])  # without noise


def test_a_parameter_without_noise_is_never_pruned() -> None:
    p = DiagonalGaussian({A0: torch.tensor([0.001, 5.0])}, {A0: torch.tensor([0.0, 1.0])})
    assert torch.equal(pruned(p, 1.0).mean[A0], torch.tensor([0.001, 0.0]))


def test_a_point_is_not_pruned_and_a_mixture_member_by_member() -> None:
    assert same_params(pruned(Point(mean()), 1.0).mean, mean())
    cut = pruned(Mixture((diagonal(), low_rank())), 0.4)
    assert isinstance(cut, Mixture)
    assert same_params(cut.members[1].mean, pruned(low_rank(), 0.4).mean)


def test_dropout_cannot_be_pruned() -> None:
    with pytest.raises(InputError, match="ColumnDropout"):
        pruned(dropout(), 0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_share_outside_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        pruned(diagonal(), fraction)


def with_noise(value: float) -> dict[str, Any]:
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
        (lambda: Mixture(()), "at least one member"),
        (lambda: Mixture((Point(mean()), Point({A0: mean()[A0]}))), "member 1"),
    ],
)
def test_a_posterior_that_cannot_be_is_refused(make: Callable[[], Posterior], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()
