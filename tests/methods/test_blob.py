"""BLoB against its equations (arXiv 2406.11675): the KL term, its schedule, flipout, and both updates by hand."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import arguments, make_model, make_task, make_tokenizer
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as torch_kl
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from bayeslora import fit
from bayeslora.errors import InputError
from bayeslora.methods import Blob, Map
from bayeslora.methods.blob.layer import BlobLinear, Flipout, attach, begin, detach, sign_words
from bayeslora.methods.blob.terms import kl_divergence, kl_weight, paper_cycle
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import initialise, lora_parameters, read
from bayeslora.prediction.readouts import readout_for

SIGMA = 0.2


@pytest.mark.parametrize("cycle", [1, 2, 5, 40, 909, 3000])
def test_the_weights_double_and_add_up_to_one(cycle):
    weights = [kl_weight(step, cycle) for step in range(2 * cycle)]
    assert weights[:cycle] == weights[cycle:]
    assert all(b == 2 * a for a, b in itertools.pairwise(weights[:cycle]) if a > 0)
    assert math.fsum(weights[:cycle]) == pytest.approx(1 - 0.5**cycle / (2 - 0.5**cycle), rel=1e-12)
    assert weights[cycle - 1] == pytest.approx(0.5, rel=0.5**cycle * 1.1)


@pytest.mark.parametrize(
    ("rows", "cycle"), [(640, 316), (1119, 393), (2251, 518), (2558, 544), (4957, 706), (9427, 909)]
)
def test_the_cycle_is_the_papers_for_its_data_sets(rows, cycle):
    assert paper_cycle(rows, 4) == cycle


def test_the_divergence_is_that_of_the_normal_distributions():
    rng = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(3, 4, generator=rng), 0.1 + torch.rand(3, 4, generator=rng)
    exact = torch_kl(Normal(mean, spread**2), Normal(0.0, SIGMA)).sum()
    torch.testing.assert_close(kl_divergence(mean, spread, SIGMA), exact)
    prior = torch.full((3, 4), math.sqrt(SIGMA))
    assert kl_divergence(torch.zeros(3, 4), prior, SIGMA).item() == pytest.approx(0, abs=1e-6)


def test_the_divergence_over_a_is_that_of_the_dense_gaussian_over_w():
    # theorem 3.2: with B of full rank, vec(BA) is an invertible image of A within a subspace, so the KL is the same
    rng = torch.Generator().manual_seed(1)
    rank, width, out = 2, 3, 4
    b = torch.randn(out, rank, generator=rng, dtype=torch.float64)
    mean = torch.randn(rank, width, generator=rng, dtype=torch.float64)
    spread = 0.2 + torch.rand(rank, width, generator=rng, dtype=torch.float64)
    lift = torch.kron(b, torch.eye(width, dtype=torch.float64))  # vec(BA) = lift · vec(A), row by row
    basis, _ = torch.linalg.qr(lift)  # W lives in the span of `lift`
    image = basis.T @ lift
    q = MultivariateNormal(image @ mean.flatten(), image @ torch.diag(spread.flatten() ** 4) @ image.T)
    p = MultivariateNormal(torch.zeros(rank * width).double(), SIGMA**2 * image @ image.T)
    torch.testing.assert_close(kl_divergence(mean, spread, SIGMA), torch_kl(q, p))


def layer(width=6, rank=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Linear(width, rank, bias=False)
        spread = nn.Parameter(0.3 + 0.4 * torch.rand(rank, width))
    found = BlobLinear(plain, nn.ParameterList([spread]), 0).train()
    found.noisy = True
    return found


@pytest.mark.slow
def test_flipouts_output_has_mean_mx_and_the_variance_of_a_draw_per_token():
    # 10,000 forward passes; each estimate is within 5 of its own deviations, false alarms 1 in 10,000
    a, x = layer(), torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.0, 1.0], [0.1, 0.2, -0.3, 0.4, 0.5, -0.6]])
    count = 10_000
    with torch.no_grad():
        found = torch.stack([a(x) for _ in range(count)])
    variance = x.square() @ a.spread.pow(4).T
    assert bool(((found.mean(0) - x @ a.weight.T).abs() < 5 * (variance / count).sqrt()).all())
    assert bool(((found.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / count)).all())
    rows = (found - x @ a.weight.T) / variance.sqrt()
    across = (rows[:, 0] * rows[:, 1]).mean(
        0
    )  # two tokens of one pass are uncorrelated: that is what the signs are for
    assert bool((across.abs() < 5 * math.sqrt(3 / count)).all())


def signs(rows, width):
    return sign_words(torch.randint(2**62, ()), rows, width)


def test_flipouts_gradients_are_those_of_finite_differences():
    x, mean, noise = (torch.randn(*n, 3, dtype=torch.float64, requires_grad=True) for n in ((2, 70), (2,), (2,)))
    into, out = signs(x, 3), signs(x, 2)  # 70 tokens: two words a column
    assert torch.autograd.gradcheck(lambda *tensors: Flipout.apply(*tensors, into, out), (x, mean, noise))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_flipouts_signs_are_of_size_one_and_half_of_them_minus(dtype):
    rows, width = 1000, 7
    one = torch.ones(10, rows // 10, width, dtype=dtype)
    eye, nothing = torch.eye(width, dtype=dtype), torch.zeros(width, width, dtype=dtype)
    found = Flipout.apply(one, nothing, eye, signs(one, width), signs(one, width) * 0).double().flatten(0, 1)
    assert bool((found.abs() == 1).all())
    assert bool((found.mean(0).abs() < 5 / math.sqrt(rows)).all())  # 5 deviations
    assert float((found.T @ found / rows - torch.eye(width)).abs().max()) < 5 / math.sqrt(rows)
    assert bool((found.mean(1).abs() < 1).any())  # not one sign a row


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_a_noisy_layer_takes_inputs_of_any_shape(shape):
    a, x = layer(), torch.randn(shape)
    assert a(x).shape == (*shape[:-1], 3)
    turned = torch.randn(6, 4).T.requires_grad_()  # not contiguous
    a(turned).sum().backward()
    assert turned.grad.shape == (4, 6)
    assert bool(turned.grad.abs().sum() > 0)


def test_a_noisy_layer_computes_in_autocasts_type():
    a, x = layer(), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = a(x)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert [t.grad.dtype for t in (x, a.weight, a.spread)] == [torch.float32] * 3


def test_there_is_no_noise_outside_training():
    a, x = layer(), torch.ones(2, 6)
    assert not torch.equal(a(x), a(x))
    a.eval()
    assert torch.equal(a(x), x @ a.weight.T)
    a.train()
    a.noisy = False
    assert torch.equal(a(x), x @ a.weight.T)


def test_a_disabled_or_merged_adapter_has_no_noise():
    model = make_model()
    layers = attach(model)
    begin(layers, 0.5, 1.0, seed=0)
    for a in layers.values():
        a.noisy = True
    model.train()
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, model(tokens).logits)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, model(tokens).logits)
        model.merge_adapter()
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        model.unmerge_adapter()


def test_the_adapter_on_disk_has_no_spread_and_detaching_leaves_the_model_as_it_was(tmp_path):
    model = make_model()
    names, before = dict(model.named_parameters()).keys(), read(model)
    shape = str(model)
    attach(model)
    assert read(model).keys() == before.keys()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert load_file(tmp_path / "adapter_model.safetensors").keys() == before.keys()
    detach(model)
    assert dict(model.named_parameters()).keys() == names
    assert str(model) == shape


def test_the_spread_starts_uniform_between_its_bounds():
    model = make_model(r=8)
    layers = attach(model)
    begin(layers, 0.05, 1.0, seed=3)
    values = torch.cat([a.spread.detach().flatten() for a in layers.values()])
    assert float(values.min()) >= 0.05 / math.sqrt(2)
    assert float(values.max()) <= 0.05
    assert abs(float(values.mean()) - 0.05 * (1 + math.sqrt(0.5)) / 2) < 5 * 0.05 * 0.2929 / math.sqrt(12 * len(values))


def test_llama_2_7b_has_the_papers_numbers_of_parameters():
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"]))
    layers = attach(model)
    assert sum(p.numel() for p in lora_parameters(model).values()) == 4_483_072
    assert sum(a.spread.numel() for a in layers.values()) == 2_129_920


def train(model, kwargs, args, rows=24):
    """Train with the stock Trainer."""
    task = make_task(readout="likelihood", rows=rows)
    readout = readout_for(model, task.train, make_tokenizer())
    args.remove_unused_columns, args.label_names = False, ["labels"]
    kwargs = {"data_collator": readout.collate, "compute_loss_func": answer_loss, **kwargs}
    with readout.attached(model):
        Trainer(model, args, train_dataset=readout.encode(task.train)[0], **kwargs).train()


def one_step(tmp_path, method, **changes):
    """Train one step and return parameters before and after, and the NLL's gradients at the same noise."""
    model = make_model()
    initialise(model, 0)
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if "lora_B" in name:
                p.fill_(0.1)
    args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant", **changes)
    kwargs = method.trainer_kwargs(model, 4)
    _, _, callback, *_ = kwargs["callbacks"]
    seen = {}
    before_step = callback.on_pre_optimizer_step

    def note(*positional, **named):
        for name, a in callback.layers.items():
            seen[name] = (
                a.weight.detach().clone(),
                a.spread.detach().clone(),
                a.weight.grad.clone(),
                a.spread.grad.clone(),
            )
        return before_step(*positional, **named)

    callback.on_pre_optimizer_step = note
    train(model, kwargs, args, rows=4)
    after = {name: (a.weight.detach(), a.spread.detach()) for name, a in callback.layers.items()}
    return seen, after


