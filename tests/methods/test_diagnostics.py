"""The figures of the log: what they mean, and that they cost neither copies of all parameters nor waiting."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bayeslora.methods import trainer_log as module
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.sampler import diagnostics
from bayeslora.methods.trainer_log import spread

SHAPES = ((8, 128), (64, 8), (8, 96), (5,))


def trained(steps=3):
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]
    optimizer = IvonOptimizer(params, 0.1, ess=50, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.1, clip_radius=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.sampled():
            sum((k + 1) * p.pow(4).mean() for k, p in enumerate(params)).backward()
        optimizer.step()
    return optimizer


def flat(optimizer):
    """h, σ and the update of all coordinates, as vectors."""
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in group["params"]]
    hess = torch.cat([s["hess"].flatten() for s in states])
    momentum = torch.cat([s["avg_grad"].flatten() for s in states]) / (1 - 0.9 ** states[0]["step"])
    mean = torch.cat([p.detach().flatten() for p in group["params"]])
    return {"hess": hess, "sigma": (50 * (hess + 0.1)).rsqrt(), "update": (momentum + 0.1 * mean) / (hess + 0.1)}


def test_the_figures_are_shares_and_averages_over_all_coordinates():
    optimizer = trained()
    all_of, found = flat(optimizer), diagnostics(optimizer)
    wanted = {
        "hess_moved": float((((all_of["hess"] + 0.1) / (0.5 * 0.9**3 + 0.1) - 1).abs() > 0.1).float().mean()),
        "clipped": float((all_of["update"].abs() >= 0.2).float().mean()),
        "ess": 50.0,
        "sigma": float(all_of["sigma"].median()),
        "sigma_mean": float(all_of["sigma"].mean()),
    }
    assert 0 < wanted["hess_moved"] < 1
    assert 0 < wanted["clipped"] < 1
    assert found == pytest.approx(wanted, rel=1e-5)
    assert diagnostics(trained(0)) == {}


class Seen(TorchDispatchMode):
    """The largest tensor that is made, and how often a number is asked for."""

    largest = asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        if isinstance(found, Tensor):
            self.largest = max(self.largest, found.numel())
        return found


def test_no_tensor_is_larger_than_a_parameter_and_one_look_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 300)
    optimizer = trained()
    with Seen() as seen:
        diagnostics(optimizer)
    assert seen.largest <= max(p.numel() for p in optimizer.param_groups[0]["params"])
    assert seen.asked <= 1


@pytest.mark.slow
def test_the_median_of_many_coordinates_is_that_of_a_sample_that_meets_every_row_and_column(monkeypatch):
    columns = torch.arange(1.0, 9.0).expand(4096, 8)
    rows = torch.arange(1.0, 4097.0)[:, None].expand(4096, 8) / 512
    exact = [float(torch.cat([columns.flatten(), rows.flatten()]).median()), float(columns.mean())]
    monkeypatch.setattr(module, "SAMPLE", 2000)
    found = spread([columns, rows])
    assert found["sigma"] == pytest.approx(exact[0], abs=0.1)
    assert found == spread([columns, rows])  # nothing random in it
    assert spread([columns])["sigma_mean"] == pytest.approx(exact[1])  # the mean is of all
    assert spread([torch.full((10,), float(k)) for k in range(3000)])["sigma"] == 1499
    assert spread([]) == {}
