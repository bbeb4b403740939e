"""A trial of what a model allows: its outcome is kept, and a lack of memory is no outcome."""

import math
from contextlib import contextmanager

import pytest
import torch
from support.tiny import gaussian, make_model, make_split

from bayeslora.prediction import predict
from bayeslora.prediction.fused import StackedLinear
from bayeslora.prediction.generation.averaging import answering
from bayeslora.prediction.probes import tried


@contextmanager
def stacked_passes(model, failing):
    """The number of draws of each stacked pass; so many of the passes run out of memory."""
    layer, seen = model.base_model.model.model.layers[1], list[int]()

    def before(*_):
        adapter = layer.self_attn.q_proj.lora_A["default"]
        if isinstance(adapter, StackedLinear):
            seen.append(len(adapter.weight))
            if len(seen) <= failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = layer.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        handle.remove()


def answers(model, tokenizer):
    split = make_split("test", 5, 2, classes=False, readout="letters")
    return predict(model, gaussian(model), split, 3, tokenizer=tokenizer).log_probs


def test_a_trial_that_runs_out_of_memory_once_is_made_again(tokenizer):
    model = make_model()
    with stacked_passes(model, failing=1) as seen:
        answers(model, tokenizer)
    assert max(seen) == 4  # three draws and the mean


def test_a_lack_of_memory_is_not_remembered_as_a_trait_of_the_model(tokenizer, caplog):
    model = make_model()
    with stacked_passes(model, failing=math.inf) as seen:
        short = answers(model, tokenizer)
    assert seen == [2, 2]  # the trial and its repetition; then one draw a pass
    assert "one by one this time" in caplog.text
    with stacked_passes(model, failing=0) as seen:
        roomy = answers(model, tokenizer)
    assert max(seen) == 4
    torch.testing.assert_close(short, roomy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("words", [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 9 GB)",
])  # fmt: skip
def test_a_lack_of_memory_is_known_in_every_librarys_words(words):
    model, made = torch.nn.Linear(1, 1), []

    def trial():
        made.append(None)
        if len(made) <= 2:
            raise RuntimeError(words)
        return True

    assert not tried(model, "something", trial)
    assert tried(model, "something", trial)


def test_generation_that_runs_out_of_memory_does_not_blame_the_adapter():
    model = make_model()
    drawn = [gaussian(model).draw(k) for k in range(2)]
    with (
        stacked_passes(model, failing=math.inf),
        pytest.raises(torch.OutOfMemoryError),
        answering(model, drawn, average=True),
    ):
        pass
    with answering(model, drawn, average=True) as averager:
        assert averager.draws == 2


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("x"), None])
def test_other_outcomes_are_kept_with_the_model(error):
    model, made = torch.nn.Linear(1, 1), []

    def trial():
        made.append(None)
        if error is not None:
            raise error
        return True

    for _ in range(2):
        assert tried(model, "something", trial) is (error is None)
    assert len(made) == 1
