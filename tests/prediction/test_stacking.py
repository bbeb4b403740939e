"""Draws stacked in one pass answer as draws one after the other, for every model, readout and family."""

from contextlib import contextmanager

import pytest
import torch
from support.around import AROUND, diagonal
from support.tiny import make_model, make_split, same_state, state_of

from bayeslora.errors import InputError
from bayeslora.params import read
from bayeslora.posteriors import (
    Draws,
    Point,
)
from bayeslora.posteriors.transforms import restricted
from bayeslora.prediction import PassOptions, memory, predict
from bayeslora.prediction.batching import grouped, schedule
from bayeslora.prediction.fused import StackedLinear
from bayeslora.prediction.stacking import layers_that_differ


@contextmanager
def counted():
    """Passes of stacked layers: the number of draws, and the rows that came in."""
    found = []
    forward = StackedLinear.forward

    def counting(self, input):
        found.append((len(self.weight), len(input)))
        return forward(self, input)

    StackedLinear.forward = counting
    try:
        yield found
    finally:
        StackedLinear.forward = forward


def tolerance(kind):
    return {"rtol": 0, "atol": 0.05 if kind.dtype == torch.bfloat16 else 2e-5}


@pytest.mark.parametrize("family", AROUND)
def test_stacked_draws_answer_as_the_loop_does(family, kind, tokenizer):
    model = kind.build()
    posterior, split = AROUND[family](model), kind.task().test
    before = state_of(model)
    with counted() as calls:
        together = predict(model, posterior, split, Draws(4, seed=3), tokenizer=tokenizer, token_budget=400)
    assert same_state(model, before)
    assert any(count > 2 for count, _ in calls) == (family != "point")
    one_by_one = predict(
        model,
        posterior,
        split,
        Draws(4, seed=3),
        tokenizer=tokenizer,
        token_budget=400,
        options=PassOptions(stack=False),
    )
    for name in ("log_probs", "mean_log_probs"):
        torch.testing.assert_close(getattr(together, name), getattr(one_by_one, name), **tolerance(kind))
    again = predict(model, posterior, split, Draws(4, seed=3), tokenizer=tokenizer, token_budget=400)
    assert torch.equal(again.log_probs, together.log_probs)


def test_layers_before_the_first_noisy_one_see_the_batch_once(kind, tokenizer):
    model, split = kind.build(), kind.task().test
    posterior, rows = restricted(diagonal(model), 1), []
    noisy = frozenset(posterior.variance) & {n for n in posterior.variance if ".1." in n}
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
    assert layers_that_differ(model, noisy) == list(layers)[1:]
    handle = layers[0].register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True)  # fmt: skip  # noqa: E501
    with counted() as calls:
        predict(model, posterior, split, 3, tokenizer=tokenizer, token_budget=10_000)
    handle.remove()
    assert rows[-1] * 4 == calls[-1][1]  # three draws and the mean


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_any_module_may_be_adapted_those_without_linear_adapters_go_one_by_one(targets, tokenizer):
    model = make_model("llama", target_modules=targets)
    posterior, split = diagonal(model), make_split("test", 5, 2, classes=False, readout="likelihood")
    with counted() as calls:
        together = predict(model, posterior, split, 3, tokenizer=tokenizer)
    assert bool(calls) == ("embed_tokens" not in targets)
    one_by_one = predict(model, posterior, split, 3, tokenizer=tokenizer, options=PassOptions(stack=False))
    torch.testing.assert_close(together.log_probs, one_by_one.log_probs, rtol=0, atol=2e-5)


def test_a_model_that_mixes_its_rows_is_not_stacked(tokenizer):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="letters")
    layer = model.base_model.model.model.layers[0]
    layer.register_forward_hook(lambda _, __, out: (out[0] if isinstance(out, tuple) else out).flip(0))
    with counted() as calls:
        predict(model, diagonal(model), split, 3, tokenizer=tokenizer, token_budget=30)
    tried = len(calls)
    predict(model, diagonal(model), split, 3, tokenizer=tokenizer, token_budget=30)
    assert all(count == 2 for count, _ in calls)  # the trial, and nothing else
    assert len(calls) == tried  # which is made once


