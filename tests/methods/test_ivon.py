"""IVON in the Trainer: where the noise is and where it is not, its log, several processes, and what is refused."""

import itertools
import logging
import math
import os

import pytest
import torch
from support.forked import in_ranks
from support.tiny import arguments, make_model, make_task, make_tokenizer, same_params
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from bayeslora import fit
from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ivon, Map
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.settings import PRESETS, default_ess, default_sigma
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import initialise, lora_parameters, read
from bayeslora.prediction.readouts import readout_for

ROWS = 24


def trainer(model, args, kwargs, *callbacks):
    """The stock Trainer on the tiny task."""
    task = make_task(readout="likelihood", rows=ROWS)
    readout = readout_for(model, task.train, make_tokenizer())
    args.remove_unused_columns, args.label_names = False, ["labels"]
    kwargs = {"data_collator": readout.collate, "compute_loss_func": answer_loss, **kwargs}
    kwargs["callbacks"] = [*kwargs["callbacks"], *callbacks]
    rows = readout.encode(task.train)[0]
    return readout, Trainer(model, args, train_dataset=rows, eval_dataset=rows, **kwargs)


def run(model, args, kwargs, *callbacks):
    readout, own = trainer(model, args, kwargs, *callbacks)
    with readout.attached(model):
        own.train()
    return own


class Watch(TrainerCallback):
    """Compares what the modules compute with what the parameters say."""

    def __init__(self, model):
        self.model, self.noisy, self.moved = model, [], []
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
        self.layer = layer
        layer.register_forward_hook(self.look)

    def look(self, layer, inputs, output):
        plain = torch.nn.functional.linear(inputs[0], layer._parameters["weight"])
        self.noisy.append((layer.training, not torch.allclose(plain, output)))
        self.moved.append(read(self.model))


def test_modules_read_a_draw_in_training_alone_and_the_parameters_are_the_mean_all_the_time(tmp_path):
    model = make_model()
    method = Ivon(sigma0=0.05)
    watch = Watch(model)
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2,
                     eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)  # fmt: skip
    run(model, args, method.trainer_kwargs(model, ROWS), watch)
    assert {training for training, _ in watch.noisy} == {True, False}
    assert all(training == noisy for training, noisy in watch.noisy)
    steps = [params for (training, _), params in zip(watch.noisy, watch.moved, strict=True) if training]
    assert same_params(steps[0], steps[1])  # two accumulated batches of one step: nothing has moved
    assert not same_params(steps[1], steps[2])
    assert "weight" not in watch.layer.__dict__


def test_the_mean_is_there_after_an_exception_in_the_middle_of_a_batch(tmp_path):
    model = make_model()
    before = read(model)

    def breaks(*_, **__):
        raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].register_forward_hook(breaks)
    kwargs = Ivon().trainer_kwargs(model, ROWS)
    with pytest.raises(KeyboardInterrupt):
        run(model, arguments(tmp_path / "a"), kwargs)
    assert same_params(read(model), before)
    handle.remove()
    task = make_task(readout="likelihood")  # and the next run is not disturbed
    initialise(model, 0)
    after = fit(model, task, Map(), arguments(tmp_path / "b"), tokenizer=make_tokenizer())
    fresh = make_model()
    initialise(fresh, 0)
    assert same_params(after.mean, fit(fresh, task, Map(), arguments(tmp_path / "c"), tokenizer=make_tokenizer()).mean)


def test_half_the_trainers_learning_rate_is_the_largest_step(tmp_path):
    model = make_model()
    before = read(model)
    method = Ivon(temperature=1e-6)  # a cold posterior: every coordinate's step is at the clip
    args = arguments(tmp_path, max_steps=1, learning_rate=3e-3, lr_scheduler_type="constant")
    own = run(model, args, method.trainer_kwargs(model, ROWS))
    assert isinstance(own.optimizer.optimizer, IvonOptimizer)
    steps = torch.cat([(read(model)[n] - before[n]).abs().flatten() for n in before])
    assert float(steps.max()) == pytest.approx(1.5e-3, rel=1e-4)
    assert float((steps > 1.45e-3).float().mean()) > 0.5


