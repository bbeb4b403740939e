"""Tasks that cannot be trained on, and runs that break off."""

import gc
import signal
import weakref
from dataclasses import replace

import pytest
import torch
from support.tiny import arguments, make_model, make_task, same_params
from transformers import TrainerCallback

from bayeslora.errors import InputError, Interrupted
from bayeslora.methods import Blob, Ensemble, Ivon, Map, Swag
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import Point
from bayeslora.training.run import fit

LM_TASK = make_task(readout="likelihood")


def unlabelled(split, row):
    examples = list(split)
    examples[row] = replace(examples[row], label=None)
    return replace(split, examples=tuple(examples))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (replace(LM_TASK, train=None), "has no training examples"),
        (replace(LM_TASK, train=LM_TASK.train.take([])), "has no training examples"),
        (replace(LM_TASK, train=unlabelled(LM_TASK.train, 3)), "row 3 of bags/train has no label"),
    ],
    ids=["no train", "empty", "label"],
)  # fmt: skip
def test_a_task_that_cannot_be_trained_on_is_refused(task, said, tokenizer, tmp_path):
    with pytest.raises(InputError, match=said):
        fit(make_model(), task, Map(), arguments(tmp_path), tokenizer=tokenizer)


def test_evaluating_in_training_on_rows_without_labels_is_refused(tokenizer, tmp_path):
    task = replace(LM_TASK, validation=unlabelled(LM_TASK.validation, 2))
    with pytest.raises(InputError, match="row 2 of bags/validation has no label"):
        fit(make_model(), task, Map(), arguments(tmp_path, eval_strategy="epoch"), tokenizer=tokenizer)


@pytest.mark.parametrize("method", [Map(), Ensemble(2)], ids=lambda m: m.name)
def test_a_number_of_starts_that_is_not_the_number_of_runs_is_refused(method, tokenizer, tmp_path):
    starts = [Point(read(make_model()))] * 3
    with pytest.raises(InputError, match="3 starts were given"):
        fit(make_model(), LM_TASK, method, arguments(tmp_path), tokenizer=tokenizer, start=starts)


class Press(TrainerCallback):
    """Ctrl-C, so many times in one step."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            for _press in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("method", [Swag(start=2, interval=1), Map(), Ensemble(2, Map())], ids=lambda m: m.name)
def test_ctrl_c_writes_a_checkpoint_from_which_the_uninterrupted_result_follows(method, tokenizer, tmp_path):
    def train(folder, **more):
        model = make_model(lora_dropout=0.1)
        return fit(model, LM_TASK, method, arguments(tmp_path / folder), tokenizer=tokenizer, **more)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 6 with a checkpoint"):
        train("stopped", callbacks=[Press(5)])
    assert signal.getsignal(signal.SIGINT) is handler
    resumed, whole = train("stopped", resume=True), train("whole")
    for k in range(3):
        assert same_params(resumed.draw(k), whole.draw(k))


def test_a_second_ctrl_c_stops_at_once(tokenizer, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(
            make_model(), LM_TASK, Map(), arguments(tmp_path), tokenizer=tokenizer, callbacks=[Press(3, times=2)]
        )  # fmt: skip
    assert caught.type is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("method", [Map(kl=0.5), Swag()], ids=lambda m: m.name)
def test_a_run_that_breaks_off_leaves_no_hook_in_the_model(method, tokenizer, tmp_path):
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, LM_TASK, method, arguments(tmp_path), tokenizer=tokenizer, callbacks=[Press(3, times=2)])
    gc.collect()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("method", [Blob(), Ivon(), Swag(), Map(kl=0.5), Ensemble(2)], ids=lambda m: m.name)
def test_a_run_that_breaks_off_does_not_keep_its_model_alive(method, tokenizer, tmp_path):
    model = make_model()
    there = weakref.ref(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, LM_TASK, method, arguments(tmp_path), tokenizer=tokenizer, callbacks=[Press(3, times=2)])
    del model
    gc.collect()
    assert there() is None


class StopAfter(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("method", [Ivon(), Blob(), Swag(start=2, interval=1)], ids=lambda m: m.name)
def test_a_run_with_an_adapter_in_bf16_is_resumed_to_the_uninterrupted_result(method, tokenizer, tmp_path):
    def train(folder, *callbacks, resume=False):
        model = make_model(dtype=torch.bfloat16)
        for p in lora_parameters(model).values():
            p.data = p.data.bfloat16()
        args = arguments(tmp_path / folder, save_strategy="steps", save_steps=2)
        return fit(model, LM_TASK, method, args, tokenizer=tokenizer, resume=resume, callbacks=callbacks)

    whole = train("whole")
    stopped = train("parts", StopAfter(4))
    resumed = train("parts", resume=True)
    assert same_params(resumed.mean, whole.mean)
    assert same_params(resumed.draw(0), whole.draw(0))
    assert not any(torch.equal(value, stopped.mean[name]) for name, value in resumed.mean.items())
