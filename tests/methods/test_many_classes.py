"""Many classes: sampled labels against the exact Gauss-Newton matrix, the rows that judge λ, and flat memory."""

import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.linearised import moments_of
from support.tiny import make_base, make_model, make_split
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from bayeslora.methods import Laplace
from bayeslora.methods.laplace import method
from bayeslora.methods.laplace.ggn import DiagonalCurvature, KroneckerCurvature, SampledRoot, accumulated, ggn_root
from bayeslora.methods.laplace.method import SAMPLES
from bayeslora.params import read
from bayeslora.posteriors import Draws, Linearised
from bayeslora.posteriors.linearised import logit_draws
from bayeslora.prediction import linearised, predict
from bayeslora.prediction.jacobians import Gradients, linear_sites
from bayeslora.prediction.passes import batched
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Example, Format, Split, Task

CLASSES, ROWS = 40, 10


def classified(name, rows, classes=CLASSES):
    """Rows of many classes."""
    names = tuple(f"class {c}" for c in range(classes))
    examples = [Example(f"bag holds {i % 7} red, {i // 7} blue", names, (7 * i) % classes) for i in range(rows)]
    return Split(name, tuple(examples), Format("{text}", "head", kind="class"), names)


def encoder(classes=CLASSES):
    """An encoder with a head for many classes, which is adapted too, and sure of some of them."""
    config = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = make_base("bert").config.to_dict() | {"num_labels": classes, "id2label": None, "label2id": None}
        model = get_peft_model(BertForSequenceClassification(BertConfig(**settings)), config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3)
                if "modules_to_save" in name:
                    p.normal_(std=1.0)
    return model


def exact_hessian(logits):
    p = logits.double().softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def scores(rows, sure):
    """Logits of rows, of which the first misses a class and the last is as sure as can be."""
    logits = sure * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(1))
    logits[0, -1] = -math.inf
    logits[-1, 0] = 2000.0
    return logits


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("sure", [1.0, 6.0])
def test_over_all_labels_sampled_columns_are_the_exact_hessian(sure, samples):
    logits, steps = scores(5, sure), 4000
    root = SampledRoot(len(logits), samples, seed=0)
    total = torch.zeros(len(logits), CLASSES, CLASSES, dtype=torch.float64)
    for step in range(steps):  # every place of the one uniform number, and so every label as often as it is drawn
        root.uniform = torch.full((len(logits),), (step + 0.5) / steps, dtype=torch.float64)
        columns = root(logits, range(len(logits))).double()
        total += columns @ columns.mT / steps
    wanted = exact_hessian(logits)
    # a label's share is met to one step of 4000, weighted by its squared length over its probability: the trace
    torch.testing.assert_close(total, wanted, rtol=0, atol=2 * CLASSES / steps)
    assert float((total - wanted).norm() / wanted.norm()) < 0.02


def test_each_sample_has_the_trace_of_the_whole_and_a_sure_row_none():
    logits = scores(30, 6.0)
    columns = SampledRoot(len(logits), 3, seed=2)(logits, range(len(logits)))
    assert columns.shape == (30, CLASSES, 3)
    traces = exact_hessian(logits).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(columns.square().sum((1, 2)).double(), traces, rtol=1e-5, atol=1e-12)
    assert not bool(columns[-1].any())
    assert not bool(columns[0, -1].any())


def test_the_labels_belong_to_the_seed_and_to_the_rows():
    logits = scores(12, 3.0)
    root = SampledRoot(12, 4, seed=5)
    whole = root(logits, range(12))
    picked = [7, 2, 11]
    assert torch.equal(SampledRoot(12, 4, seed=5)(logits[picked], picked), whole[picked])
    assert not torch.equal(SampledRoot(12, 4, seed=6)(logits, range(12)), whole)


@pytest.fixture(scope="module")
def problem(tokenizer):
    """An encoder of many classes, its readout, rows, and their batches."""
    model, split = encoder(), classified("train", ROWS)
    readout = readout_for(model, split, tokenizer)
    return model, readout, split, batched(model, readout, readout.encode(split)[0], 60)


def diagonal_of(problem, root):
    model, readout, split, batches = problem
    curvature = DiagonalCurvature(linear_sites(model))
    with readout.attached(model):
        accumulated(model, curvature, batches, split.labels, root)
    return torch.cat([h.flatten() for h in curvature.sums.values()]).double()


def test_the_sampled_curvature_is_unbiased_and_its_error_halves_with_four_times_the_labels(problem):
    wanted, seeds = diagonal_of(problem, ggn_root), range(24)
    errors = {}
    for samples in (1, 4):
        found = torch.stack([diagonal_of(problem, SampledRoot(ROWS, samples, seed)) for seed in seeds])
        errors[samples] = float((found - wanted).square().sum(1).mean().sqrt() / wanted.norm())
        # the mean of 24 is off by 1/√24 of one's error; 2/√24 is beyond four standard errors of that
        assert float((found.mean(0) - wanted).norm() / wanted.norm()) < 2 * errors[samples] / math.sqrt(len(seeds))
    assert errors[1] > 0.02  # there is something to fall
    assert errors[4] < 0.62 * errors[1]  # 1/√4, or less for draws that are systematic, and a quarter of noise