def test_the_model_is_restored_after_an_exception_in_a_batch(tokenizer):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="letters")
    before = state_of(model)

    def fail(*_):
        if isinstance(model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"], StackedLinear):
            raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        predict(model, restricted(diagonal(model), 1), split, 3, tokenizer=tokenizer)
    handle.remove()
    assert same_state(model, before)


def test_a_batch_too_large_for_memory_is_halved_with_a_notice(tokenizer, caplog):
    model, split = make_model("llama"), make_split("test", 9, 2, classes=False, readout="letters")
    posterior = diagonal(model)
    wanted = predict(model, posterior, split, 5, tokenizer=tokenizer)
    sizes = []

    def limited(most):
        def fail(_, args):
            sizes.append(args[0].numel())
            if args[0].numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return model.base_model.model.model.layers[0].mlp.register_forward_pre_hook(fail)

    one = 32 * 40  # numbers in a row of forty tokens
    handle = limited(2 * one)  # fewer than the draws of a single row
    found = predict(model, posterior, split, 5, tokenizer=tokenizer)
    handle.remove()
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=0, atol=2e-5)
    assert "it is halved" in caplog.text
    handle = limited(32)
    with pytest.raises(InputError, match=r"example \d+ has \d+ tokens and does not fit into memory"):
        predict(model, Point(read(model)), split, tokenizer=tokenizer)
    handle.remove()


def test_other_errors_of_a_batch_are_not_swallowed(tokenizer):
    model, split = make_model("llama"), make_split("test", 3, 2, classes=False, readout="letters")

    def fail(*_):
        raise RuntimeError("something else")

    model.base_model.model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        predict(model, Point(read(model)), split, tokenizer=tokenizer)


def test_stacks_are_no_larger_than_a_quarter_of_the_model_or_what_any_machine_has(tokenizer):
    model = make_model("llama", r=16, target_modules="all-linear")
    base, own = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in read(model).values())
    assert base // (4 * own) < 2  # this adapter is large for its base, and small for a machine
    assert memory.max_stacked(model, read(model)) == 2**28 // (4 * own)
    with torch.device("meta"):
        large = {"weight": torch.empty(2**13, 2**12)}
    assert memory.max_stacked(model, large) == 2
    assert memory.max_stacked(model, large | {"other": large["weight"], "third": large["weight"]}) == 1


def test_every_example_is_in_one_batch_within_the_budget():
    lengths = [3, 50, 7, 7, 120, 400, 1, 33]
    for most in (1, 3, 10):
        plan = schedule(lengths, 100, most, 1000)
        places = [place for batches in plan.values() for group in batches for place in group]
        assert sorted(places) == list(range(8))
        assert max(plan) <= most
        for width, batches in plan.items():
            for group in batches:
                longest = max(lengths[p] for p in group)
                assert width * len(group) * longest <= 100 or (width == len(group) == 1)
    assert schedule(lengths, 10**6, 10, 10**6) == {10: [[5, 4, 1, 7, 2, 3, 0, 6]]}


def test_the_token_budget_follows_the_free_memory_of_a_gpu(monkeypatch):
    model = make_model("llama", torch.bfloat16)
    assert memory.default_token_budget(model) == 2048
    monkeypatch.setattr(memory, "device_of", lambda _: torch.device("cuda"))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    one = 2 * (10 * 32 + 3 * 48 + 2 * 32 * 2) + 10 * 80  # bytes of a token
    for free, wanted in ((2 * 300 * one, 300), (0, 1), (10**12, memory.GPU_BUDGET)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**12))
        assert memory.default_token_budget(model) == wanted


def test_the_longest_examples_come_first():
    assert grouped([5, 9, 1], 18, 100) == [[1, 0], [2]]
    assert grouped([5, 9, 1], 2, 100) == [[1], [0], [2]]


def test_a_batch_ends_before_its_padding_costs_more_than_another_batch():
    lengths = [50, 49, 48, 20, 19, 5]
    assert grouped(lengths, 10**6, 3) == [[0, 1, 2], [3, 4], [5]]
    assert grouped(lengths, 10**6, 63) == [[0, 1, 2, 3], [4, 5]]
    assert schedule(lengths, 10**6, 2, 6) == {2: [[0, 1, 2], [3, 4], [5]]}  # for both draws together


def test_stacked_layers_have_each_rows_of_their_own():
    layer = StackedLinear(torch.tensor([[[1.0]], [[10.0]]]), torch.tensor([[0.0], [5.0]]))
    assert layer(torch.ones(4, 3, 1)).flatten().tolist() == [1.0] * 6 + [15.0] * 6


def test_prediction_is_the_same_inside_inference_mode(tokenizer):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="likelihood")
    wanted = predict(model, diagonal(model), split, 3, tokenizer=tokenizer)
    with torch.inference_mode():
        found = predict(model, diagonal(model), split, 3, tokenizer=tokenizer)
    assert torch.equal(found.log_probs, wanted.log_probs)