def test_both_ways_to_set_it_are_the_same_optimiser():
    seen = Ivon(sigma0=0.01, prior_sigma=math.inf, max_step=3e-5, temperature=200 / 1e6)
    units, own = seen.optimizer_settings(200), seen.own_settings(1e6, 0.5)
    paper = Ivon(ess=1e6, hess_init=0.01, learning_rate=1.0, clip_radius=3e-5).optimizer_settings(200)
    assert own == pytest.approx({"hess_init": paper["hess_init"], "weight_decay": paper["weight_decay"]})
    for key in ("ess", "lr", "clip_radius", "betas", "prior", "price_clip", "rescale_lr"):
        assert units[key] == pytest.approx(paper[key]) if isinstance(units[key], float) else units[key] == paper[key]
    assert Ivon(ess="sqrt", hess_init=1e-3, learning_rate=0.03).optimizer_settings(400)["ess"] == 100_000


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_are_the_published_settings(name):
    found = Ivon(preset=name).optimizer_settings(100)
    published = {"winogrande_s": (1e7, 3e-4), "boolq": (1e7, 3e-4), "winogrande_m": (1e8, 3e-4)}
    assert (found["ess"], found["hess_init"]) == published.get(name, (1e6, 1e-3))
    assert (found["lr"], found["clip_radius"], found["betas"]) == (0.03, 1e-3, (0.9, 0.99999))
    assert found["weight_decay"] == 0
    assert not found["rescale_lr"]


def test_the_posterior_has_the_optimisers_variance(tmp_path):
    model = make_model()
    method = Ivon(sigma0=0.05, temperature=0.5)
    own = run(model, arguments(tmp_path), method.trainer_kwargs(model, ROWS))
    posterior, optimizer = method.posterior(model), own.optimizer.optimizer
    for name, p in lora_parameters(model).items():
        hess, delta = optimizer.state[p]["hess"], 1 / (ROWS / 0.5 * 0.05**2)
        torch.testing.assert_close(posterior.variance[name], 1 / (ROWS / 0.5 * (hess + delta)))
        assert torch.equal(posterior.mean[name], p.detach())


def test_the_log_tells_how_the_variance_does_and_warns_where_it_was_not_learned(tmp_path, caplog):
    model = make_model()
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=2)
    with caplog.at_level(logging.INFO, "bayeslora"):
        own = run(model, args, Ivon(preset="arc_easy").trainer_kwargs(model, ROWS))
    logged = [line for line in own.state.log_history if "loss" in line]
    assert logged
    assert all({"ivon_hess_moved", "ivon_clipped", "ivon_sigma"} <= line.keys() for line in logged)
    assert logged[-1]["ivon_sigma"] == pytest.approx(1e6**-0.5 * 1e-3**-0.5, rel=0.1)
    assert "hardly learned" in caplog.text
    assert "median sigma" in caplog.text
    caplog.clear()
    fast = Ivon(sigma0=0.05, prior_sigma=math.inf, temperature=0.5, betas=(0.9, 0.5))
    with caplog.at_level(logging.INFO, "bayeslora"):
        run(make_model(), arguments(tmp_path), fast.trainer_kwargs(model, ROWS))
    assert "hardly learned" not in caplog.text


def test_several_draws_of_a_step_are_different_noise(tmp_path):
    model = make_model()
    args = arguments(
        tmp_path, max_steps=1, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_grad_norm=0.0
    )
    seen = []
    kwargs = Ivon(sigma0=0.05, draws_per_step=2).trainer_kwargs(model, ROWS)

    class Look(TrainerCallback):
        def on_substep_end(self, *_, **named):
            optimizer = named["optimizer"].optimizer
            seen.append(float(optimizer.noise(optimizer.param_groups[0]["params"][0]).sum()))

    run(model, args, kwargs, Look())
    assert [a == b for a, b in itertools.pairwise(seen)] == [False, True]


