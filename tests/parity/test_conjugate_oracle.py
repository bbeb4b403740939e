"""Simulation-based calibration of each family on regressions with LoRA layers, and the power of the test itself.

A suite run makes 4 tests for each of the nine cases, each at 1e-4 / 36: a false alarm has probability 1e-4 in all, and
the seeds are fixed. `benchmarks/soak/calibration.py` does it at any size.
"""

import pytest
import torch
from support.conjugate import CASES, MUTATIONS, QUANTITIES, p_value, ranks

LEVEL = 1e-4 / (len(CASES) * len(QUANTITIES))
DRAWS = 11
QUICK = ("low-rank", "kronecker-a")
BLIND = {"no correlation of parameters": {"diagonal", "isotropic", "tempered", "linearised"}}
"""What cannot show: independent parameters have no correlation to lose, and these logits a weak one."""


def smallest(numbers):
    return min(p_value(each, DRAWS) for each in numbers)


@pytest.mark.parametrize(
    ("case", "simulations"),
    [(case, 150) for case in QUICK] + [pytest.param(case, 400, marks=pytest.mark.slow) for case in CASES],
)
def test_the_truth_has_uniform_ranks_among_the_draws_and_wrong_draws_show(case, simulations):
    found = ranks(case, simulations, DRAWS, seed=1)
    assert smallest(found["none"]) > LEVEL
    for name in MUTATIONS.keys() - {"none"} if simulations > 150 else ["no mean shift"]:
        if case not in BLIND.get(name, ()):
            assert smallest(found[name]) < LEVEL, name


def test_the_test_of_uniformity_keeps_its_level_and_sees_each_moment():
    rng = torch.Generator().manual_seed(0)
    # of 1000 tests at 5 % between 30 and 72 reject, but with probability 4e-3; the seed is fixed
    rejected = sum(p_value(torch.randint(12, (300,), generator=rng), DRAWS) < 0.05 for _ in range(1000))
    assert 30 <= rejected <= 72
    for weights in ([2, 1, 1, 1], [2, 1, 1, 2], [1, 2, 2, 1], [1, 2, 1, 2]):
        share = torch.tensor(weights, dtype=torch.float64).repeat_interleave(3)
        assert p_value(torch.multinomial(share, 2000, replacement=True, generator=rng), DRAWS) < 1e-6
