"""SWAG against numpy and against the schedule it is specified by."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny import arguments, make_model, make_task, same_params
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainerCallback

from bayeslora.errors import InputError
from bayeslora.methods import Swag
from bayeslora.methods.regularisers import answer_loss
from bayeslora.methods.swag import Moments, hold
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import DiagonalGaussian, LowRankGaussian, Point
from bayeslora.prediction.readouts import readout_for
from bayeslora.training.run import fit

STEPS, PEAK = 12, 1e-2


class Diary(TrainerCallback):
    """Writes down the adapter after each step, and the learning rate that the step was made with."""

    def __init__(self):
        self.iterates = []
        self.rates = []

    def on_pre_optimizer_step(self, *_, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, *_, **kwargs):
        self.iterates.append(read(kwargs["model"]))


@pytest.fixture
def run(tokenizer, tmp_path):
    """Train with SWAG; return the posterior and the diary."""

    def train(method, *, model=None, resume=False, stop=None, **changes):
        diary = Diary()
        schedule = {"max_steps": STEPS, "learning_rate": PEAK, "lr_scheduler_type": "linear", "warmup_steps": 2}
        posterior = fit(
            model if model is not None else make_model(lora_dropout=0.1),
            make_task(readout="likelihood"),
            method,
            arguments(tmp_path / "run", **(schedule | changes)),
            tokenizer=tokenizer,
            resume=resume,
            callbacks=[diary, *([stop] if stop else [])],
        )
        return posterior, diary

    return train


def stacked(iterates, name):
    return np.stack([iterate[name].numpy().astype(np.float64) for iterate in iterates])


def assert_moments(posterior, collected, scale=1.0):
    assert isinstance(posterior, DiagonalGaussian | LowRankGaussian)
    for name, variance in posterior.variance.items():
        values = stacked(collected, name)
        np.testing.assert_allclose(posterior.mean[name], values.mean(0), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(variance, np.maximum(scale * values.var(0), 1e-30), rtol=1e-3, atol=1e-12)


def test_mean_and_variance_are_those_of_the_collected_iterates(run):
    posterior, diary = run(Swag(start=4, interval=2))
    collected = diary.iterates[5::2]  # after steps 6, 8, 10, 12
    assert_moments(posterior, collected)
    assert posterior.rank == 4


def test_the_diagonal_kind_has_the_same_variance_at_scale_one(run):
    posterior, diary = run(Swag("diagonal", start=4, interval=2))
    assert isinstance(posterior, DiagonalGaussian)
    assert_moments(posterior, diary.iterates[5::2])


def test_swa_is_the_mean_alone(run):
    posterior, diary = run(Swag("swa", start=4, interval=2))
    assert isinstance(posterior, Point)
    for name, value in posterior.mean.items():
        np.testing.assert_allclose(value, stacked(diary.iterates[5::2], name).mean(0), rtol=1e-5, atol=1e-8)


def test_snapshots_are_the_last_k_iterates_as_they_were(run):
    posterior, diary = run(Swag(start=2, interval=1, rank=3))
    for name, kept in posterior.snapshots.items():
        assert torch.equal(kept, torch.stack([iterate[name] for iterate in diary.iterates[-3:]]))
    assert_moments(posterior, diary.iterates[2:])  # the moments count all ten


def half_precision():
    """A model whose base and adapter are in bfloat16, as TRL makes them."""
    model = make_model(dtype=torch.bfloat16)
    for p in lora_parameters(model).values():
        p.data = p.data.bfloat16()
    return model


def test_an_adapter_in_bf16_trains_and_is_summed_up_in_float32(run):
    model = half_precision()
    posterior, diary = run(Swag(start=2, interval=1), model=model)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model).values())
    assert_moments(posterior, diary.iterates[2:])
    assert all(v.dtype == torch.float32 for v in (posterior.mean | posterior.variance).values())


@pytest.mark.parametrize("late", [False, True], ids=["known to the Trainer", "added afterwards"])
def test_an_adapter_in_bf16_moves_at_a_small_rate(late, tokenizer, tmp_path):
    model, method = half_precision(), Swag(start=2, interval=1, learning_rate=1e-5)
    split = make_task(readout="likelihood").train
    readout = readout_for(model, split, tokenizer)
    rows = readout.encode(split)[0]
    kwargs = method.trainer_kwargs(model, len(rows))
    args = arguments(tmp_path, max_steps=STEPS, learning_rate=1e-4, weight_decay=0.0, remove_unused_columns=False)
    added = kwargs.pop("callbacks") if late else []
    with readout.attached(model):
        trainer = Trainer(model, args, train_dataset=rows, data_collator=readout.collate,
                          compute_loss_func=answer_loss, **kwargs)  # fmt: skip
        for callback in added:
            trainer.add_callback(callback)
        trainer.train()
    posterior = method.posterior(model)
    moved = torch.cat([(v > 1e-30).flatten() for v in posterior.variance.values()])
    assert float(moved.float().mean()) > 0.99


def test_a_resumed_run_of_an_adapter_in_bf16_is_the_whole_one(run):
    method = Swag(start=2, interval=1)
    whole, _ = run(method, model=half_precision())
    save = {"save_strategy": "steps", "save_steps": 3}
    run(method, model=half_precision(), stop=StopAfter(6), **save)
    resumed, _ = run(method, model=half_precision(), resume=True, **save)
    for part in ("mean", "variance", "snapshots"):
        assert same_params(getattr(resumed, part), getattr(whole, part))


def test_moments_copy_what_they_are_given_to_the_cpu():
    moments, value = Moments(rank=2), torch.zeros(3)
    moments.add({"w": value})
    value += 1
    assert not bool(moments.snapshots[0]["w"].any())
    with pytest.raises(NotImplementedError, match="meta"):  # which has no values to copy
        Moments(rank=2).add({"w": torch.zeros(3, device="meta")})


def test_a_path_that_does_not_move_is_warned_of(run, caplog):
    run(Swag(start=2, interval=1), weight_decay=0.0)
    assert not caplog.messages
    run(Swag("swa", start=2, interval=1, learning_rate=1e-30), weight_decay=0.0)
    assert not caplog.messages
    run(Swag(start=2, interval=1, learning_rate=1e-30), weight_decay=0.0)
    assert len(caplog.messages) == 1
    assert "100 % of the adapter's numbers were the same in all 10 snapshots" in caplog.text
    assert "learning_rate" in caplog.text


def test_a_path_that_stands_still_in_bf16_is_warned_of_with_the_cause(run, caplog):
    model = half_precision()

    class Late(TrainerCallback):
        def on_train_begin(self, *_, **__):
            for p in lora_parameters(model).values():
                p.data = p.data.bfloat16()

    run(Swag(start=2, interval=1, learning_rate=1e-6), model=model, stop=Late(), weight_decay=0.0)
    assert "the adapter is in torch.bfloat16, in which small steps are lost" in caplog.text


def test_a_tiny_variance_beside_a_large_mean_is_found():
    # E[θ²] − θ̄² in float32 loses everything here: θ̄² is 1e4 and its spacing 1e-3, ten times the variance
    generator = torch.Generator().manual_seed(0)
    values = 100 + 0.01 * torch.randn(50, 200, generator=generator)
    moments = Moments(rank=2)
    for value in values:
        moments.add({"w": value.clone()})
    exact = values.double().numpy()
    np.testing.assert_allclose(moments.mean["w"], exact.mean(0), rtol=0, atol=1e-4)  # a hundredth of σ
    np.testing.assert_allclose(moments.squares["w"] / moments.count, exact.var(0), rtol=1e-2)
    naive = (values.square().mean(0) - values.mean(0).square()).numpy()
    assert (np.abs(naive / exact.var(0) - 1) > 1).mean() > 0.5


def test_a_parameter_that_does_not_move_has_the_floor_as_its_variance(run):
    posterior, _ = run(Swag(start=2, interval=1, learning_rate=1e-30), weight_decay=0.0)
    assert all(bool((v == 1e-30).any()) for v in posterior.variance.values())
    assert all(bool((v >= 1e-30).all()) for v in posterior.variance.values())


@pytest.mark.parametrize(
    ("start", "interval", "collected"),
    [
        (4, 2, [6, 8, 10, 12]),
        (4, 3, [7, 10]),
        (0, 6, [6, 12]),
        (0.5, 2, [8, 10, 12]),
        (0.25, 4, [7, 11]),
        (0.0, 5, [5, 10]),
        (10, 1, [11, 12]),
        (6, None, [7, 8, 9, 10, 11, 12]),  # 2K = 10 times does not fit into 6 steps: every step
    ],
)
def test_collections_come_every_interval_after_the_start(run, start, interval, collected):
    posterior, diary = run(Swag(start=start, interval=interval, rank=6))
    for name, kept in posterior.snapshots.items():
        assert torch.equal(kept, torch.stack([diary.iterates[step - 1][name] for step in collected]))


def test_an_interval_that_is_left_open_collects_twice_k_times(run):
    posterior, diary = run(Swag(start=0, rank=2), max_steps=12)
    assert_moments(posterior, diary.iterates[2::3])  # 12 // 4 = 3
    assert len(diary.iterates[2::3]) == 4


def linear(step):
    """The Trainer's linear schedule with two steps of warm-up."""
    return PEAK * (step / 2 if step < 2 else (STEPS - step) / (STEPS - 2))


