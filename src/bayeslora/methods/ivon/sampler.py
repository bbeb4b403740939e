"""The callback of IVON: it draws at each step, lets the modules read the draw, and says if the variance was learned."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.methods.callback import HALF, MethodCallback, Run, write_tensors
from bayeslora.methods.guards import check_training, plain_layers
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.settings import STEP, Group, default_sigma, from_prior, parts, pull_weight
from bayeslora.methods.records import Record, require_record
from bayeslora.methods.trainer_log import averages
from bayeslora.params import Params, is_spread, lora_parameters, stack_across, whole

if TYPE_CHECKING:
    from bayeslora.methods.ivon.method import Ivon

logger = logging.getLogger(__name__)

LEARNED = 0.5
"""The variance counts as learned if at least this share of h+δ is more than 10 % off what it would be without data."""


@final
class Sampler(MethodCallback):
    """Draws at the beginning of each step, lets the modules read the draw, and tells how the variance did."""

    name, title, file = "ivon", "IVON", "bayeslora_ivon.safetensors"
    optimizer: IvonOptimizer

    def __init__(self, method: Ivon, num_data: int) -> None:
        super().__init__(num_data)
        self.method = method
        self.batches = 0
        self.whole: Params = {}  # moments that are spread over processes and about to be saved

    def begin(self, run: Run) -> Record:
        """Give the optimiser what only the Trainer's arguments say, and let the modules read its draws."""
        method = self.method
        layers = plain_layers(run.model, self.title)
        check_training(run.args, run.model, run.optimizer, self.title)
        optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
        if not isinstance(optimizer, IvonOptimizer):
            raise InputError("IVON is its own optimiser, and the Trainer was given another; leave `optimizers` out")
        self._check_draws(run.args)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        settings = method.optimizer_settings(self.num_data, sum(p.numel() for p in trained))
        for group in optimizer.param_groups:
            group |= {"weight_decay": method.weight_decay, "ess": settings["ess"]}
            if method.in_units and math.isinf(settings["clip_radius"]):
                group["clip_radius"] = STEP * run.args.learning_rate
        optimizer.param_groups[0]["seed"] = run.args.seed
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
        return Record(self.name, self.num_data, optimizer, shadowed(run.model, trained, self._value))

    def _check_draws(self, args: TrainingArguments) -> None:
        """Refuse several draws per step where their gradients cannot be told apart."""
        draws = self.method.draws_per_step
        if draws > 1 and (args.max_grad_norm or args.world_size > 1):
            raise InputError(
                "several draws per step need TrainingArguments(max_grad_norm=0), since clipping comes after the draws "
                "are added up, and one process"
            )
        if draws > args.gradient_accumulation_steps:
            raise InputError(
                f"draws_per_step={draws} needs as many accumulated batches; set gradient_accumulation_steps={draws}"
            )
        if draws > 1 and args.fp16:
            raise InputError("several draws per step cannot be told apart under fp16's loss scaling; use bf16=True")

    def _value(self, known: Tensor, p: Tensor) -> Tensor | None:
        """Return the draw of a parameter that the optimiser has, as a function of what a module has of it now."""
        noise = self.optimizer.noise(known)
        if noise is None:
            return None
        if p.dtype == torch.float32:
            return p + noise
        return p + ((whole(self.optimizer.mean(known)) + noise).to(p.dtype) - p.detach())

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Draw."""
        self.optimizer.draw()
        self.batches = 0

    def on_substep_end(self, args: TrainingArguments, state: object, control: object, **_: object) -> None:
        """Draw again where the next share of the step's batches begins."""
        draws, batches = self.method.draws_per_step, args.gradient_accumulation_steps
        before, self.batches = self.batches, self.batches + 1
        if self.batches * draws // batches > before * draws // batches:
            self.optimizer.draw()

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Return how the variance does, for the log."""
        return diagnostics(self.optimizer)

    def gather(self, model: nn.Module) -> None:
        """Note the moments where FSDP has spread them."""
        if is_spread(model):
            self.whole = learned(self.optimizer, model)

    def save(self, path: Path, run: Run) -> None:
        """Write what belongs to the adapter of the checkpoint, if the best one is to be the result."""
        if run.args.load_best_model_at_end:
            tensors, self.whole = self.whole or learned(self.optimizer, run.model), {}
            write_tensors(path, tensors)

    def end(self, run: Run) -> None:
        """Say whether the variance was learned, and take the best checkpoint's, if it is used."""
        report(self.optimizer, run.model)
        best = self.read_best(run)
        if best is not None:
            require_record(run.model, self.name).learned = best


@torch.no_grad()
def diagnostics(optimizer: IvonOptimizer) -> dict[str, float]:
    """Return what tells whether the variance was learned; empty before the first step.

    ``hess_moved``: share of coordinates whose h+δ is more than 10 % off what it would be without data, h₀β₂ᵗ + δ;
    ``clipped``: share whose update is at the clip radius; ``ess``: λ, how many examples the data count for; ``sigma``
    and ``sigma_mean``: median and mean σ. The device is waited for once.
    """
    trained = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    stepped = [(p, group, state) for p, group in trained if (state := optimizer.state.get(p)) and state["step"]]
    names = ("sigma_mean", "hess_moved", "clipped")
    metrics = averages(names, (_coordinates(group, state, optimizer.mean(p)) for p, group, state in stepped))
    return metrics and {**metrics, "ess": float(optimizer.param_groups[0]["ess"])}