def test_two_processes_are_one_process_on_the_joint_batch(tmp_path):
    def trained(name, **changes):
        model, method = make_model(), Ivon(sigma0=0.05, max_step=1e-2)
        run(model, arguments(tmp_path / name, max_steps=5, **changes), method.trainer_kwargs(model, ROWS))
        return method.posterior(model)

    def pair():
        posterior = trained("pair", per_device_train_batch_size=2)
        if os.environ["RANK"] == "0":
            torch.save({"mean": posterior.mean, "variance": posterior.variance}, tmp_path / "pair.pt")

    ended = in_ranks(pair)
    assert [status for status, _ in ended] == [0, 0], ended
    alone, both = trained("alone"), torch.load(tmp_path / "pair.pt", weights_only=True)
    for part, ours in (("mean", alone.mean), ("variance", alone.variance)):
        for name, value in ours.items():
            torch.testing.assert_close(value, both[part][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"sigma0": 0.01, "ess": 1e6}, "either"),
        ({"ess": 1e6}, "belong together"),
        ({"preset": "mnist"}, "no preset"),
        ({"ess": "cube", "hess_init": 1.0, "learning_rate": 0.1}, "sqrt"),
        ({"sigma0": 0.0}, "sigma0"),
        ({"temperature": -1.0}, "temperature"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ess": -1.0, "hess_init": 1.0, "learning_rate": 0.1}, "ess"),
        ({"ess": 10.0, "hess_init": 0.0, "learning_rate": 0.1}, "infinite"),
        ({"prior_sigma": 0.0}, "prior_sigma"),
        ({"prior_sigma": 0.1, "weight_decay": 1.0}, "give one of them"),
        ({"sigma0": 0.2, "prior_sigma": 0.1}, "wider than its prior"),
        ({"prior_mean": "mode"}, "prior_mean"),
        ({"draws_per_step": 0}, "draws_per_step"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, word):
    with pytest.raises(InputError, match=word):
        Ivon(**settings)


def test_what_it_cannot_train_is_refused(tmp_path):
    with pytest.raises(InputError, match="DoRA"):
        Ivon().trainer_kwargs(make_model(use_dora=True), ROWS)
    with pytest.raises(InputError, match="num_data"):
        Ivon().trainer_kwargs(make_model(), 0)
    model = make_model()
    deepspeed = arguments(tmp_path)
    deepspeed.deepspeed = "zero2.json"
    kwargs = Ivon().trainer_kwargs(model, ROWS)
    with pytest.raises(InputError, match="DeepSpeed"):
        kwargs["callbacks"][2].on_train_begin(deepspeed, None, None, model=model, optimizer=None)
    for changes, word in (({"gradient_accumulation_steps": 2}, "max_grad_norm"), ({"max_grad_norm": 0.0}, "accumul")):
        several = Ivon(draws_per_step=2).trainer_kwargs(model, ROWS)
        with pytest.raises(InputError, match=word):
            run(model, arguments(tmp_path, **changes), several)
    own = {"callbacks": Ivon().trainer_kwargs(model, ROWS)["callbacks"]}
    with pytest.raises(InputError, match="its own optimiser"):
        run(model, arguments(tmp_path), own)


def test_fsdp_version_1_is_refused(tmp_path):
    class FlatParameter(torch.nn.Parameter):
        pass

    model = make_model()
    kwargs = Ivon().trainer_kwargs(model, ROWS)
    optimizer = torch.optim.SGD([FlatParameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(InputError, match="FSDP version 1"):
        kwargs["callbacks"][2].on_train_begin(arguments(tmp_path), None, None, model=model, optimizer=optimizer)


def test_tensor_parallelism_is_refused(tmp_path):
    args, model, other = arguments(tmp_path), make_model(), make_model()
    runs = (("IVON", Ivon().trainer_kwargs(model, ROWS), model), ("BLoB", Blob().trainer_kwargs(other, ROWS), other))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        optimizer = torch.optim.SGD([torch.nn.Parameter(DTensor.from_local(torch.zeros(3), mesh))], lr=0.1)
        for name, kwargs, trained in runs:
            with pytest.raises(InputError, match=f"{name} cannot train under tensor parallelism"):
                kwargs["callbacks"][2].on_train_begin(args, None, None, model=trained, optimizer=optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_a_priors_width_is_checked_for_the_rows_that_there_are(tmp_path):
    # δ = .78 at λ = N/T = 400 is a prior of deviation .057, wider than σ₀ = .04; at λ = 4,000 it is .018
    method = Ivon(sigma0=0.04, temperature=0.5, weight_decay=0.78)
    assert method.own_settings(400, 0.0) == pytest.approx({"hess_init": 1 / 0.64 - 0.78, "weight_decay": 0.78})
    method.trainer_kwargs(make_model(), 200)
    with pytest.raises(InputError, match=r"deviation 0\.018, and sigma0 is 0\.04"):
        method.trainer_kwargs(make_model(), 2000)
    colder = Ivon(weight_decay=1e6)
    kwargs = colder.trainer_kwargs(make_model(), ROWS)
    with pytest.raises(InputError, match="wider than its prior"):
        run(make_model(), arguments(tmp_path), kwargs)


def test_the_defaults_follow_rows_parameters_and_widths():
    assert default_ess(200, 73_728) == pytest.approx(73_728 * math.sqrt(200) / 50)
    assert default_ess(10_000, 1_000) == 10_000
    published = [default_ess(n, 4_194_304) for n in (640, 1119, 2251, 2558, 4957, 9427)]  # Llama-2-7B, the papers' N
    assert all(1e6 < ess < 1e8 for ess in published)
    for width in (384, 4096):  # deviation of the noise in A, relative to A's start, which is uniform on ±1/√in
        assert default_sigma(torch.Size((8, width))) * math.sqrt(3 * width) == pytest.approx(0.8 * math.sqrt(3))
    for modules in (12, 64):  # variance of B's noise in the output, s²·r·σ²/3 a module, summed over the modules
        sigma = default_sigma(torch.Size((384, 8)), (2.0, 8, modules))
        assert modules * 4 * 8 * sigma**2 / 3 == pytest.approx(0.45**2)


def test_an_adapter_begins_at_its_own_deviations_and_never_exceeds_them(tmp_path):
    model, method = make_model(), Ivon()
    before = read(model)
    own = run(model, arguments(tmp_path, max_steps=6), method.trainer_kwargs(model, ROWS))
    optimizer = own.optimizer.optimizer
    total = sum(p.numel() for p in lora_parameters(model).values())
    assert optimizer.param_groups[0]["ess"] == pytest.approx(default_ess(ROWS, total))
    modules = sum("lora_A" in name for name in before)
    for name, variance in method.posterior(model).variance.items():
        config = model.peft_config["default"]
        of_b = (config.lora_alpha / config.r, config.r, modules) if "lora_B" in name else None
        assert float(variance.max()) <= default_sigma(variance.shape, of_b) ** 2 * (1 + 1e-5)
        assert float(variance.median()) >= 0.5 * default_sigma(variance.shape, of_b) ** 2


@pytest.mark.parametrize("settings", [{}, {"prior": "empirical", "temperature": 1e-3}])
def test_the_prior_does_not_pull_the_adapter_back_to_the_base_model(tmp_path, settings, caplog):
    model = make_model()
    start = read(model)
    args = arguments(tmp_path, max_steps=60, learning_rate=1e-2)
    run(model, args, Ivon(**settings).trainer_kwargs(model, ROWS))
    for name, value in read(model).items():
        if "lora_A" in name:
            assert float(value.abs().mean()) > 0.5 * float(start[name].abs().mean())
        elif "lora_B" in name:
            assert float(value.abs().mean()) > 1e-3
    assert "empirical prior" not in caplog.text


def test_an_empirical_prior_at_bayes_rule_warns(tmp_path, caplog):
    model = make_model()
    run(model, arguments(tmp_path, max_steps=1), Ivon(prior="empirical", temperature=1.0).trainer_kwargs(model, ROWS))
    assert "may stay the base model" in caplog.text


def test_several_draws_of_a_step_are_refused_under_fp16(tmp_path):
    model = make_model()
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.0)
    args.fp16 = True
    optimizer = IvonOptimizer(list(lora_parameters(model).values()), lr=1.0, ess=10.0)
    callback = Ivon(draws_per_step=2).trainer_kwargs(model, ROWS)["callbacks"][2]
    with pytest.raises(InputError, match="bf16=True"):
        callback.on_train_begin(args, None, None, model=model, optimizer=optimizer)
