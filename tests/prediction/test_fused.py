"""Fused LoRA layers answer and learn as PEFT's own do, and leave a model as it was."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft.tuners import lora
from support.tiny import arguments, gaussian, make_model, make_split, make_task, same_state, state_of
from torch import nn
from transformers import TrainerCallback

import bayeslora as bl
from bayeslora.params import lora_parameters, swapped, write
from bayeslora.posteriors import Draws, Point
from bayeslora.posteriors.dropout import TokenDropout
from bayeslora.prediction import fused as module
from bayeslora.prediction import predict
from bayeslora.prediction.fused import FusedLinear, fused, in_base_dtype
from bayeslora.prediction.readouts import readout_for
from bayeslora.prediction.stacking import stacked
from bayeslora.training import trainer

IDS = torch.arange(3, 27).view(2, 12)
ADAPTERS = {
    "q, v": {},
    "all linear": {"target_modules": "all-linear", "r": 16},
    "scaled": {"lora_alpha": 5},
    "bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "DoRA": {"use_dora": True},
}


@pytest.fixture
def multiplies_bf16(monkeypatch):
    """Take the machine for one that multiplies bfloat16."""
    monkeypatch.setattr(module, "fast_dtype", lambda _: torch.bfloat16)


def drawn(dtype=torch.float32, **adapter):
    """A model whose adapter says something, and its parameters."""
    kind = "qwen2" if "lora_bias" in adapter else "llama"  # which has biases below the adapter's
    model = make_model(kind, dtype, **adapter)
    write(model, gaussian(model).draw(0))
    return model


def logits_and_gradients(model):
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    model.zero_grad()
    return logits.detach(), gradients


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_and_gradients_are_those_of_pefts_layers(adapter):
    model = drawn(**adapter)
    wanted, slopes = logits_and_gradients(model)
    with fused(model):
        found, gradients = logits_and_gradients(model)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for name, slope in slopes.items():
        torch.testing.assert_close(gradients[name], slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_without_gradients_are_those_of_pefts_layers(adapter):
    model = drawn(**adapter)
    with torch.inference_mode():
        wanted = model(input_ids=IDS).logits
        with fused(model):
            found = model(input_ids=IDS).logits
            with model.disable_adapter():
                bare = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(bare, model(input_ids=IDS).logits)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, bare, atol=1e-3)


def test_hooks_on_the_matrices_are_heard():
    model, seen = drawn(), []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
        matrix.register_forward_hook(lambda module, *_: seen.append(tuple(module.weight.shape)))
    with fused(model):
        model(input_ids=IDS)
    assert len(seen) == 2


def test_other_adapters_of_the_model_are_as_before():
    model = drawn()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with fused(model), torch.inference_mode():
        found = model(input_ids=IDS).logits
    with model.disable_adapter(), torch.inference_mode():
        torch.testing.assert_close(found, model(input_ids=IDS).logits)


def test_layers_have_their_class_again_after_an_exception():
    model = drawn()
    before = state_of(model)
    with fused(model):
        with pytest.raises(KeyboardInterrupt), fused(model):
            raise KeyboardInterrupt
        assert any(type(m) is FusedLinear for m in model.modules())  # those of the outer block are as before
    with pytest.raises(KeyboardInterrupt), fused(model):
        raise KeyboardInterrupt
    assert not any(type(m) is FusedLinear for m in model.modules())
    assert same_state(model, before)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["q, v", "all linear"])
def test_predictions_are_those_of_pefts_layers(targets, tokenizer):
    model = make_model("llama", target_modules=targets)
    posterior, split = gaussian(model), make_split("test", 5, 2, classes=False, readout="likelihood")
    readout = readout_for(model, split, tokenizer)
    batch = readout.collate(readout.encode(split)[0])
    batch.pop("labels")
    found = predict(model, posterior, split, Draws(3, seed=1), tokenizer=tokenizer)
    with readout.attached(model), torch.inference_mode():
        for k in range(3):
            with swapped(model, posterior.draw(k, 1)):
                wanted = model(**batch).logits.log_softmax(-1)
            torch.testing.assert_close(found.log_probs[k], wanted, rtol=0, atol=2e-5)


def test_draws_are_in_the_dtype_of_a_half_precision_base(multiplies_bf16):
    model = drawn(torch.bfloat16)
    posterior = gaussian(model)
    linear = next(m for m in model.modules() if isinstance(m, lora.Linear))
    kinds = set()
    linear.lora_A["default"].register_forward_hook(lambda module, args, out: kinds.add((args[0].dtype, out.dtype)))
    before = state_of(model)
    for count in (1, 2):
        with torch.inference_mode(), stacked(model, [posterior.draw(k) for k in range(count)]):
            weight = linear.lora_A["default"].weight
            assert weight.dtype == linear.lora_B["default"].weight.dtype == torch.bfloat16
            model(input_ids=IDS)
    assert kinds == {(torch.bfloat16, torch.bfloat16)}
    assert same_state(model, before)


def test_a_base_in_float32_keeps_exact_draws():
    model = drawn()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    with in_base_dtype(model):
        assert all(m.weight is w for m, w in zip((m for m in model.modules() if isinstance(m, nn.Linear)), weights, strict=True))  # fmt: skip  # noqa: E501


@pytest.mark.slow
def test_rounding_of_draws_to_bfloat16_is_below_that_of_the_base(multiplies_bf16):
    half = make_model("llama", torch.bfloat16, target_modules="all-linear")
    exact, posterior = copy.deepcopy(half).float(), gaussian(half)
    rounded = []
    for k in range(64):
        draw = [posterior.draw(k)]
        with torch.inference_mode(), swapped(exact, draw[0]):
            wanted = exact(input_ids=IDS).logits.log_softmax(-1)
        gaps = []
        for peft in (True, False):
            with torch.inference_mode(), stacked(half, draw, peft=peft):
                gaps.append((half(input_ids=IDS).logits.float().log_softmax(-1) - wanted).square().mean())
        rounded.append(torch.stack(gaps))
    in_float32, in_bfloat16 = torch.stack(rounded).T
    # squares; a typical draw, for a few lie where a norm divides by almost nothing and rounding of any kind is large
    assert (in_bfloat16 / in_float32).median() < 2  # the draws' rounding adds less than that of the base's activations


def test_draws_stay_in_float32_where_a_cpu_only_imitates_the_bases_dtype(monkeypatch):
    monkeypatch.setattr(module, "fast_dtype", lambda _: torch.float32)
    model = drawn(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with stacked(model, [gaussian(model).draw(0)]):
        assert layer.lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_token_by_token_is_at_work(multiplies_bf16, dtype, tokenizer):
    model = drawn(dtype)
    mean = {name: p.detach().float().clone() for name, p in lora_parameters(model).items()}
    split = make_split("test", 5, 2, classes=False, readout="letters")
    plain = predict(model, Point(mean), split, tokenizer=tokenizer)
    dropped = predict(model, TokenDropout(mean, 0.5), split, 2, tokenizer=tokenizer)
    assert not torch.allclose(dropped.log_probs[0], plain.log_probs[0], atol=1e-3)
    assert not torch.equal(dropped.log_probs[0], dropped.log_probs[1])


@pytest.mark.parametrize(
    "method", [bl.Map(), bl.Ivon(), bl.Blob(), bl.Ensemble(2, together=True)], ids=lambda m: m.name
)
def test_training_has_the_losses_of_pefts_layers(method, monkeypatch, tokenizer, tmp_path):
    losses = []
    for way in (fused, lambda _: nullcontext()):
        monkeypatch.setattr(trainer, "fused", way)
        history = []

        class Note(TrainerCallback):
            def on_log(self, args, state, control, logs, history=history, **_):
                history += [logs["loss"]] if "loss" in logs else []

        model = make_model(target_modules="all-linear")
        args = arguments(tmp_path / str(len(losses)), max_steps=12, logging_strategy="steps", logging_steps=1)
        bl.fit(model, make_task(), method, args, tokenizer=tokenizer, callbacks=[Note()])
        losses.append(history)
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] != losses[0][0]