def test_one_step_of_the_released_algorithm(tmp_path):
    rate, kl_rate, weight = 1e-3, 0.02, kl_weight(0, 2)
    seen, after = one_step(
        tmp_path,
        Blob("paper", prior_sigma=SIGMA, kl_rate=kl_rate, kl_cycle=2, temperature=1.0),
        optim="sgd",
        learning_rate=rate,
    )
    assert seen
    for name, (mean, spread, mean_grad, spread_grad) in seen.items():
        moved = mean - rate * mean_grad  # the Trainer's optimiser, here plain SGD
        expected = moved - kl_rate * weight * moved / SIGMA**2
        kl = (spread**2 / SIGMA**2 - 1 / spread**2) * 2 * spread  # dKL/dΩ · dΩ/dG
        torch.testing.assert_close(after[name][0], expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(after[name][1], spread - kl_rate * (spread_grad + weight * kl), rtol=1e-5, atol=1e-8)


def test_one_step_on_the_evidence_bound(tmp_path):
    rate, weight = 1e-3, kl_weight(0, 2)
    method = Blob("elbo", prior_sigma=SIGMA, kl_cycle=2, temperature=1.0)
    seen, after = one_step(tmp_path, method, optim="sgd", learning_rate=rate)
    for name, (mean, spread, mean_grad, spread_grad) in seen.items():
        mean.requires_grad_()
        spread.requires_grad_()
        (weight * kl_divergence(mean, spread, SIGMA)).backward()
        torch.testing.assert_close(after[name][0], mean.detach() - rate * (mean_grad + mean.grad), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            after[name][1], spread.detach() - rate * (spread_grad + spread.grad), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("update", ["paper", "elbo"])
def test_the_released_algorithm_keeps_g_out_of_the_trainers_optimiser(tmp_path, update):
    seen, after = one_step(tmp_path, Blob(update, kl_rate=1e-12, kl_cycle=50), learning_rate=1e-2)
    moved = max(float((after[name][1] - spread).abs().max()) for name, (_, spread, _, _) in seen.items())
    assert moved < 1e-9 if update == "paper" else moved == pytest.approx(1e-2, rel=0.1)


def test_the_posterior_is_a_gaussian_over_a_with_g_to_the_fourth(tmp_path):
    model = make_model()
    method = Blob(kl_cycle=4)
    kwargs = method.trainer_kwargs(model, 24)
    layers = kwargs["callbacks"][2].layers
    train(model, kwargs, arguments(tmp_path))
    posterior = method.posterior(model)
    assert posterior.variance.keys() == layers.keys()
    assert all("lora_A" in name for name in layers)
    for name, a in layers.items():
        torch.testing.assert_close(posterior.variance[name], a.spread.detach() ** 4)
    assert not any(isinstance(m, BlobLinear) for m in model.modules())


def test_a_run_that_broke_off_leaves_nothing_in_the_way_of_the_next(tmp_path):
    def breaks(*_, **__):
        raise KeyboardInterrupt

    model, task = make_model(), make_task(readout="likelihood")
    broken = Blob().trainer_kwargs(model, 24)
    broken["callbacks"][2].on_optimizer_step = breaks
    with pytest.raises(KeyboardInterrupt):
        train(model, broken, arguments(tmp_path / "a"))
    assert any(isinstance(m, BlobLinear) for m in model.modules())
    initialise(model, 0)
    plain = fit(model, task, Map(), arguments(tmp_path / "b"), tokenizer=make_tokenizer())
    assert not any(isinstance(m, BlobLinear) for m in model.modules())
    fresh = make_model()
    initialise(fresh, 0)
    other = fit(fresh, task, Map(), arguments(tmp_path / "c"), tokenizer=make_tokenizer())
    assert all(torch.equal(plain.mean[n], other.mean[n]) for n in other.mean)
    again = fit(model, task, Blob(), arguments(tmp_path / "d"), tokenizer=make_tokenizer())
    assert again.variance


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"update": "adam"}, "update"), ({"prior_sigma": 0.0}, "prior_sigma"), ({"kl_rate": -1.0}, "kl_rate"),
     ({"init_spread": math.inf}, "init_spread"), ({"kl_cycle": 0}, "kl_cycle")],
)  # fmt: skip
def test_settings_without_a_meaning_are_refused(settings, word):
    with pytest.raises(InputError, match=word):
        Blob(**settings)


def test_dora_is_refused():
    with pytest.raises(InputError, match="DoRA"):
        Blob().trainer_kwargs(make_model(use_dora=True), 24)
    with pytest.raises(InputError, match="num_data"):
        Blob().trainer_kwargs(make_model(), 0)
