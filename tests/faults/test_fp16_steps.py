"""fp16 with a real gradient scaler, on the CPU: overflows are the scaler's, and nothing else of them stays."""

import math

import pytest
import torch
from support.spoil import Spoil
from support.tiny import arguments, make_model
from transformers import Trainer, TrainerCallback

from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ivon, Map
from bayeslora.params import read

ROWS = [{"input_ids": [3, 7, 11, 5 + k, 9], "labels": [3, 7, 11, 5 + k, 9]} for k in range(16)]
PARAMETER = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


class Scaled(Trainer):
    """What accelerate does under fp16 on an accelerator: losses are scaled, and gradients unscaled when clipped."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        self.accelerator.unscale_gradients = lambda optimizer=None: self.accelerator.scaler.unscale_(
            self.optimizer.optimizer
        )


class Watch(TrainerCallback):
    """Notes all that is trained after each step, and whether accelerate says that the step was skipped."""

    def __init__(self):
        self.after, self.told = [], []

    def on_step_end(self, args, state, control, *, model, optimizer, **_):
        self.after.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        self.told.append(optimizer.step_was_skipped)


def trained(tmp_path, method, spoiled, **changes):
    model, watch = make_model(), Watch()
    trainer = Scaled(model, arguments(tmp_path, **changes), train_dataset=ROWS, **method.trainer_kwargs(model, 16))
    trainer.add_callback(Spoil(spoiled, "gradient", PARAMETER))
    trainer.add_callback(watch)
    trainer.train()
    return model, watch, trainer


@pytest.mark.parametrize("method", [Map(), Blob(), Blob("elbo"), Ivon()], ids=["map", "blob", "blob-elbo", "ivon"])
def test_an_overflow_changes_nothing_and_lowers_the_scale(method, tmp_path):
    model, watch, trainer = trained(tmp_path, method, [1, 2, 5], optim="adamw_torch_fused")
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(watch.after, watch.after[1:], strict=False)]
    assert same == [True, False, False, True, False, False, False]  # steps 2 to 8
    assert all(bool(value.isfinite().all()) for value in watch.after[-1].values())
    assert all(bool(value.isfinite().all()) for value in read(model).values())
    assert trainer.accelerator.scaler.get_scale() == 2.0**13
    if not isinstance(method, Ivon):
        assert not any(watch.told)  # a fused optimiser hides what was skipped


def test_a_gradient_that_stays_infinite_at_every_scale_stops_the_run(tmp_path):
    with pytest.raises(InputError, match=r"^step 17 of 30: the gradient of .*v_proj.lora_B.* is not finite"):
        trained(tmp_path, Map(), range(1, 31), max_steps=30)


def test_a_loss_that_is_nan_is_no_overflow(tmp_path):
    model = make_model()
    trainer = Scaled(model, arguments(tmp_path), train_dataset=ROWS, **Map().trainer_kwargs(model, 16))
    trainer.add_callback(Spoil([2]))
    with pytest.raises(InputError, match=r"^step 2 of 8: the loss is nan"):
        trainer.train()
    assert all(math.isfinite(float(value.sum())) for value in read(model).values())