@pytest.mark.parametrize(("rate", "held"), [(None, PEAK / 10), (3e-3, 3e-3)])
@pytest.mark.parametrize(("start", "first"), [(5, 5), (0.5, 6), (0, 0)])
def test_the_rate_is_the_schedules_before_the_start_and_constant_after(run, start, first, rate, held):
    _, diary = run(Swag(start=start, interval=2, learning_rate=rate))
    wanted = [linear(step) if step < first else held for step in range(STEPS)]
    np.testing.assert_allclose(diary.rates, wanted, rtol=1e-12)


class StopAfter(TrainerCallback):
    """Ends a run after a step, as a time limit would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_a_resumed_run_has_the_rates_and_the_snapshots_of_the_whole_one(run, stop):
    method = Swag(start=4, interval=1, rank=4)
    whole, diary = run(method)
    save = {"save_strategy": "steps", "save_steps": 3}
    early = pytest.raises(InputError, match="collected 0 snapshots") if stop < 4 else nullcontext()
    with early:
        run(method, stop=StopAfter(stop), **save)
    resumed, rest = run(method, resume=True, **save)
    assert rest.rates == diary.rates[stop:]
    for part in ("mean", "variance", "snapshots"):
        assert same_params(getattr(resumed, part), getattr(whole, part))


def test_a_checkpoint_without_the_collected_moments_is_passed_over(run, tmp_path, caplog):
    whole, _ = run(Swag(start=2, interval=1))
    save = {"save_strategy": "steps", "save_steps": 3}
    run(Swag(start=2, interval=1), stop=StopAfter(6), **save)
    (tmp_path / "run" / "checkpoint-6" / "bayeslora_swag.safetensors").write_bytes(b"torn")
    resumed, _ = run(Swag(start=2, interval=1), resume=True, **save)
    assert "bayeslora_swag.safetensors has 4 bytes in the place of" in caplog.text
    assert f"goes on from {tmp_path / 'run' / 'checkpoint-3'}" in caplog.text
    assert same_params(resumed.mean, whole.mean)
    assert same_params(resumed.draw(0), whole.draw(0))


@pytest.mark.parametrize(("kind", "scale", "used"), [("full", None, 0.5), ("full", 1.0, 1.0), ("full", 0.0, 0.0)])
def test_the_scale_of_the_low_rank_kind_is_a_half_unless_given(run, kind, scale, used):
    posterior, _ = run(Swag(kind, start=2, interval=1, scale=scale))
    assert posterior.scale == used


def test_the_scale_of_the_diagonal_kind_multiplies_the_variance(run):
    posterior, diary = run(Swag("diagonal", start=2, interval=1, scale=0.25))
    assert_moments(posterior, diary.iterates[2:], scale=0.25)


@pytest.mark.parametrize(
    "method",
    [Swag(start=11, interval=1), Swag(start=4, interval=5), Swag(start=30), Swag("diagonal", start=11, interval=1)],
    ids=str,
)
def test_too_few_snapshots_are_refused_before_training(run, method):
    model = make_model()
    before = read(model)
    with pytest.raises(InputError, match="train longer, start earlier or collect more often"):
        run(method, model=model)
    assert same_params(read(model), before)


def test_swa_is_content_with_one_snapshot(run):
    posterior, diary = run(Swag("swa", start=11, interval=1))
    assert same_params(posterior.mean, diary.iterates[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "half"}, {"start": -1}, {"start": 1.0}, {"start": 2.5}, {"rank": 1}, {"interval": 0}, {"scale": -1.0},
        {"learning_rate": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        replace(Swag(), **settings)


def test_a_schedule_that_is_no_function_of_the_step_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(InputError, match="lr_scheduler_type"):
        hold(ReduceLROnPlateau(optimizer), 0, 0.1)
