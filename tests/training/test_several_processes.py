"""Training in two processes is training in one on the joint batch, by DDP and by FSDP 2."""

import os

import pytest
import torch
from support.forked import in_ranks
from support.fsdp import sharded_models
from support.tiny import arguments, make_model, make_task, make_tokenizer
from transformers import TrainerCallback

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ensemble, Ivon, Laplace, Map, Swag
from bayeslora.training.run import fit

pytestmark = pytest.mark.slow

TASK = make_task(readout="likelihood", rows=23)  # the last batch has 3 rows of 4, or 2 and 1 of 2
METHODS = {
    "map": Map(kl=0.1, weight_decay=0.1),
    "swag": Swag(start=2, interval=1),
    "ivon": Ivon(sigma0=0.05, max_step=1e-2),
    "ivon, empirical": Ivon(sigma0=0.05, max_step=1e-2, temperature=0.1, prior="empirical"),
    "blob": Blob(),
    "blob, elbo": Blob(update="elbo"),
    "ensemble": Ensemble(2, Swag(start=2, interval=1)),
    "together": Ensemble(2, together=True),
}


def train(name, model, args, **more):
    return fit(model, TASK, METHODS[name], args, tokenizer=make_tokenizer(), **more)


def learned(folder, **changes):
    """Return mean and noise of what each method learns."""
    found = {}
    for name in METHODS:
        if name == "together" and changes.get("use_cpu") is False:
            continue  # refused, see below
        args = arguments(folder / name, max_steps=8, **changes)
        posterior = train(name, make_model(), args)
        found |= {f"{name}, mean, {key}": value for key, value in posterior.mean.items()}
        found |= {f"{name}, draw, {key}": value for key, value in posterior.draw(1).items()}
    return found


def compared(tmp_path, ranks):
    ended = in_ranks(ranks)
    assert [status for status, _ in ended] == [0, 0], ended
    one, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = learned(tmp_path / "alone", per_device_train_batch_size=4)
    assert all(torch.equal(value, others[0][name]) for name, value in one.items())
    for name, value in one.items():
        torch.testing.assert_close(
            value, alone[name], rtol=1e-4, atol=2e-6, msg=lambda words, name=name: f"{name}: {words}"
        )
    return one


def test_two_processes_learn_what_one_does_by_ddp(tmp_path):
    def ranks():
        found = learned(tmp_path / "two", per_device_train_batch_size=2)
        torch.save(found, tmp_path / f"{os.environ['RANK']}.pt")

    assert {name.rpartition(", ")[0].rpartition(", ")[0] for name in compared(tmp_path, ranks)} == set(METHODS)


def test_two_processes_learn_what_one_does_by_fsdp_2_and_go_on_from_a_checkpoint(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                raise InterruptedError

    def ranks():
        shared = {"per_device_train_batch_size": 2, "use_cpu": False}
        with sharded_models():
            found = learned(tmp_path / "two", **shared)
            for name in ("swag", "ivon", "blob, elbo"):
                args = arguments(tmp_path / f"resumed-{name}", save_strategy="steps", save_steps=2, **shared)
                with pytest.raises(InterruptedError):
                    train(name, make_model(), args, callbacks=[Stop()])
                model = make_model()
                posterior = train(name, model, args, resume=True)
                for key, value in posterior.draw(1).items():
                    torch.testing.assert_close(value, found[f"{name}, draw, {key}"], rtol=1e-4, atol=1e-6)
            with pytest.raises(InputError, match="cannot go on from checkpoints of FSDP"):
                train("blob", make_model(), args)
            with pytest.raises(InputError, match="spread over processes"):
                bl.predict(model, posterior, TASK.test, 2, tokenizer=make_tokenizer())
            for method in (Laplace(), METHODS["together"]):
                with pytest.raises(InputError, match="which a model that FSDP spreads over processes does not serve"):
                    fit(make_model(), TASK, method, args, tokenizer=make_tokenizer())
        torch.save(found, tmp_path / f"{os.environ['RANK']}.pt")

    compared(tmp_path, ranks)
