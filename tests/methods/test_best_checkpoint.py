"""With ``load_best_model_at_end`` mean and spread are of the same checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import arguments, make_model, make_task, same_params
from transformers import Trainer, TrainerCallback

from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ensemble, Ivon, Swag
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import lora_parameters
from bayeslora.prediction.readouts import readout_for
from bayeslora.training.run import fit

TASK = make_task(readout="likelihood")
BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
}  # fmt: skip
SAME = BEST | {"load_best_model_at_end": False}
"""The same evaluations, which draw from the generator that BLoB's noise comes from, without the best adapter."""
METHODS = {"ivon": Ivon(sigma0=0.05), "blob": Blob(), "blob-elbo": Blob("elbo")}


class BestAt(TrainerCallback):
    """Makes the evaluation after one step the best."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics, **_):
        metrics["eval_loss"] = abs(state.global_step - self.step)


class StopAfter(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


class Removes(TrainerCallback):
    """Deletes what a pattern finds in the output folder when the last checkpoint is written."""

    def __init__(self, pattern):
        self.pattern = pattern

    def on_save(self, args, state, control, **_):
        if state.global_step == state.max_steps:
            for path in Path(args.output_dir).glob(self.pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def run(tokenizer, tmp_path):
    def train(method, *callbacks, half=False, **changes):
        model = make_model(dtype=torch.bfloat16 if half else torch.float32)
        for p in lora_parameters(model).values():
            p.data = p.data.to(torch.bfloat16 if half else torch.float32)
        args = arguments(tmp_path / f"{len(list(tmp_path.iterdir()))}", **changes)
        return fit(model, TASK, method, args, tokenizer=tokenizer, callbacks=callbacks)

    return train


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_spread_is_that_of_the_step_of_the_mean(run, name, half):
    method = METHODS[name]
    there = run(method, StopAfter(4), half=half, **SAME)
    last = run(method, half=half, **SAME)
    best = run(method, BestAt(4), half=half, **BEST)
    assert same_params(best.mean, there.mean)
    assert same_params(best.variance, there.variance)
    assert not any(torch.equal(value, last.variance[n]) for n, value in best.variance.items())


@pytest.mark.parametrize("name", ["ivon", "blob"])
def test_checkpoints_without_the_optimiser_serve(run, name):
    method = METHODS[name]
    there = run(method, StopAfter(4), **SAME)
    best = run(method, BestAt(4), **BEST, save_only_model=True, save_total_limit=1)
    assert same_params(best.variance, there.variance)


@pytest.mark.parametrize("name", ["ivon", "blob"])
def test_a_best_checkpoint_without_its_spread_is_refused(run, name):
    with pytest.raises(InputError, match=r"the best checkpoint has no readable .* train with load_best_model_at_end"):
        run(METHODS[name], BestAt(4), Removes("checkpoint-4/bayeslora_*.safetensors"), **BEST)


@pytest.mark.parametrize("name", ["ivon", "blob"])
def test_mean_and_spread_are_the_last_where_the_best_checkpoint_is_gone(run, name):
    last = run(METHODS[name], **SAME)
    gone = run(METHODS[name], BestAt(4), Removes("checkpoint-4"), **BEST)
    assert same_params(gone.mean, last.mean)
    assert same_params(gone.variance, last.variance)


def test_an_ensembles_member_in_ones_own_trainer_has_the_spread_of_its_mean(run, tokenizer, tmp_path):
    model, method = make_model(), Ensemble(1, Ivon(sigma0=0.05))
    readout = readout_for(model, TASK.train, tokenizer)
    rows, held_out = (readout.encode(split)[0] for split in (TASK.train, TASK.validation))
    found = []
    for more, callback in ((BEST, BestAt(4)), ({}, StopAfter(4))):
        args = arguments(tmp_path / str(len(more)), **more, remove_unused_columns=False, label_names=["labels"])
        kwargs = method.trainer_kwargs(model, len(rows))
        kwargs["callbacks"].append(callback)
        with readout.attached(model):
            Trainer(model, args, train_dataset=rows, eval_dataset=held_out, data_collator=readout.collate,
                    compute_loss_func=answer_loss, **kwargs).train()  # fmt: skip
        found.append(method.posterior(model).members[0])
    assert same_params(found[0].mean, found[1].mean)
    assert same_params(found[0].variance, found[1].variance)


def test_swag_is_of_the_whole_path_and_says_so(run, caplog):
    method = Swag(start=2, interval=1)
    whole = run(method)
    assert "load_best_model_at_end" not in caplog.text
    best = run(method, BestAt(4), **BEST)
    assert "load_best_model_at_end changes the model, not its posterior" in caplog.text
    assert same_params(best.mean, whole.mean)
    assert same_params(best.variance, whole.variance)
