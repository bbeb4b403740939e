"""BLoB's settings: the start and the prior in units of each matrix, the temperature of the divergence, and presets."""

import functools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import arguments, make_model, make_task, make_tokenizer, same_params
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

from bayeslora import fit
from bayeslora.errors import InputError
from bayeslora.methods import Blob, Map
from bayeslora.methods.blob.layer import BlobLinear
from bayeslora.methods.blob.terms import PRESETS, Scale, kl_divergence, kl_weight, paper_step
from bayeslora.metrics.classification import accuracy, ece, nll


class Reader(nn.Module):
    """One linear layer, to adapt."""

    def __init__(self, width):
        super().__init__()
        self.read = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.read.weight)

    def forward(self, x):
        found = self.read(x)[..., 0]
        return found


def adapted(width):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(Reader(width), LoraConfig(r=8, lora_alpha=16, target_modules=["read"]))


class Run:
    """A training loop that calls BLoB as a Trainer does."""

    def __init__(self, method, model, steps, rows, rate=2e-3):
        self.model, self.args = model, TrainingArguments("unused", per_device_train_batch_size=8, use_cpu=True)
        self.state = SimpleNamespace(global_step=0, max_steps=steps)
        self.callback = method.trainer_kwargs(model, rows)["callbacks"][2]
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / steps)
        self.tell("on_train_begin")
        model.train()

    def tell(self, event):
        getattr(self.callback, event)(self.args, self.state, None, model=self.model, optimizer=self.optimizer)

    @property
    def layer(self):
        (found,) = self.callback.layers.values()
        return found

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.tell("on_pre_optimizer_step")
        self.optimizer.step()
        self.tell("on_optimizer_step")
        self.schedule.step()
        self.state.global_step += 1


@pytest.mark.parametrize("width", [64, 384, 1024, 4096])
def test_the_noise_in_a_x_is_to_a_x_the_same_at_every_width(width):
    # Ω has 2 times the root mean square of A by its law; that of 8·64 numbers is within 7 % of it (5 deviations)
    run = Run(Blob(relative_spread=2.0), adapted(width), steps=100, rows=100)
    noise, plain = run.layer.spread.pow(4).mean().sqrt(), run.layer.weight.square().mean().sqrt()
    assert (noise / plain).item() == pytest.approx(2.0, rel=0.07 * math.sqrt(64 / width))
    x = torch.randn(2000, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        noisy = run.layer(x) - x @ run.layer.weight.T
        ratio = float(noisy.std() / (x @ run.layer.weight.T).std())
    assert ratio == pytest.approx(2.0, rel=0.25)  # one draw of E: 8 rows, whose lengths differ


def test_a_matrix_of_another_size_has_a_prior_of_another_size():
    model = adapted(64)
    with torch.no_grad():
        model.base_model.model.read.lora_A["default"].weight.mul_(10)
    ten, one = (Run(Blob(), m, steps=100, rows=100) for m in (model, adapted(64)))
    assert next(iter(ten.callback.scales.values())).sigma == pytest.approx(
        10 * next(iter(one.callback.scales.values())).sigma, rel=1e-5
    )
    torch.testing.assert_close(ten.layer.spread.square(), 10 * one.layer.spread.square(), rtol=1e-5, atol=0)


def test_the_second_step_in_the_matrixs_units_is_the_papers_in_other_lengths():
    unit, rng = 0.3, torch.Generator().manual_seed(0)
    mean, spread = torch.randn(2, 5, generator=rng), 0.2 + torch.rand(2, 5, generator=rng)
    gradient = torch.randn(2, 5, generator=rng)  # of G, where lengths are the paper's
    after = []
    for length in (1.0, unit):
        plain = nn.Linear(5, 2, bias=False)
        plain.weight.data = mean * length
        layer = BlobLinear(plain, nn.ParameterList([nn.Parameter(spread * math.sqrt(length))]), 0)
        with torch.no_grad():
            paper_step(layer, gradient / math.sqrt(length), Scale(0.2 * length, length), weight=0.5, rate=0.01)
        after.append((layer.weight / length, layer.spread / math.sqrt(length)))
    for one, other in zip(*after, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(after[0][1], spread)


@pytest.mark.parametrize("update", ["paper", "elbo"])
def test_the_temperature_multiplies_the_gradient_of_the_divergence(update):
    moved = {}
    for temperature in (1.0, 0.25, 0.0):
        run = Run(
            Blob(update, prior_sigma=0.1, kl_rate=0.01, kl_cycle=2, temperature=temperature),
            adapted(16),
            steps=100,
            rows=100,
        )
        run.optimizer = torch.optim.SGD(run.model.parameters(), 0.01)
        mean, spread = run.layer.weight.detach().clone(), run.layer.spread.detach().clone()
        run.step(0 * run.model(torch.ones(1, 16)).sum())  # no gradient but that of the divergence
        moved[temperature] = torch.stack([run.layer.weight.detach() - mean, run.layer.spread.detach() - spread])
    mean.requires_grad_()
    spread.requires_grad_()
    (kl_weight(0, 2) * kl_divergence(mean, spread, 0.1)).backward()
    torch.testing.assert_close(moved[1.0], -0.01 * torch.stack([mean.grad, spread.grad]), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(moved[0.25], 0.25 * moved[1.0], rtol=1e-4, atol=1e-7)
    assert float(moved[0.0].abs().max()) == 0.0


def test_the_presets_are_the_published_settings():
    keys = ("init_spread", "prior_sigma", "kl_rate", "temperature")
    found = {name: tuple(Blob(preset=name).setting(key) for key in keys) for name in PRESETS}
    assert found == {
        "paper": (0.05, 0.2, 0.01, 1.0),
        "llama2": (0.05, 0.2, 0.01, 1.0),
        "llama3.1": (0.05, 0.15, 0.0075, 1.0),
    }
    assert Blob(preset="paper", prior_sigma=0.1).setting("prior_sigma") == 0.1
    run = Run(Blob(preset="llama3.1"), adapted(64), steps=100, rows=100)
    assert set(run.callback.scales.values()) == {Scale(0.15, 1.0)}
    assert 0.05 / math.sqrt(2) <= float(run.layer.spread.min()) <= float(run.layer.spread.max()) <= 0.05


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"preset": "llama4"}, "llama3.1"), ({"temperature": -1.0}, "temperature"), ({"relative_prior": 0.0}, "relative"),
     ({"tokens_per_row": math.nan}, "tokens_per_row")],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(settings, word):
    with pytest.raises(InputError, match=word):
        Blob(**settings)


