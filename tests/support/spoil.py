"""Steps of a training run that go wrong: a loss, a gradient or a parameter that is not finite."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from bayeslora.params import lora_parameters


class Spoil(TrainerCallback):
    """Makes the logits of some training steps (numbered from 1) NaN, or a parameter's gradient or value infinite."""

    def __init__(self, steps: Collection[int], what: str = "loss", parameter: str = "") -> None:
        self.steps, self.what, self.parameter, self.now = steps, what, parameter, False

    def on_train_begin(self, args: object, state: object, control: object, *, model: nn.Module, **_: object) -> None:
        """Get at the numbers."""
        if self.what == "loss":
            model.register_forward_hook(self._logits, prepend=True)
        if self.what == "gradient":
            lora_parameters(model)[self.parameter].register_hook(self._gradient)  # type: ignore[no-untyped-call]

    def on_step_begin(self, args: object, state: Any, control: object, **_: object) -> None:
        """Say whether it is time."""
        self.now = state.global_step + 1 in self.steps

    def on_optimizer_step(self, args: object, state: object, control: object, *, model: nn.Module, **_: object) -> None:
        """Spoil a parameter."""
        if self.now and self.what == "parameter":
            lora_parameters(model)[self.parameter].data.view(-1)[0] = math.inf

    def _logits(self, model: nn.Module, inputs: object, outputs: Any) -> Any:
        if self.now and model.training:
            outputs["logits"] = outputs["logits"] * math.nan
            if outputs.get("loss") is not None:
                outputs["loss"] = outputs["loss"] * math.nan
        return outputs

    def _gradient(self, grad: Tensor) -> Tensor:
        return torch.full_like(grad, math.inf) if self.now else grad


def numbers(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of floating-point numbers in the files below a folder."""

    def inside(name: str, value: object) -> dict[str, Tensor]:
        if isinstance(value, Tensor):
            return {name: value} if value.is_floating_point() else {}
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return {key: one for part, each in parts for key, one in inside(f"{name}/{part}", each).items()}

    found: dict[str, Tensor] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            found |= inside(str(path), load_file(path))
        if path.name in ("optimizer.pt", "scheduler.pt"):
            found |= inside(str(path), torch.load(path, weights_only=True))
    return found
