"""Draws of every family against its dense covariance, for each sampling and after each transform.

The bound of an entry is five standard errors √((Σ_ii Σ_jj + Σ_ij²)/n) of n independent normal draws. A group of draws
that belong together counts as one, which can only make the bound wider, and a stream of Sobol's as so many independent
ones: scrambled points are never much worse. A false alarm has probability 6e-7 an entry, and the seeds are fixed.
"""

import math
from itertools import product

import pytest
import torch
from support.families import (
    A0,
    FAMILIES,
    HEAD,
    SHAPES,
    dense_covariance,
    dense_kronecker,
    diagonal,
    dropout,
    kronecker,
    low_rank,
    variance,
    vector,
)

from bayeslora.posteriors import Draws, LowRankGaussian, Mixture, Scaled
from bayeslora.posteriors.sampling import GROUPS
from bayeslora.posteriors.transforms import pruned, restricted, tempered

GROUPED = 500
"""Groups of draws that belong together."""
STREAM = 1024
"""Draws of one stream of Sobol's."""


def centre_of(p):
    """The mean of the draws: that of all members, where ``mean`` is the first one's."""
    if isinstance(p, Mixture):
        return torch.stack([centre_of(m) for m in p.members]).mean(0)
    return vector(p.mean)


def dense(p):
    """The covariance of a family's formula, over all parameters."""
    if hasattr(p, "posterior"):
        return dense(p.posterior)
    match type(p).__name__:
        case "Point":
            return torch.zeros(2 * [len(vector(p.mean))]).double()
        case "DiagonalGaussian":
            return vector({n: p.variance.get(n, torch.zeros(SHAPES[n])) for n in SHAPES}).diag()
        case "LowRankGaussian":
            return dense_covariance(p)
        case "KroneckerGaussian":
            return dense_kronecker(p)
        case "ColumnDropout":  # the entries of a column share one mask
            blocks = []
            for name, shape in SHAPES.items():
                noise = (p.strength.get(name, 0.0) * p.mean[name].double()).flatten()
                columns = torch.arange(noise.numel()) % shape[-1]
                together = columns[:, None] == columns
                blocks.append(p.rate / (1 - p.rate) * noise[:, None] * noise * together)
            return torch.block_diag(*blocks)
        case "Mixture":  # total covariance: that inside the members, and that of their means
            within = torch.stack([dense(m) for m in p.members]).mean(0)
            apart = torch.stack([centre_of(m) for m in p.members]) - centre_of(p)
            return within + apart.T @ apart / len(p.members)
    raise AssertionError(type(p).__name__)


def scatter(p, sampling, numbers, seed=5):
    """The covariance of some draws around the distribution's mean."""
    moved = torch.stack([vector(p.draw(k, seed, sampling)) for k in numbers]) - centre_of(p)
    return moved.T @ moved / len(moved)


def assert_covariance(found, wanted, count):
    deviation = wanted.diagonal().clamp_min(0).sqrt()
    error = ((deviation[:, None] * deviation).square() + wanted.square()).sqrt() / math.sqrt(count)
    assert bool(((found - wanted).abs() <= 5 * error + 1e-6).all()), ((found - wanted).abs() / (error + 1e-9)).max()


GAUSSIAN = ["diagonal", "low-rank", "kronecker"]
GROUPED_CASES = [
    ("dropout", "independent"),  # the others are in tests/posteriors
    *(pytest.param(f, s, marks=pytest.mark.slow) for f in (*GAUSSIAN, "dropout") for s in ("antithetic", "simplex")),
]


@pytest.mark.parametrize(("family", "sampling"), GROUPED_CASES)
def test_draws_have_the_covariance_of_the_formula(family, sampling):
    p = FAMILIES[family]()
    assert_covariance(scatter(p, sampling, range(GROUPED * GROUPS[sampling])), dense(p), GROUPED)


@pytest.mark.parametrize(
    ("family", "seed"),
    [("diagonal", 0), *(pytest.param(f, s, marks=pytest.mark.slow) for f in (*GAUSSIAN, "dropout") for s in (1, 2))],
)
def test_one_stream_of_sobols_has_the_covariance_of_the_formula(family, seed):
    p = FAMILIES[family]()
    assert_covariance(scatter(p, "sobol", range(STREAM), seed), dense(p), STREAM)