@pytest.mark.parametrize("update", ["paper", "elbo"])
def test_a_resumed_run_has_the_prior_of_the_start(tmp_path, update):
    # by then A has grown, and with it the prior would; temperature 1, so that it is felt
    task, method = make_task(readout="likelihood"), Blob(update, kl_cycle=2, temperature=1.0)
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = fit(make_model(), task, method, arguments(tmp_path / "a", **options), tokenizer=make_tokenizer())
    shutil.rmtree(tmp_path / "a" / "checkpoint-8")
    args = arguments(tmp_path / "a", **options)
    again = fit(make_model(), task, method, args, tokenizer=make_tokenizer(), resume=True)
    assert same_params(again.mean, whole.mean)
    assert same_params(again.variance, whole.variance)


@functools.cache
def simulated(method, steps):
    """Train by a method on 200 rows of a logistic model in 384 directions, of which the data say little but of a few.

    Returns:
        Log-probabilities of the mean and of ten draws' average on other rows, their labels, and Ω over its start.
    """
    width, size = 384, (1 + torch.arange(384)) ** -0.5
    truth = torch.zeros(width).index_copy(0, torch.arange(6), torch.tensor([2.0, -2.0] * 3))
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2200, width, generator=rng) * size
    y = (torch.rand(2200, generator=rng) < torch.sigmoid(x @ truth)).float()
    model = adapted(width)
    run = Run(method if isinstance(method, Blob) else Blob(temperature=0.0), model, steps, rows=200)
    if not isinstance(method, Blob):
        run.layer.noisy = False
    start = run.layer.spread.detach().pow(4).mean()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for _ in range(steps):
            rows = torch.randint(200, (8,), generator=rng)
            run.step(functional.binary_cross_entropy_with_logits(model(x[rows]), y[rows]))
    a, b = run.layer.weight.detach(), model.base_model.model.read.lora_B["default"].weight.detach()
    omega = run.layer.spread.detach().square()

    def answers(matrix):
        """Log-probabilities of both answers on the other rows."""
        logits = 2 * (x[200:] @ matrix.T @ b.T)[:, 0]
        return torch.stack([functional.logsigmoid(-logits), functional.logsigmoid(logits)], 1)

    draws = torch.stack([answers(a + omega * torch.randn(a.shape, generator=rng)) for _ in range(10)])
    average = draws.logsumexp(0) - math.log(10)
    return answers(a), average, y[200:].long(), float((omega.square().mean() / start).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("update", ["paper", "elbo"])
def test_six_thousand_steps_keep_the_noise_and_lose_no_accuracy_to_map(update):
    # an absolute prior took Ω to 0.2, three times its start, and the draws lost two points to the mean
    _, draws, labels, growth = simulated(Blob(update), 6000)
    plain = simulated(Map(), 6000)[0], labels
    assert 0.9 < growth < 1.1
    assert accuracy(draws, labels) > accuracy(*plain) - 0.01
    assert ece(draws, labels) < ece(*plain) / 2
    assert nll(draws, labels) < nll(*plain) / 2


@pytest.mark.slow
def test_on_the_evidence_bound_six_thousand_steps_are_as_good_as_six_hundred():
    (_, short, labels, _), (_, long, *_) = (simulated(Blob("elbo"), steps) for steps in (600, 6000))
    assert nll(long, labels) < nll(short, labels) + 0.02
    assert accuracy(long, labels) > accuracy(short, labels) - 0.01