def test_the_factors_sample_the_gradients_and_take_the_inputs_whole(problem):
    model, readout, split, batches = problem
    found = {}
    for name, root in (("exact", ggn_root), ("sampled", SampledRoot(ROWS, 2, 0))):
        curvature = KroneckerCurvature(linear_sites(model), 40)
        with readout.attached(model):
            accumulated(model, curvature, batches, split.labels, root)
        found[name] = curvature.eigen()
    for name, values in found["exact"]["right_values"].items():
        torch.testing.assert_close(found["sampled"]["right_values"][name], values, rtol=1e-3, atol=1e-6)
    assert any(
        not torch.allclose(found["sampled"]["left_values"][name], values, rtol=1e-2)
        for name, values in found["exact"]["left_values"].items()
    )


class Backwards(TorchDispatchMode):
    """Counts backward passes by the derivatives of layer norms."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.native_layer_norm_backward.default
        return func(*args, **(kwargs or {}))


def passes_of(model, task, tokenizer, **settings):
    with Backwards() as counted:
        posterior = Laplace(prior=10.0, **settings).fit(model, task, tokenizer=tokenizer, progress=False)
    return counted.count, posterior


def test_many_classes_are_sampled_unless_told_otherwise_and_the_posterior_says_so(tokenizer, caplog):
    model, task = encoder(), Task("many", classified("train", CLASSES), None, None)
    with caplog.at_level(logging.INFO, logger="bayeslora"):
        counts = {s: passes_of(model, task, tokenizer, samples=s, predictive="draws") for s in (None, SAMPLES, 2, 0)}
    assert counts[None][0] == counts[SAMPLES][0]
    assert counts[0][0] * 2 == counts[2][0] * CLASSES  # a pass for each label
    assert [counts[s][1].origin.settings["samples"] for s in counts] == [SAMPLES, SAMPLES, 2, 0]
    assert f"curvature of {SAMPLES} sampled labels a row" in caplog.text
    assert "curvature of all labels" in caplog.text
    few = Task("few", make_split("train", 6, 2, classes=True), make_split("validation", 4, 3, classes=True), None)
    posterior = Laplace().fit(make_model("bert"), few, tokenizer=tokenizer, progress=False)
    assert posterior.origin.settings["samples"] == 0


@pytest.mark.slow
def test_the_prior_is_judged_on_as_many_rows_as_take_no_more_passes_than_the_curvature(tokenizer, monkeypatch):
    judged, own = [], method.linearised_nlls
    monkeypatch.setattr(method, "linearised_nlls", lambda *a: judged.append(a[1]) or own(*a))
    monkeypatch.setattr(method, "LEAST_JUDGES", 3)
    task = Task("many", classified("train", CLASSES), classified("validation", CLASSES + 2), None)
    for settings in ({}, {"samples": 1}, {"samples": 0}):
        Laplace(**settings).fit(encoder(), task, tokenizer=tokenizer, progress=False)
    assert [len(rows) for rows in judged] == [SAMPLES, 3, CLASSES + 2]
    assert all(row in task.validation.examples for row in judged[0])


def gaussian_of(problem, precision=30.0):
    model, readout, split, batches = problem
    curvature = KroneckerCurvature(linear_sites(model), 4)
    with readout.attached(model):
        accumulated(model, curvature, batches, split.labels, SampledRoot(ROWS, 4, 0))
    return curvature.posterior(read(model), precision, None)


@pytest.mark.parametrize("at_once", [7, 16])
def test_parts_of_the_classes_have_the_covariance_of_all(problem, at_once):
    model, readout, _, batches = problem
    posterior = gaussian_of(problem)
    with readout.attached(model):
        wanted = moments_of(model, [posterior], batches, ROWS)
        tokens = max(batch["input_ids"].numel() for _, batch in batches)
        found = moments_of(model, [posterior], batches, ROWS, budget=at_once * tokens)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


def held(classes, rows, monkeypatch, tokenizer, bytes_at_once=2**20):
    """The most bytes of gradients that a prediction of so many classes holds at once, and of covariances."""
    most = {"gradients": 0, "covariances": 0}
    own = Gradients.__init__

    def noted(self, *args, **kwargs):
        own(self, *args, **kwargs)
        size = sum(4 * value.numel() for value in self.outputs.values())
        most["gradients"] = max(most["gradients"], size)

    def drawn(logits, covariances, *args):
        most["covariances"] = max(most["covariances"], 4 * covariances.numel())
        return logit_draws(logits, covariances, *args)

    model, split = encoder(classes), classified("test", rows, classes)
    posterior = gaussian_of((model, *parts_of(model, classified("train", ROWS, classes), tokenizer)))
    monkeypatch.setattr(linearised, "CPU_BUDGET", 64)
    monkeypatch.setattr(linearised, "GRADIENT_BYTES", bytes_at_once)
    monkeypatch.setattr(Gradients, "__init__", noted)
    monkeypatch.setattr("bayeslora.posteriors.linearised.logit_draws", drawn)
    predict(model, Linearised(posterior), split, Draws(2), tokenizer=tokenizer)
    monkeypatch.undo()
    return most


def parts_of(model, split, tokenizer):
    readout = readout_for(model, split, tokenizer)
    return readout, split, batched(model, readout, readout.encode(split)[0], 60)


@pytest.mark.slow
def test_the_memory_of_a_linearised_prediction_of_150_classes_is_flat(monkeypatch, tokenizer):
    few, many = (held(classes, 6, monkeypatch, tokenizer) for classes in (20, 150))
    twice = held(150, 12, monkeypatch, tokenizer)
    assert few["gradients"] <= 2**20
    assert many["gradients"] <= 2**20
    assert twice == many  # whatever the number of rows
