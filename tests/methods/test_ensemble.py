"""The seeds of an ensemble's members, their order, and what an older version numbered otherwise."""

import json

import pytest
from support.tiny import arguments, make_model, make_task, same_params
from transformers import Trainer, TrainerCallback, set_seed

from bayeslora.comparison.cached_runs import CachedRuns, learned
from bayeslora.errors import InputError
from bayeslora.methods import Ensemble, Map
from bayeslora.methods.ensemble import member_seed
from bayeslora.methods.records import Record, remember
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import initialise, read
from bayeslora.posteriors import Point
from bayeslora.prediction.readouts import readout_for
from bayeslora.training.run import fit

TASK = make_task(readout="likelihood")


class StopAtError(Exception):
    """What the tests raise to leave in the middle."""


class StopAt(TrainerCallback):
    """Raises after so many steps of all runs together."""

    def __init__(self, step):
        self.left = step

    def on_step_end(self, *_, **__):
        self.left -= 1
        if not self.left:
            raise StopAtError


def seeds(seed, members, folder, **changes):
    args = arguments(folder, **({"seed": seed} | changes))
    return [Ensemble(members).member_arguments(args, k) for k in range(members)]


def test_ensembles_of_different_seeds_share_no_member(tmp_path):
    every = [own.seed for seed in range(100) for own in seeds(seed, 10, tmp_path)]
    assert len(set(every)) == 1000
    orders = [own.data_seed for seed in range(100) for own in seeds(0, 10, tmp_path, data_seed=seed)]
    assert len(set(orders)) == 1000
    assert {own.data_seed for own in seeds(5, 3, tmp_path)} == {None}


def test_the_first_member_has_the_ensembles_seed_and_all_seeds_serve_every_generator(tmp_path):
    for seed in (0, 3, 2**31 - 1):
        own = [args.seed for args in seeds(seed, 5, tmp_path)]
        assert own[0] == seed
        for one in own:
            assert 0 <= one < 2**31
            set_seed(one)


def test_members_are_in_the_order_of_their_numbers(tmp_path):
    model, method = make_model(), Ensemble(4)
    own = [args.seed for args in seeds(3, 4, tmp_path)]
    points = {seed: Point({name: value + k for name, value in read(model).items()}) for k, seed in enumerate(own)}
    assert own != sorted(own)
    remember(model, Record("ensemble", 24, {seed: points[seed] for seed in (own[2], own[0], own[3], own[1])}))
    assert [same_params(a.mean, points[s].mean) for a, s in zip(method.posterior(model).members, own, strict=True)] == [
        True
    ] * 4
    foreign = {seed: points[one] for seed, one in zip((9, 5, 7, 1), own, strict=True)}  # as they were trained
    remember(model, Record("ensemble", 24, foreign))
    assert [m.mean for m in method.posterior(model).members] == [points[one].mean for one in own]


def test_a_member_alone_is_that_of_the_ensemble(tokenizer, tmp_path):
    model = make_model(lora_dropout=0.1)
    whole = fit(model, TASK, Ensemble(2), arguments(tmp_path / "whole"), tokenizer=tokenizer)
    own = seeds(arguments(tmp_path).seed, 2, tmp_path / "alone")[1]
    initialise(model, own.seed)
    alone = fit(model, TASK, Map(), own, tokenizer=tokenizer)
    assert same_params(alone.mean, whole.members[1].mean)


@pytest.fixture
def begun(tokenizer, tmp_path):
    """An ensemble of two that broke off in its second member, and what goes on with it."""
    save = {"save_strategy": "steps", "save_steps": 2}

    def train(method, seed=3, *callbacks):
        args = arguments(tmp_path / "run", seed=seed, **save)
        model = make_model(lora_dropout=0.1)
        return fit(model, TASK, method, args, tokenizer=tokenizer, resume=True, callbacks=callbacks)

    with pytest.raises(StopAtError):
        train(Ensemble(2), 3, StopAt(8 + 5))
    return train


def test_going_on_with_other_seeds_is_refused(begun, tmp_path):
    with pytest.raises(InputError, match="begun with other seeds of its members"):
        begun(Ensemble(2), 4)
    (tmp_path / "run" / "members.json").unlink()  # an older version kept none
    with pytest.raises(InputError, match="as an older version gave them"):
        begun(Ensemble(2))


def test_a_damaged_list_of_members_is_named(begun, tmp_path):
    (tmp_path / "run" / "members.json").write_text('{"seeds": [[3, nu')
    with pytest.raises(InputError, match=r"members\.json cannot be read"):
        begun(Ensemble(2))


def test_an_ensemble_that_is_whole_is_read_whatever_its_seeds_were(begun, tmp_path):
    whole = begun(Ensemble(2))
    longer = begun(Ensemble(3))  # goes on with one member more
    assert [same_params(a.mean, b.mean) for a, b in zip(whole.members, longer.members, strict=False)] == [True, True]
    (tmp_path / "run" / "members.json").unlink()
    again = begun(Ensemble(3))
    assert all(same_params(a.mean, b.mean) for a, b in zip(again.members, longer.members, strict=True))


def test_a_member_in_ones_own_trainer_is_not_resumed_with_another_seed(tokenizer, tmp_path):
    model, method = make_model(), Ensemble(2)
    readout = readout_for(model, TASK.train, tokenizer)
    rows = readout.encode(TASK.train)[0]

    def train(own, *more, resume=False):
        kwargs = method.trainer_kwargs(model, len(rows))
        kwargs["callbacks"] += more
        with readout.attached(model):
            Trainer(model, own, train_dataset=rows, data_collator=readout.collate, compute_loss_func=answer_loss,
                    **kwargs).train(resume_from_checkpoint=resume)  # fmt: skip

    save = {"save_strategy": "steps", "save_steps": 2, "remove_unused_columns": False}
    own = seeds(3, 2, tmp_path, **save)[1]
    with pytest.raises(StopAtError):
        train(own, StopAt(5))
    other = seeds(4, 2, tmp_path, **save)[1]
    with pytest.raises(InputError, match=f"begun with seed {own.seed}, and this member has seed {other.seed}"):
        train(other, resume=True)
    mark = tmp_path / "member-1" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(mark.read_text())
    del state["stateful_callbacks"]["CheckpointState"]
    mark.write_text(json.dumps(state))
    with pytest.raises(InputError, match="begun with an older version"):
        train(own, resume=True)


def cached(tokenizer, out):
    args = arguments(out / "training", max_steps=2)
    return CachedRuns(make_model(), tokenizer, TASK, args, out, resamples=0, draws=2, report=lambda _: None)


def test_comparisons_of_different_seeds_share_no_run(tokenizer, tmp_path):
    assert len({member_seed(seed, k) for seed in range(50) for k in range(10)}) == 500
    own = cached(tokenizer, tmp_path)
    for seed in (0, 1):
        learned(own, Ensemble(2), seed)
    noted = [json.loads(log.read_text())["depends"]["seed"] for log in tmp_path.glob("seed-*/*/run.json")]
    assert sorted(noted) == sorted([0, 1, member_seed(0, 1), member_seed(1, 1)])
