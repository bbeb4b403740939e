"""Curvatures against laplace-torch, where it is installed (the `parity` extra)."""

from collections import UserDict

import pytest
import torch
from support.tiny import make_model, make_task
from torch import nn

from bayeslora.methods.laplace.ggn import DiagonalCurvature, KroneckerCurvature, accumulated
from bayeslora.methods.laplace.method import log_occam_factor
from bayeslora.params import lora_parameters, read
from bayeslora.prediction.jacobians import linear_sites
from bayeslora.prediction.passes import batched
from bayeslora.prediction.readouts import readout_for

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed (pip install 'bayeslora[parity]')")
curvature_of = pytest.importorskip("laplace.curvature")


class Logits(nn.Module):
    """The model as laplace-torch wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, data):
        return self.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits


@pytest.fixture
def problem(tokenizer):
    """A classifier with adapters on the values, whose tokens all reach the answer, and rows of one length."""
    model = make_model("bert", target_modules=["value"]).eval()
    task = make_task(classes=True)
    lengths = [len(tokenizer(e.text)["input_ids"]) for e in task.train]
    rows = task.train.take([i for i, n in enumerate(lengths) if n == max(set(lengths), key=lengths.count)])
    assert len(rows) >= 6
    readout = readout_for(model, rows, tokenizer)
    batches = batched(model, readout, readout.encode(rows)[0], 40)
    assert len(batches) > 1
    for p in model.parameters():
        p.requires_grad_(False)
    for p in lora_parameters(model).values():
        p.requires_grad_(True)
    return model, rows, batches


def theirs(problem, structure):
    model, rows, batches = problem
    data = [UserDict({**batch, "labels": rows.labels[order]}) for order, batch in batches]

    class Loader(list):  # laplace-torch asks a loader for the size of its data set
        dataset = range(len(rows))

    la = laplace.Laplace(
        Logits(model), "classification", subset_of_weights="all", hessian_structure=structure,
        backend=curvature_of.CurvlinopsGGN,
    )  # fmt: skip
    la.fit(Loader(data))
    return la


def test_the_diagonal_is_laplace_torchs(problem):
    model, rows, batches = problem
    ours = DiagonalCurvature(linear_sites(model))
    accumulated(model, ours, batches, rows.labels)
    la = theirs(problem, "diag")
    name_of = {p: n for n, p in lora_parameters(model).items()}
    order = [name_of[p] for p in la.model.parameters() if p in name_of]
    found = torch.cat([ours.sums[name].flatten() for name in order])
    torch.testing.assert_close(found, la.H.float(), rtol=1e-3, atol=1e-7)


def test_the_kronecker_factors_and_the_evidence_are_laplace_torchs(problem):
    model, rows, batches = problem
    ours = KroneckerCurvature(linear_sites(model), 40)
    log_likelihood = accumulated(model, ours, batches, rows.labels)
    la = theirs(problem, "kron")
    name_of = {p: n for n, p in lora_parameters(model).items()}
    order = [name_of[p] for p in la.model.parameters() if p in name_of]
    posterior = ours.posterior(read(model), 1.0, None)
    blocks = la.H_facs.kfacs if hasattr(la, "H_facs") and la.H_facs is not None else la.H.kfacs
    for name, factors in zip(order, blocks, strict=True):
        left = posterior.left_vectors[name] * posterior.left_values[name][:-1] @ posterior.left_vectors[name].T
        right = posterior.right_vectors[name] * posterior.right_values[name][:-1] @ posterior.right_vectors[name].T
        theirs_ = factors[0] if len(factors) == 1 else torch.kron(factors[0].contiguous(), factors[1].contiguous())
        torch.testing.assert_close(torch.kron(left, right), theirs_.float(), rtol=1e-3, atol=1e-6)
    for precision in (0.1, 1.0, 30.0):
        found = log_likelihood + log_occam_factor(ours.spectra(), read(model), precision)
        their = float(la.log_marginal_likelihood(prior_precision=torch.tensor(precision)))
        assert found == pytest.approx(their, rel=1e-4)