def _coordinates(group: Group, state: Group, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ of a parameter, where h+δ is more than 10 % off, and where the update is at the clip radius."""
    state, mean = parts(state, whole), whole(mean)
    precision = state["hess"] + state["delta"]
    update = state["avg_grad"] / (1 - group["betas"][0] ** state["step"])
    update = update + pull_weight(group, state) * from_prior([mean], [state])[0]
    untaught = state.get("hess_init", group["hess_init"]) * group["betas"][1] ** state["step"] + state["delta"]
    moved = (precision / untaught - 1).abs() > 0.1
    clipped = (update / precision).abs() >= group["clip_radius"]
    return (group["ess"] * precision).rsqrt(), moved, clipped


def report(optimizer: IvonOptimizer, model: nn.Module) -> None:
    """Log what came of the variance, and warn if it was hardly learned."""
    metrics = diagnostics(optimizer)
    if not metrics:
        return
    sizes = {}
    for part in ("lora_A", "lora_B"):
        values = [whole(p.detach()).abs().median() for name, p in lora_parameters(model).items() if part in name]
        sizes[part] = float(stack_across(values).median()) if values else math.nan
    logger.info(
        "IVON: median sigma %.2g (median |A| %.2g, |B| %.2g); %.0f %% of h is more than 10 %% off what it "
        "would be without data; %.0f %% of the last update was at the clip radius.",
        metrics["sigma"],
        sizes["lora_A"],
        sizes["lora_B"],
        100 * metrics["hess_moved"],
        100 * metrics["clipped"],
    )
    if metrics["hess_moved"] < LEARNED:
        logger.warning(
            "IVON's variance was hardly learned (%.0f %% of h is other than without data), so sigma is about what it "
            "was set to: compare with isotropic noise of that size. More draws a step or a longer run teach it more.",
            100 * metrics["hess_moved"],
        )


def learned(optimizer: IvonOptimizer, model: nn.Module) -> Params:
    """Return σ² as ``variance/<name>``, and as ``mean/<name>`` the exact mean of what is in half precision."""
    params = {name: p for name, p in lora_parameters(model).items() if p in optimizer.state}
    variances = {f"variance/{name}": optimizer.variance(p).cpu() for name, p in params.items()}
    means = {name: whole(optimizer.mean(p)).float().cpu().clone() for name, p in params.items() if p.dtype in HALF}
    return variances | {f"mean/{name}": mean for name, mean in means.items()}


def moments(mean: Params, known: Params) -> tuple[Params, Params]:
    """Return mean and variance; exact means in `known` count where they are the adapter up to half precision."""
    exact = {n: known[f"mean/{n}"] for n in mean if f"mean/{n}" in known}
    exact = {n: e for n, e in exact.items() if any(torch.equal(e.to(kind).float(), mean[n]) for kind in HALF)}
    return mean | exact, {n: known[f"variance/{n}"] for n in mean if f"variance/{n}" in known}


def first_deviations(layers: Mapping[str, LoraLayer], params: Iterable[Tensor]) -> dict[Tensor, float]:
    """Return σ₀ of each trained parameter if it is not given; see `default_sigma`."""
    of_b = {
        layer.lora_B[adapter].weight: (float(layer.scaling[adapter]), int(layer.r[adapter]), len(layers))
        for layer in layers.values()
        for adapter in layer.lora_B
        if adapter in layer.active_adapters
    }
    return {p: default_sigma(p.shape, of_b.get(p)) for p in params}


def shadowed(
    model: nn.Module, params: Iterable[Tensor], value: Callable[[Tensor, Tensor], Tensor | None]
) -> Callable[[nn.Module], None]:
    """Let modules read ``value(parameter, parameter now)`` in its place in training mode; return what undoes it."""
    # A module's attribute is covered for the length of its own forward call, so gradients go to the parameter, gradient
    # checkpointing reads the same value again, and whoever looks at the model from outside sees the parameter. Where
    # `value` returns None the parameter itself is read.
    covered, handles = set(params), []
    for path, module in model.named_modules():
        names = {name: p for name, p in module._parameters.items() if p is not None and p in covered}
        if not names:
            continue
        if isinstance(module, nn.ParameterDict | nn.ParameterList):
            raise InputError(f"noise cannot be added to {path}, which is not a module with a forward pass of its own")

        def _cover(owner: nn.Module, inputs: object, names: dict[str, nn.Parameter] = names) -> None:
            if owner.training:
                for name, p in names.items():  # which FSDP has put a whole parameter in the place of
                    other = value(p, owner._parameters[name])  # type: ignore[arg-type]
                    if other is not None:
                        owner.__dict__[name] = other

        def _uncover(owner: nn.Module, inputs: object, output: object, names: dict[str, nn.Parameter] = names) -> None:
            for name in names:
                owner.__dict__.pop(name, None)

        handles += [
            module.register_forward_pre_hook(_cover),
            module.register_forward_hook(_uncover, always_call=True),
        ]

    def _undo(_: nn.Module) -> None:
        for handle in handles:
            handle.remove()

    return _undo
