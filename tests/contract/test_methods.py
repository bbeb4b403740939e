"""What every method owes its user, on every kind of model."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from peft import PeftModel
from support.methods_table import DROPOUT, HEAD, LEARNERS, LM, PAIRS, TABLE
from support.tiny import CHECKPOINTING, arguments, same_params, same_state, state_of
from torch import nn
from transformers import TrainerCallback

from bayeslora.methods import METHODS, Blob, Ensemble
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import Draws, Linearised, Mixture, Point, Posterior
from bayeslora.posteriors.loading import export_draws, load_posterior
from bayeslora.prediction import predict
from bayeslora.training.run import fit

TRAINED_TWICE = [(row.name, kind) for kind in (LM, HEAD) for row in LEARNERS if kind in row.retrained]
"""For facts that need another training run: on one model, and some methods on the one that differs most."""


class StoppedError(Exception):
    """What the tests raise to leave in the middle."""


@pytest.fixture(params=PAIRS, ids="-".join)
def learned(request, learn):
    return learn(*request.param)


@pytest.fixture(params=TRAINED_TWICE, ids="-".join)
def trained(request, learn):
    return learn(*request.param)


def all_draws(posterior):
    """The mean and a few draws, whatever the family."""
    return [posterior.mean, *(posterior.draw(k, seed) for seed in (0, 1) for k in range(posterior.distinct or 4))]


def same_draws(one, other):
    return all(same_params(a, b) for a, b in zip(all_draws(one), all_draws(other), strict=True))


def names_reversed(value):
    """A posterior with every mapping in the opposite order."""
    if isinstance(value, dict):
        return {k: value[k] for k in reversed(value)}
    if isinstance(value, tuple):
        return tuple(map(names_reversed, value))
    if is_dataclass(value) and isinstance(value, Posterior):
        return replace(value, **{f.name: names_reversed(getattr(value, f.name)) for f in fields(value)})
    return value


def some_inputs(kind):
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model, kind):
    """Logits in evaluation mode; the training modes stay as they are."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    found = model(**some_inputs(kind)).logits
    for module, training in before.items():
        module.training = training
    return found


def test_every_method_is_in_the_table():
    assert METHODS.keys() <= TABLE.keys()


def test_a_draw_is_the_same_whenever_it_is_asked_for(learned):
    posterior = learned.posterior
    first = posterior.draw(2, 5)
    posterior.draw(0, 5), posterior.draw(7, 5), posterior.draw(2, 6), torch.randn(3)
    assert same_params(posterior.draw(2, 5), first)


def test_a_draw_leaves_the_global_generator_alone(learned):
    before = torch.get_rng_state()
    learned.posterior.draw(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_does_not_depend_on_the_order_of_names(learned):
    assert same_draws(names_reversed(learned.posterior), learned.posterior)


def test_different_draws_are_different_weights(learned):
    posterior = learned.posterior
    draws = [posterior.draw(k) for k in range(posterior.distinct or 4)]
    assert not any(same_params(a, b) for i, a in enumerate(draws) for b in draws[:i])
    if posterior.distinct is None:
        assert not same_params(posterior.draw(0, 0), posterior.draw(0, 1))


def test_draws_have_the_adapters_names_and_shapes_and_are_finite_float32(learned):
    own = lora_parameters(learned.model)
    for params in all_draws(learned.posterior):
        assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in own.items()}
        assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in params.values())


def test_applied_makes_the_model_the_draw_and_restores_it(learned):
    model, posterior = learned.model, learned.posterior
    before = state_of(model)
    for number in (None, 0, 1):
        wanted = posterior.mean if number is None else posterior.draw(number, 4)
        with posterior.applied(model, number, 4):
            cast = {name: wanted[name].to(p.dtype).float() for name, p in lora_parameters(model).items()}
            assert same_params(read(model), cast)
        assert same_state(model, before)


def test_applied_restores_after_an_exception_inside(learned):
    before = state_of(learned.model)
    with pytest.raises(StoppedError), learned.posterior.applied(learned.model, 1):
        raise StoppedError
    assert same_state(learned.model, before)


def test_applied_restores_after_an_exception_half_way_in_writing(learned):
    draw = learned.posterior.draw(1)
    *_, last = lora_parameters(learned.model)
    torn = Point(draw | {last: draw[last].to("meta")})  # a tensor without values cannot be copied
    before = state_of(learned.model)
    with pytest.raises(NotImplementedError), torn.applied(learned.model, None):
        raise AssertionError("the model was given weights that do not exist")
    assert same_state(learned.model, before)


@pytest.fixture
def half_in_training(learned):
    """A model whose modules are in different modes, as a user may have left them."""
    learned.model.train()
    next(m for name, m in learned.model.named_modules() if name.endswith("lora_dropout")).eval()
    yield learned
    learned.model.eval()


def test_predict_leaves_weights_modes_and_hooks_as_they_were(half_in_training, tokenizer):
    model = half_in_training.model
    before = state_of(model)
    predict(model, half_in_training.posterior, half_in_training.kind.task().test, draws=2, tokenizer=tokenizer)
    assert same_state(model, before)


