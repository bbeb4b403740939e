"""The callback of IVON: it draws at each step, and lets the modules read the draw in the place of their parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.methods.best_checkpoint import best_checkpoint, read_best, write_tensors
from bayeslora.methods.guards import check_training, plain_layers, shadowed
from bayeslora.methods.ivon.diagnostics import diagnostics, report
from bayeslora.methods.ivon.moments import learned
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.settings import STEP, default_sigma
from bayeslora.methods.precision import widen
from bayeslora.methods.records import Record, checkpoint_file, remember, require_record
from bayeslora.params import require_lora

if TYPE_CHECKING:
    from bayeslora.methods.ivon.method import Ivon

logger = logging.getLogger(__name__)
_STATE_FILE = "bayeslora_ivon.safetensors"


@final
class Sampler(TrainerCallback):
    """Draws at the beginning of each step, lets the modules read the draw, and tells how the variance did.

    Args:
        method: The settings.
        num_data: Number of training examples N.
    """

    def __init__(self, method: Ivon, num_data: int) -> None:
        self.method, self.num_data = method, num_data
        self.optimizer: IvonOptimizer | None = None
        self.batches = 0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the adapter into float32; else PEFT does when a checkpoint is read, with parameters that are new."""
        widen(kwargs.get("model"), kwargs.get("optimizer"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the optimiser what only the Trainer's arguments say, and let the modules read its draws.

        Raises:
            InputError: If the Trainer, its arguments or its optimiser do not serve.
        """
        model, method = require_lora(kwargs["model"]), self.method
        layers = plain_layers(model, "IVON")
        check_training(args, kwargs["optimizer"], "IVON")
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        if not isinstance(optimizer, IvonOptimizer):
            raise InputError("IVON is its own optimiser, and the Trainer was given another; leave `optimizers` out")
        if method.draws_per_step > 1 and (args.max_grad_norm or args.world_size > 1):
            raise InputError(
                "several draws per step need TrainingArguments(max_grad_norm=0), since clipping comes after the draws "
                "are added up, and one process"
            )
        if method.draws_per_step > args.gradient_accumulation_steps:
            raise InputError(
                f"draws_per_step={method.draws_per_step} needs as many accumulated batches; set "
                f"gradient_accumulation_steps={method.draws_per_step}"
            )
        if method.draws_per_step > 1 and args.fp16:
            raise InputError("several draws per step cannot be told apart under fp16's loss scaling; use bf16=True")
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        settings = method.optimizer_settings(self.num_data, sum(p.numel() for p in trained))
        for group in optimizer.param_groups:
            group |= {"weight_decay": method.weight_decay, "ess": settings["ess"]}
            if method.in_units and math.isinf(settings["clip_radius"]):
                group["clip_radius"] = STEP * args.learning_rate
        optimizer.param_groups[0]["seed"] = args.seed
        if method.in_units:
            for p, sigma in first_deviations(layers, trained).items():
                optimizer.begin(p, **method.own_settings(settings["ess"], sigma))
        if method.prior == "empirical" and settings["ess"] < 10 * self.num_data:
            logger.warning(
                "An empirical prior at λ = %.3g, near N = %d, pulls the noise of what has little to learn to zero, and "
                "with it the steps; the adapter may stay the base model. Leave the temperature at its default.",
                settings["ess"],
                self.num_data,
            )
        self.optimizer = optimizer
        undo = shadowed(model, trained, self._value)
        remember(model, Record(method.name, self.num_data, {"optimizer": optimizer}, undo))

    def _value(self, p: Tensor) -> Tensor | None:
        """Return the draw of a parameter, as a function of the parameter."""
        assert self.optimizer is not None
        noise = self.optimizer.noise(p)
        if noise is None:
            return None
        return p + (noise if p.dtype == torch.float32 else (self.optimizer.mean(p) + noise).to(p.dtype) - p.detach())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw."""
        assert self.optimizer is not None
        self.optimizer.draw()
        self.batches = 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw again where the next share of the step's batches begins."""
        assert self.optimizer is not None
        draws, batches = self.method.draws_per_step, args.gradient_accumulation_steps
        before, self.batches = self.batches, self.batches + 1
        if self.batches * draws // batches > before * draws // batches:
            self.optimizer.draw()

    def figures(self, state: TrainerState) -> dict[str, float]:
        """Return how the variance does, for the log."""
        return {} if self.optimizer is None else diagnostics(self.optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the noise out, and say whether the variance was learned."""
        model = require_lora(kwargs["model"])
        record = require_record(model, self.method.name)
        record.clear()
        assert self.optimizer is not None
        report(self.optimizer, model)
        best = best_checkpoint(args, state)
        if best is not None:
            record.kept["best"] = read_best(best / _STATE_FILE, "IVON")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what belongs to the adapter of the checkpoint, if the best one is to be the result."""
        if args.load_best_model_at_end and state.is_world_process_zero and self.optimizer is not None:
            write_tensors(checkpoint_file(args, state, _STATE_FILE), learned(self.optimizer, kwargs["model"]))


def first_deviations(layers: dict[str, LoraLayer], params: Iterable[Tensor]) -> dict[Tensor, float]:
    """Return σ₀ of each parameter if it is not given; see `default_sigma`.

    Args:
        layers: The LoRA layers by name.
        params: The trained parameters.

    Returns:
        The first standard deviation of each.
    """
    of_b = {
        layer.lora_B[adapter].weight: (float(layer.scaling[adapter]), int(layer.r[adapter]), len(layers))
        for layer in layers.values()
        for adapter in layer.lora_B
        if adapter in layer.active_adapters
    }
    return {p: default_sigma(p.shape, of_b.get(p)) for p in params}