def test_mixtures_have_the_total_covariance_also_inside_one_another():
    for p in (FAMILIES["mixture"](), Mixture((Mixture((diagonal(), low_rank())), dropout()))):
        unit = p.unit()  # whole rounds of the members, so that the means' part is exact
        assert_covariance(scatter(p, "independent", range(GROUPED * unit)), dense(p), GROUPED)


def test_members_of_members_have_independent_streams():
    alike = diagonal()
    for p in (
        Mixture((Mixture((alike, alike)), alike)),
        Mixture((Mixture((alike, Mixture((alike, alike)))), Mixture((alike, alike)))),
        Mixture((Scaled(Mixture((alike, alike)), FAMILIES["scaled"]().scaling), alike)),
    ):
        drawn = [tuple(p.draw(k)[A0].flatten().tolist()) for k in range(p.count(Draws(60)))]
        assert len(set(drawn)) == len(drawn)


TRANSFORMS = {
    "tempered": lambda p: tempered(p, 1.7),
    "restricted": lambda p: restricted(p, 1),
    "pruned": lambda p: pruned(p, 0.4),
    "rescaled": lambda p: p.rescaled(lambda name, _: 0.5 if name == A0 else 2.0, lambda name, _: 3.0),
    "pruned and tempered": lambda p: tempered(pruned(p, 0.4), 0.3),
}
CHANGED = [
    (family, name)
    for family, name in product([*GAUSSIAN, "linearised", "scaled", "dropout"], TRANSFORMS)
    if not (family == "dropout" and name != "tempered" and name != "restricted")
]


@pytest.mark.parametrize(("family", "change"), CHANGED)
def test_transforms_change_the_draws_as_they_change_the_covariance(family, change):
    """The noise is linear, so draws that span it fix the covariance exactly."""
    p = FAMILIES[family]()
    changed = TRANSFORMS[change](p)
    numbers = range(3 * len(vector(p.mean)))
    before, after = (torch.stack([vector(q.draw(k)) for k in numbers]) - vector(q.mean) for q in (p, changed))
    linear = torch.linalg.lstsq(before, after, driver="gelsd").solution
    torch.testing.assert_close(before @ linear, after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.T @ dense(p) @ linear, dense(changed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*GAUSSIAN, "linearised", "scaled"])
@pytest.mark.parametrize("change", [None, *TRANSFORMS])
def test_the_marginal_deviation_is_the_root_of_the_dense_diagonal(family, change):
    p = FAMILIES[family]() if change is None else TRANSFORMS[change](FAMILIES[family]())
    found = p.standard_deviation()
    wanted = dense(p).diagonal().clamp_min(0).sqrt()
    full = vector({n: found.get(n, torch.zeros(shape)) for n, shape in SHAPES.items()})
    torch.testing.assert_close(full, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stiffness", [1e2, 1e6])
def test_a_factor_that_is_kept_whole_has_no_variance_of_directions_that_are_not_there(stiffness):
    p = kronecker(0.1)
    for side in (p.left_values, p.right_values):
        for name in side:
            side[name][:-1] *= math.sqrt(stiffness)
    found, wanted = vector_of(p.standard_deviation()), dense(p).diagonal().sqrt()
    noisy = wanted > 0
    torch.testing.assert_close(found[noisy], wanted[noisy], rtol=1e-3, atol=0)


def vector_of(deviations):
    return vector({n: deviations.get(n, torch.zeros(shape)) for n, shape in SHAPES.items()})


def test_nothing_is_correlated_across_parameters_but_a_low_rank_gaussian():
    """Its ε₂ is one for all parameters, as the formula says; the others' parameters are independent."""
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    same = torch.block_diag(*(torch.ones(size, size) for size in sizes)) > 0
    for family in ("diagonal", "kronecker", "dropout"):
        assert bool((dense(FAMILIES[family]())[~same] == 0).all())
    shared = low_rank()
    assert isinstance(shared, LowRankGaussian)
    assert bool((dense(shared)[~same] != 0).any())
    assert HEAD not in variance()