def test_predict_restores_after_an_exception_in_a_batch(half_in_training, tokenizer):
    model, posterior = half_in_training.model, half_in_training.posterior
    calls = 0

    def fails(*_):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise StoppedError

    handle = model.get_input_embeddings().register_forward_hook(fails)
    before = state_of(model)
    test = half_in_training.kind.task().test
    with pytest.raises(StoppedError):
        predict(model, posterior, test, draws=4, tokenizer=tokenizer, token_budget=40)
    assert same_state(model, before)
    handle.remove()


def test_predictions_are_the_same_twice_and_have_a_row_per_draw(learned, tokenizer):
    model, posterior, test = learned.model, learned.posterior, learned.kind.task().test.take(range(5))
    one, two = (predict(model, posterior, test, draws=Draws(4, seed=3), tokenizer=tokenizer) for _ in range(2))
    assert torch.equal(one.log_probs, two.log_probs)
    linearised = isinstance(getattr(posterior, "members", [posterior])[0], Linearised)
    assert len(one.log_probs) == (256 if linearised else posterior.count(4))
    members = len(posterior.members) if isinstance(posterior, Mixture) else 0
    assert one.components == (tuple(k % members for k in range(one.draws)) if members else None)


def test_a_saved_posterior_has_the_same_draws_and_origin(learned):
    back = load_posterior(learned.folder)
    assert type(back) is type(learned.posterior)
    assert same_draws(back, learned.posterior)
    assert json.dumps(vars(back.origin), sort_keys=True) == json.dumps(vars(learned.posterior.origin), sort_keys=True)


def test_the_saved_mean_is_a_plain_peft_adapter(learned):
    plain = PeftModel.from_pretrained(learned.kind.base(), learned.folder)
    with learned.posterior.applied(learned.model, None):
        assert torch.equal(logits(plain, learned.kind), logits(learned.model, learned.kind))


def test_exported_draws_are_plain_peft_adapters(learned, tmp_path):
    folders = export_draws(learned.posterior, tmp_path / "draws", Draws(2, seed=9))
    assert len(folders) == learned.posterior.count(2)
    for number, folder in enumerate(folders):
        plain = PeftModel.from_pretrained(learned.kind.base(), folder)
        with learned.posterior.applied(learned.model, number, 9):
            assert torch.equal(logits(plain, learned.kind), logits(learned.model, learned.kind))


FRESH = """
import hashlib, sys
from bayeslora.posteriors.loading import load_posterior

def digest(posterior):
    found = hashlib.sha256()
    for name, value in sorted(posterior.draw(3, 8).items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()

if __name__ == "__main__":
    print(*(digest(load_posterior(folder)) for folder in sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_draw_is_the_same_in_another_process(learn):
    ours = [learn(name, LM if LM in row.kinds else row.kinds[0]) for name, row in TABLE.items()]
    command = [sys.executable, "-c", FRESH, *(str(one.folder) for one in ours)]
    there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    names = {"__name__": "here"}
    exec(FRESH, names)
    assert there.stdout.split() == [names["digest"](one.posterior) for one in ours]


class StopAt(TrainerCallback):
    """Raises in the middle of a run, as a crash would."""

    def __init__(self, step):
        self.left = step

    def on_step_end(self, *_, **__):
        self.left -= 1
        if not self.left:
            raise StoppedError


def again(learned, folder, tokenizer, *, dropout=True, **changes):
    """Train as the fixture did, on a model of its own, with changed arguments of the Trainer."""
    run = {key: changes.pop(key) for key in ("resume", "callbacks") if key in changes}
    model = learned.kind.build(lora_dropout=DROPOUT)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return fit(model, learned.kind.task(), learned.method, arguments(folder, **changes), tokenizer=tokenizer, **run)


def test_a_batch_in_parts_gives_the_same_posterior(trained, tokenizer, tmp_path):
    if isinstance(getattr(trained.method, "member", trained.method), Blob):
        pytest.skip("BLoB draws once for each forward pass, as in the paper, so more passes are other noise")
    # plain gradient descent: Adam would blow the rounding of small gradients up to whole steps
    same = {"optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.0}
    whole = again(trained, tmp_path / "1", tokenizer, dropout=False, **same)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parted = again(trained, tmp_path / "2", tokenizer, dropout=False, **same, **parts)
    for a, b in zip(all_draws(whole), all_draws(parted), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_posterior(trained, tokenizer, tmp_path):
    torch.manual_seed(12345)  # nor does it matter what the caller's generator was at
    checkpointed = again(trained, tmp_path, tokenizer, **{CHECKPOINTING: True})
    assert same_draws(checkpointed, trained.posterior)


def test_a_resumed_run_gives_the_uninterrupted_posterior(trained, tokenizer, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2}
    crash = 8 * (trained.method.members - 1) + 7 if isinstance(trained.method, Ensemble) else 7
    with pytest.raises(StoppedError):
        again(trained, tmp_path, tokenizer, callbacks=[StopAt(crash)], **save)
    resumed = again(trained, tmp_path, tokenizer, resume=True, **save)
    assert same_draws(resumed, trained.posterior)
