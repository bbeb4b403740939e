"""What Laplace's search of the prior precision shares, what waits for a device, and the memory of its batches."""

from dataclasses import replace

import pytest
import torch
from support.linearised import moments_of
from support.tiny import make_model, make_task
from torch.utils._python_dispatch import TorchDispatchMode

from bayeslora.errors import InputError
from bayeslora.methods import Laplace
from bayeslora.methods.laplace.ggn import DiagonalCurvature, KroneckerCurvature, accumulated
from bayeslora.methods.laplace.method import CANDIDATES
from bayeslora.methods.laplace.sketch import Factor
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, KroneckerGaussian
from bayeslora.posteriors.transforms import pruned
from bayeslora.prediction import linearised, memory
from bayeslora.prediction.jacobians import differentiated, linear_sites
from bayeslora.prediction.linearised import GRADIENT_BYTES, gradient_budget
from bayeslora.prediction.passes import batched
from bayeslora.prediction.readouts import readout_for


def prepared(tokenizer, structure="kron"):
    """A model, its readout, some rows, their batches and the curvature on them; no factor is held exactly."""
    model = make_model(target_modules=["q_proj", "v_proj", "lm_head"]).eval()
    rows = make_task(readout="likelihood").train.take(range(9))
    readout = readout_for(model, rows, tokenizer)
    batches = batched(model, readout, readout.encode(rows)[0], 60)
    sites = linear_sites(model)
    curvature = KroneckerCurvature(sites, 3) if structure == "kron" else DiagonalCurvature(sites)
    with readout.attached(model):
        accumulated(model, curvature, batches, rows.labels)
    return model, readout, rows, batches, curvature


def by_each(model, posterior, batches, rows):
    """Covariances [N C C] of the logits by moving every Jacobian through the eigenvectors of one posterior."""
    sites = linear_sites(model)
    found = torch.zeros(len(rows), *[max(len(e.choices) for e in rows)] * 2)
    with differentiated(model, sites) as passed:
        for order, batch in batches:
            gradients = passed(batch).along()
            for site in sites:
                jacobian = gradients.jacobian(site)
                if isinstance(posterior, DiagonalGaussian):
                    moved = posterior.variance[site.name].view(jacobian.shape[2:]) * jacobian
                else:
                    strength = posterior.strength[site.name]
                    jacobian = jacobian * (strength.view(jacobian.shape[2:]) if strength.ndim else strength)
                    moved = posterior.multiply(site.name, jacobian)
                own = torch.einsum("cnoi,dnoi->ncd", moved, jacobian)
                found[order, : own.shape[1], : own.shape[2]] += own
    return found


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_posteriors_together_have_the_covariances_that_each_has_by_itself(structure, tokenizer):
    model, readout, rows, batches, curvature = prepared(tokenizer, structure)
    posteriors = [curvature.posterior(read(model), precision, None) for precision in (1e-2, 1.0, 30.0, 1e6)]
    posteriors += [pruned(posteriors[1], 0.3), pruned(posteriors[2], 0.3)]  # a strength for each entry
    if structure == "kron":
        other = KroneckerCurvature(curvature.sites, 2)  # other eigenvectors
        with readout.attached(model):
            accumulated(model, other, batches, rows.labels)
        posteriors.append(other.posterior(read(model), 3.0, None))
    with readout.attached(model):
        found = moments_of(model, posteriors, batches, len(rows))[1]
        for own, posterior in zip(found, posteriors, strict=True):
            wanted = by_each(model, posterior, batches, rows)
            torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def test_the_search_projects_a_jacobian_once_for_all_prior_precisions(tokenizer, monkeypatch):
    model, readout, rows, batches, curvature = prepared(tokenizer)
    posteriors = [curvature.posterior(read(model), precision, None) for precision in CANDIDATES]
    calls = []
    for name in ("projected", "multiply"):
        own = getattr(KroneckerGaussian, name)
        monkeypatch.setattr(KroneckerGaussian, name, lambda *a, _own=own, **k: calls.append(a[1]) or _own(*a, **k))
    with readout.attached(model):
        moments_of(model, posteriors, batches, len(rows))
    assert len(posteriors) == 41
    assert len(batches) > 1
    assert len(calls) == len(curvature.sites) * len(batches)


class Waits(TorchDispatchMode):
    """Counts the operations that a device has to finish its work for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        picks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        scalar = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += picks or scalar
        return func(*args, **(kwargs or {}))


def test_a_factor_does_not_wait_for_its_device():
    factor = Factor(50, 8, "x", torch.device("cpu"))
    with Waits() as waits:
        factor.add(torch.randn(20, 50))
        assert waits.count == 0
        float(torch.ones(2).sum())
        assert waits.count == 1


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_the_curvature_waits_as_often_for_many_layers_as_for_one(structure, tokenizer):
    model, readout, rows, batches, _ = prepared(tokenizer)
    counts = []
    for sites in (linear_sites(model)[:1], linear_sites(model)):
        curvature = KroneckerCurvature(sites, 3) if structure == "kron" else DiagonalCurvature(sites)
        with readout.attached(model), Waits() as waits:
            accumulated(model, curvature, batches, rows.labels)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_differentiated_batches_take_the_memory_of_their_device(monkeypatch):
    model = make_model("llama", torch.bfloat16)
    sites = linear_sites(model)
    outputs = sum({site.module: len(site.module.weight) for site in sites}.values())
    assert gradient_budget(model, sites, None, 3) == memory.CPU_BUDGET * 3  # larger batches gain nothing
    assert gradient_budget(model, sites, None, 10**6) == GRADIENT_BYTES // (4 * outputs)
    assert gradient_budget(model, sites, 90, 3) == 90
    monkeypatch.setattr(linearised, "GRADIENT_BYTES", 100)
    assert gradient_budget(model, sites, None, 3) == memory.CPU_BUDGET  # of a large model's
    for module in (memory, linearised):
        monkeypatch.setattr(module, "device_of", lambda _: torch.device("cuda"))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    one = (2 + 4) * 2 * (10 * 32 + 3 * 48) + 10 * 80  # bytes of a token
    for free, wanted in ((2 * 300 * one, 300), (0, 1), (10**12, memory.GPU_BUDGET)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
        assert gradient_budget(model, sites, None, 3) == wanted


def test_layers_that_are_not_called_are_refused_before_the_training(tokenizer):
    task = make_task(readout="likelihood")
    for targets in (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
    ):
        with pytest.raises(InputError, match="not a weight of a linear layer that is called"):
            Laplace().check(make_model(**targets), task)
    model, readout, rows, batches, curvature = prepared(tokenizer)
    curvature.sites = [replace(curvature.sites[0], module=torch.nn.Linear(2, 2))]
    with readout.attached(model), pytest.raises(InputError, match="took no part in a pass"):
        accumulated(model, curvature, batches, rows.labels)
