"""Runs that are killed, signalled or gone on with by other settings, and runs of several processes."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.forked import in_ranks
from support.kills import METHODS, all_killed
from support.tiny import arguments, make_model, make_task, make_tokenizer, same_params
from transformers import Trainer, TrainerCallback

import bayeslora as bl
from bayeslora.comparison.cached_runs import CachedRuns, learned
from bayeslora.errors import InputError, Interrupted
from bayeslora.methods import Blob, Ensemble, Map, Swag
from bayeslora.methods.regularisers import answer_loss
from bayeslora.prediction.readouts import readout_for
from bayeslora.training.run import fit

TASK = make_task(readout="likelihood")
SAVE = {"save_strategy": "steps", "save_steps": 2}
SWAG = Swag(start=2, interval=1)


class StoppedError(Exception):
    """What breaks a run off."""


class At(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act()


def stop():
    raise StoppedError


@pytest.fixture
def train(tokenizer, tmp_path):
    """Train in a folder, or go on there."""

    def run(folder="run", method=SWAG, *callbacks, task=TASK, resume=False, start=None, **changes):
        model = make_model(lora_dropout=0.1)
        args = arguments(tmp_path / folder, **(SAVE | changes))
        return fit(model, task, method, args, tokenizer=tokenizer, resume=resume, callbacks=callbacks, start=start)

    return run


@pytest.fixture
def broken(train, tmp_path):
    """The folder of a run of SWAG that broke off after its checkpoints at steps 2, 4 and 6."""
    with pytest.raises(StoppedError):
        train("run", SWAG, At(7, stop))
    return tmp_path / "run"


@pytest.mark.parametrize("method", [Blob(), SWAG], ids=lambda m: m.name)
def test_what_a_method_has_learned_is_there_before_a_checkpoint_counts_as_complete(
    method, train, tmp_path, monkeypatch
):
    from transformers import TrainerState

    write, there = TrainerState.save_to_json, []

    def watched(self, path):
        there.append({p.name for p in Path(path).parent.iterdir()})
        write(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    train("run", method, save_total_limit=1)
    assert len(there) == 4
    assert all(f"bayeslora_{method.name}.safetensors" in names for names in there[1:])


DAMAGE = {
    "a file that is cut": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "a file that is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "an adapter that is cut": lambda folder: os.truncate(folder / "adapter_model.safetensors", 200),
    "a mark that is cut": lambda folder: os.truncate(folder / "trainer_state.json", 40),
    "no mark": lambda folder: (folder / "trainer_state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_complete_is_passed_over(damage, broken, caplog):
    DAMAGE[damage](broken / "checkpoint-6")
    assert bl.last_checkpoint(broken) == str(broken / "checkpoint-4")
    assert f"{broken / 'checkpoint-6'} is not complete and is passed over" in caplog.text


def test_bytes_that_changed_in_place_are_noticed(broken):
    path = broken / "checkpoint-6" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 400):  # more than the gaps between tensors
        data[place] ^= 255
    path.write_bytes(data)
    assert bl.last_checkpoint(broken) == str(broken / "checkpoint-4")


def test_a_run_goes_on_from_the_newest_complete_checkpoint_and_removes_the_other(broken, train, caplog):
    os.truncate(broken / "checkpoint-6" / "optimizer.pt", 100)
    (broken / "checkpoint-9").mkdir()
    resumed, whole = train(resume=True), train("whole")
    assert f"training goes on from {broken / 'checkpoint-4'}" in caplog.text
    assert not (broken / "checkpoint-9").exists()
    assert same_params(resumed.draw(0), whole.draw(0))


def test_a_run_without_a_complete_checkpoint_begins_anew_and_says_so(broken, train, caplog):
    for path in broken.glob("checkpoint-*"):
        (path / "rng_state.pth").unlink()
    resumed, whole = train(resume=True), train("whole")
    assert "training goes on from the start" in caplog.text
    assert same_params(resumed.draw(0), whole.draw(0))


def test_a_run_that_was_killed_after_its_last_step_takes_no_further_step(train):
    whole = train("whole", Map())  # 8 steps, in the middle of an epoch of 6
    again = train("whole", Map(), resume=True)
    assert same_params(again.mean, whole.mean)


def test_a_trainer_of_ones_own_refuses_a_checkpoint_that_lost_a_file(tokenizer, tmp_path):
    def run(resume, *more):
        model = make_model()
        readout = readout_for(model, TASK.train, tokenizer)
        rows = readout.encode(TASK.train)[0]
        args = arguments(tmp_path, remove_unused_columns=False, **SAVE)
        kwargs = Map().trainer_kwargs(model, len(rows))
        kwargs["callbacks"] += more
        with readout.attached(model):
            Trainer(model, args, train_dataset=rows, data_collator=readout.collate, compute_loss_func=answer_loss,
                    **kwargs).train(resume_from_checkpoint=resume)  # fmt: skip

    with pytest.raises(StoppedError):
        run(None, At(7, stop))
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(InputError, match=r"scheduler\.pt is missing; pass resume_from_checkpoint=bayeslora"):
        run(True)
    run(bl.last_checkpoint(tmp_path))


OTHERS = {
    "method.interval was 1 and is 2": {"method": replace(SWAG, interval=2)},
    "training.learning_rate was 0.01 and is 0.02": {"learning_rate": 0.02},
    "training.max_steps was 8 and is 12": {"max_steps": 12},
    "training.per_device_train_batch_size was 4 and is 2": {"per_device_train_batch_size": 2},
    "^(?!.*training).*seed was 3 and is 4": {"seed": 4},
    "rows was 24 and is 20; other training rows": {"task": make_task(readout="likelihood", rows=20)},
}


@pytest.mark.parametrize("said", OTHERS)
def test_going_on_with_other_settings_is_refused_and_the_difference_named(said, broken, train):
    with pytest.raises(InputError, match=said):
        train(resume=True, **OTHERS[said])


def test_what_is_logged_saved_and_evaluated_may_change(broken, train):
    resumed = train(
        resume=True, logging_strategy="steps", logging_steps=1, save_steps=3, save_total_limit=1, eval_strategy="epoch"
    )
    assert same_params(resumed.draw(0), train("whole").draw(0))


@pytest.mark.slow
def test_members_of_other_settings_are_refused_and_a_new_beginning_takes_none_of_them(train, tmp_path):
    with pytest.raises(StoppedError):
        train("run", Ensemble(2), At(7, stop))
    with pytest.raises(InputError, match=r"members\.json was written with other settings: training.learning_rate was"):
        train("run", Ensemble(2), resume=True, learning_rate=0.02)
    train("run", Ensemble(2))
    with pytest.raises(StoppedError):
        train("run", Ensemble(2), At(7, stop), learning_rate=0.02)
    resumed = train("run", Ensemble(2), resume=True, learning_rate=0.02)
    whole = train("whole", Ensemble(2), learning_rate=0.02)
    assert all(same_params(a.mean, b.mean) for a, b in zip(resumed.members, whole.members, strict=True))


def test_sigterm_writes_a_checkpoint_and_is_told_from_ctrl_c(train, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 6 with a checkpoint") as caught:
        train("run", Map(), At(5, lambda: signal.raise_signal(signal.SIGTERM)), save_strategy="no")
    assert caught.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert same_params(train("run", Map(), resume=True).mean, train("whole", Map()).mean)


def test_checkpoints_by_the_clock(train, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bayeslora.training.stopping.time.monotonic", lambda: now[0])

    def minute():
        now[0] += 61

    steps = [At(k, minute) for k in range(8)]
    train("run", Map(), bl.TimedCheckpoints(3), *steps, save_strategy="no")
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    with pytest.raises(InputError, match="minutes between checkpoints must be positive"):
        bl.TimedCheckpoints(0)


def test_a_comparison_keeps_no_checkpoint_of_a_run_that_is_done(tokenizer, tmp_path):
    args, timed = arguments(tmp_path / "training", max_steps=2), [bl.TimedCheckpoints(1e-9)]
    runs = CachedRuns(make_model(), tokenizer, TASK, args, tmp_path, report=lambda _: None, callbacks=timed)
    learned(runs, Map(), 0)
    assert len(list(tmp_path.rglob("run.json"))) == 1
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.slow
def test_killed_runs_of_every_method_go_on_unaided_to_the_unbroken_result():
    tallies = all_killed(len(METHODS), 1, watch=lambda _: None)  # half of them inside writes
    assert [tally.kills for tally in tallies] == [1] * len(METHODS)
    assert [fault for tally in tallies for fault in tally.faults] == []


@pytest.mark.slow
def test_two_processes_of_a_run_write_once_stop_at_the_same_step_and_go_on(tmp_path, monkeypatch):
    replace_file = os.replace

    def noted(one, other):
        (tmp_path / f"wrote-{os.environ['RANK']}").touch()
        replace_file(one, other)

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5 and args.process_index == 1 and args.output_dir.endswith("1"):
                signal.raise_signal(signal.SIGTERM)

    def train(folder, *callbacks, resume=False):
        args = arguments(tmp_path / folder, per_device_train_batch_size=2, **SAVE)
        posterior = fit(make_model(), TASK, Ensemble(2, SWAG), args, tokenizer=make_tokenizer(), resume=resume,
                        callbacks=callbacks)  # fmt: skip
        if os.environ["RANK"] == "0":
            posterior.save_pretrained(tmp_path / folder / "posterior")

    def resumed():
        train("run", resume=True)
        train("whole")

    monkeypatch.setattr(os, "replace", noted)
    ended = in_ranks(lambda: train("run", Press()))
    assert all("Interrupted: stopped at step 6 with a checkpoint" in said for _, said in ended), ended
    assert (tmp_path / "wrote-0").exists()
    ended = in_ranks(resumed)
    assert [status for status, _ in ended] == [0, 0], ended
    assert not (tmp_path / "wrote-1").exists()
    one, other = (bl.load_posterior(tmp_path / folder / "posterior") for folder in ("run", "whole"))
    for k in range(4):
        assert same_params(one.draw(k), other.draw(k))
    state = json.loads((tmp_path / "run" / "member-1" / "checkpoint-6" / "trainer_state.json").read_text())
    assert "bayeslora_swag.safetensors" in state["stateful_callbacks"]["CheckpointState"]["attributes"]["files"]
    assert torch.load(tmp_path / "run" / "member-1" / "checkpoint-6" / "rng_state_1.pth", weights_only=False)
