"""Members of an ensemble that are trained in one pass are those of separate runs."""

from pathlib import Path

import pytest
import torch
from support.tiny import arguments, make_model, make_task, same_state, state_of
from transformers import TrainerCallback

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Map, Swag
from bayeslora.params import read

LONG = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 3}


def sober(kind):
    """A model without dropout of its own."""
    model = make_model(kind)
    for module in model.modules():
        for attribute in ("p", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def members(kind, method, folder, tokenizer, readout="auto", **more):
    model = sober(kind)
    task = make_task(classes=kind == "bert", readout=readout)
    found = bl.fit(model, task, method, arguments(folder, **LONG, **more), tokenizer=tokenizer)
    return [member.mean for member in found.members]


CASES = {
    "llama": ("llama", Map(), {}),
    "llama-likelihood": ("llama", Map(), {"readout": "likelihood"}),
    "gpt2-accumulated": ("gpt2", Map(), {"gradient_accumulation_steps": 2}),
    "bert-head": ("bert", Map(), {}),
    "clipped": ("llama", Map(), {"max_grad_norm": 0.05}),
    "unclipped": ("llama", Map(), {"max_grad_norm": 0.0}),
    "regularised": ("llama", Map(weight_decay_b=3.0, kl=0.5), {}),
    "own-data-seed": ("llama", Map(), {"data_seed": 11}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_members_are_those_of_separate_runs(case, tokenizer, tmp_path):
    kind, member, more = CASES[case]
    apart = members(kind, Ensemble(3, member), tmp_path / "apart", tokenizer, **more)
    joint = members(kind, Ensemble(3, member, together=True), tmp_path / "joint", tokenizer, **more)
    for one, other in zip(apart, joint, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=2e-3, atol=2e-5)
    assert any((joint[0][name] - joint[1][name]).abs().max() > 1e-3 for name in joint[0])


def test_a_run_that_breaks_off_is_resumed_and_leaves_the_model_as_it_was(tokenizer, tmp_path):
    method, task = Ensemble(2, together=True), make_task()

    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 9:
                raise KeyboardInterrupt

    whole = members("llama", method, tmp_path / "whole", tokenizer)
    model, args = make_model(), arguments(tmp_path / "broken", **LONG, save_strategy="steps", save_steps=4)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyboardInterrupt):
        bl.fit(model, task, method, args, tokenizer=tokenizer, callbacks=[Breaks()])
    assert [name for name, _ in model.named_parameters()] == names
    assert all(value.ndim == 2 for value in read(model).values())
    resumed = bl.fit(model, task, method, args, tokenizer=tokenizer, resume=True)
    for one, other in zip(whole, resumed.members, strict=True):
        for name in one:
            torch.testing.assert_close(other.mean[name], one[name])
    before = state_of(model)
    again = bl.fit(model, task, method, args, tokenizer=tokenizer, resume=True)  # nothing is left to train
    assert same_state(model, before)
    torch.testing.assert_close(again.members[1].mean, resumed.members[1].mean)


def test_the_loss_in_evaluation_is_the_members_mean(tokenizer, tmp_path):
    seen = {}

    class Notes(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **_):
            seen.setdefault(Path(args.output_dir).parent.name, []).append(metrics["eval_loss"])

    for together in (False, True):
        args = arguments(tmp_path / str(together), **LONG, eval_strategy="epoch")
        method = Ensemble(2, together=together)
        bl.fit(make_model(), make_task(), method, args, tokenizer=tokenizer, callbacks=[Notes()])
    first, second, third, fourth = seen["False"]
    assert seen["True"] == pytest.approx([(first + third) / 2, (second + fourth) / 2], rel=1e-4)


def test_what_cannot_share_a_pass_is_refused_in_words(tokenizer, tmp_path):
    with pytest.raises(InputError, match="must be points"):
        Ensemble(2, Swag(), together=True)
    with pytest.raises(InputError, match="stop early"):
        Ensemble(2, Map(early_stopping=1), together=True)
    with pytest.raises(InputError, match=r"bayeslora\.fit only"):
        Ensemble(2, together=True).trainer_kwargs(make_model(), 5)
    for more, said in (
        ({"optim": "adafactor"}, "optimiser adafactor"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
    ):
        with pytest.raises(InputError, match=said):
            members("llama", Ensemble(2, together=True), tmp_path, tokenizer, **more)
    args = arguments(tmp_path)
    embedded = make_model("llama", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match="outside of linear layers"):
        bl.fit(embedded, make_task(), Ensemble(2, together=True), args, tokenizer=tokenizer)
