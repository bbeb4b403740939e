"""BLoB: a Gaussian over A, learned by backpropagation together with the adapter.

Shi et al. 2024 (arXiv 2406.11675): q(A) = N(M, Ω²) elementwise with Ω = G², B a point, prior N(0, σ_p²) on A. The prior
implies a low-rank prior on W = W₀ + s·B·A for which KL[q(W)‖p(W)] = KL[q(A)‖p(A)] (theorem 3.2). In training each
layer draws E ~ N(0, 1) once per forward pass, and signs u ∈ {±1}^in, t ∈ {±1}^r per token (flipout, Wen et al. 2018):

    A x = M x + t ⊙ ((Ω⊙E)(u⊙x))
    KL  = Σ_ij [ log(σ_p/Ω_ij) + (Ω_ij² + M_ij²)/(2σ_p²) − ½ ],  weighted by π_i = 2^i/(2^{L+1}−1), i = 1..L, 1, …
    L   = ⌊100·N^{π/8} / batch⌋, the batch being all examples of an optimiser step

``update="paper"``, the released algorithm: the Trainer's optimiser moves M and B by ∇NLL; then G ← G − κ(∇NLL + π_i∇KL)
and M ← M − κ·π_i·∇KL, with a rate κ = ``kl_rate`` that follows the Trainer's schedule. ``update="elbo"``: one loss
NLL + π_i·KL, and the Trainer's optimiser moves everything. Draws at prediction are coherent: one A for all the data.

What we do differently: ∇KL is added in closed form after the Trainer's gradient clipping, which therefore sees ∇NLL
alone; and L is never longer than the run, since otherwise the prior would hardly be felt.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayeslora._typing import Float
from bayeslora.errors import InputError
from bayeslora.methods.base import Method, Record, check_num_data, checkpoint_file, origin_for, remember, require_record
from bayeslora.methods.best import best_checkpoint, read_best, write_tensors
from bayeslora.methods.blob_layer import BlobLinear, attach, begin, detach
from bayeslora.methods.diagnostics import Figures, spread
from bayeslora.methods.guards import check_training
from bayeslora.methods.precision import widen
from bayeslora.params import Params, read, require_lora
from bayeslora.posteriors import DiagonalGaussian

_STATE_FILE = "bayeslora_blob.safetensors"


@final
@dataclass(frozen=True)
class Blob(Method):
    """Bayesian low-rank adaptation by backpropagation.

    Attributes:
        update: ``paper`` (the released algorithm) or ``elbo`` (one loss, one optimiser).
        init_spread: ε; G starts uniform on [ε/√2, ε]. The paper's is 0.05, for 7B models and thousands of steps.
        prior_sigma: σ_p.
        kl_rate: κ of ``update="paper"``.
        kl_cycle: L; None for the paper's, but at most the steps of the run.
    """

    name: ClassVar[str] = "blob"
    update: Literal["paper", "elbo"] = "paper"
    init_spread: float = 0.3
    prior_sigma: float = 0.2
    kl_rate: float = 0.01
    kl_cycle: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: If a setting is out of range.
        """
        if self.update not in ("paper", "elbo"):
            raise InputError(f"update must be paper or elbo, and it is {self.update!r}")
        for key in ("init_spread", "prior_sigma", "kl_rate"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"BLoB's {key} must be finite and positive, and it is {getattr(self, key)}")
        if self.kl_cycle is not None and self.kl_cycle < 1:
            raise InputError(f"BLoB's kl_cycle must be at least 1, and it is {self.kl_cycle}")

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> dict[str, Any]:
        """Put the Gaussian layers into the model, so that its optimiser will know them.

        Returns:
            The callback that trains them, and the one that logs how they do.

        Raises:
            InputError: If the adapter is not plain LoRA on linear layers.
        """
        trainer = _Trainer(self, check_num_data(num_data), attach(model, self.init_spread))
        return {"callbacks": [trainer, Figures(self.name, trainer.figures)]}

    def posterior(self, model: nn.Module) -> DiagonalGaussian:
        """Return the Gaussian over A, with B at its mean.

        Raises:
            InputError: If the model was not trained with BLoB.
        """
        spread: dict[str, Tensor] = require_record(model, self.name).kept
        variance = {n: g.detach().to("cpu", torch.float32).pow(4) for n, g in spread.items()}
        return DiagonalGaussian(read(model), variance, origin_for(model, self))


def kl_weight(step: int, cycle: int) -> float:
    """Return π_i = 2^i/(2^{L+1}−1) of an optimiser step.

    Args:
        step: Number of the step, from 0; i = step mod L + 1.
        cycle: L.

    Returns:
        The weight; over a cycle the weights add up to 1 − 1/(2^{L+1}−1).
    """
    i = step % cycle + 1
    return math.ldexp(1.0, i - cycle - 1) / (1 - math.ldexp(1.0, -cycle - 1))


def paper_cycle(num_data: int, batch: int) -> int:
    """Return L = ⌊100·N^{π/8} / batch⌋.

    Args:
        num_data: Number of training examples N.
        batch: Examples of an optimiser step, over all processes.

    Returns:
        L, at least 1.
    """
    return max(1, int(100 * num_data ** (math.pi / 8) / batch))


def kl_divergence(mean: Float[Tensor, "R I"], spread: Float[Tensor, "R I"], prior_sigma: float) -> Float[Tensor, ""]:
    """Return KL[N(M, G⁴) ‖ N(0, σ_p²)], summed over the elements.

    Args:
        mean: M.
        spread: G; the deviation is its square.
        prior_sigma: σ_p.

    Returns:
        The divergence in nats.
    """
    variance = spread.pow(4)
    log_ratio = math.log(prior_sigma) - spread.square().log()
    return (log_ratio + (variance + mean.square()) / (2 * prior_sigma**2) - 0.5).sum()


def _spread_gradient(spread: Tensor, prior_sigma: float) -> Tensor:
    """Return dKL/dG = −2/G + 2G³/σ_p²."""
    return spread.pow(3).mul_(2 / prior_sigma**2).sub_(2 / spread)


def _taking_out(model: nn.Module, layers: list[BlobLinear]) -> Callable[[], None]:
    """Return what puts plain layers back; it does not keep the model alive, for a model's record is kept as long."""
    there = weakref.ref(model)

    def undo() -> None:
        """Put plain layers back."""
        own = there()
        if own is not None:
            detach(own, layers)

    return undo


@final
class _Trainer(TrainerCallback):
    """Adds ∇KL to the Trainer's gradients, or takes the released algorithm's second step."""

    def __init__(self, method: Blob, num_data: int, layers: dict[str, BlobLinear]) -> None:
        self.method, self.num_data, self.layers = method, num_data, layers
        self.gradients: dict[str, Tensor] = {}
        self.cycle = 1

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the adapter into float32, in which the small steps towards the prior are not lost."""
        widen(kwargs.get("model"), kwargs.get("optimizer"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the start of G or read it from the checkpoint, and switch the noise on.

        Raises:
            InputError: If the Trainer or its arguments do not serve, or the checkpoint lacks G.
        """
        model = require_lora(kwargs["model"])
        check_training(args, kwargs["optimizer"], "BLoB")
        there = {id(m) for m in model.modules()}
        if not all(id(layer) in there for layer in self.layers.values()):
            raise InputError(
                "the model's BLoB layers are no longer those of this run; call method.trainer_kwargs(model, num_data) "
                "anew for each Trainer, on the very model that it trains"
            )
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.cycle = self.method.kl_cycle or min(paper_cycle(self.num_data, batch), max(1, state.max_steps))
        for layer in self.layers.values():
            layer.spread.data = layer.spread.data.float()  # some trainers cast everything that is trained
            layer.noisy = True
        if state.global_step == 0:
            begin(self.layers, self.method.init_spread, args.seed)
        else:
            self._load(checkpoint_file(args, state, _STATE_FILE))
        spread: Params = {name: layer.spread for name, layer in self.layers.items()}
        undo = _taking_out(model, list(self.layers.values()))
        remember(model, Record(self.method.name, self.num_data, dict(spread), undo))

    @torch.no_grad()
    def figures(self, state: TrainerState) -> dict[str, float]:
        """Return the divergence from the prior, its weight in the last step, and the deviations, for the log."""
        sigma = self.method.prior_sigma
        kl = sum(float(kl_divergence(layer.weight.float(), layer.spread, sigma)) for layer in self.layers.values())
        weight = kl_weight(max(0, state.global_step - 1), self.cycle)
        return {"kl": kl, "kl_weight": weight, **spread(layer.spread.square() for layer in self.layers.values())}

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add π∇KL to the gradients; or keep those of G from the Trainer's optimiser."""
        weight, sigma = kl_weight(state.global_step, self.cycle), self.method.prior_sigma
        for name, layer in self.layers.items():
            mean, spread = layer.weight, layer.spread
            if spread.grad is None or mean.grad is None:
                continue
            if self.method.update == "paper":
                self.gradients[name], spread.grad = spread.grad, None
            else:
                mean.grad.add_(mean, alpha=weight / sigma**2)
                spread.grad.add_(_spread_gradient(spread, sigma), alpha=weight)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the released algorithm's second step, by plain gradient descent."""
        optimizer = kwargs["optimizer"]
        gradients, self.gradients = self.gradients, {}
        if not gradients or getattr(optimizer, "step_was_skipped", False):
            return
        group = optimizer.param_groups[0]
        first = group.get("initial_lr", group["lr"])
        rate = self.method.kl_rate * (float(group["lr"]) / float(first) if first else 1.0)
        weight, sigma = kl_weight(state.global_step, self.cycle), self.method.prior_sigma
        for name, gradient in gradients.items():
            layer = self.layers[name]
            gradient.add_(_spread_gradient(layer.spread, sigma), alpha=weight)
            layer.spread.sub_(gradient, alpha=rate)
            layer.weight.mul_(1 - rate * weight / sigma**2)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write G into the checkpoint."""
        if state.is_world_process_zero:
            spread: Params = {name: layer.spread for name, layer in self.layers.items()}
            write_tensors(checkpoint_file(args, state, _STATE_FILE), spread)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put plain layers back, and take G from where the adapter comes from: the best checkpoint, if it is used."""
        require_record(require_lora(kwargs["model"]), self.method.name).clear()
        best = best_checkpoint(args, state)
        if best is not None:
            self._take(read_best(best / _STATE_FILE, "BLoB"))

    def _load(self, path: Path) -> None:
        """Read G from a checkpoint."""
        try:
            self._take(load_file(path))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint has no readable {path}, which BLoB needs to go on; resume from an earlier checkpoint"
            ) from error

    @torch.no_grad()
    def _take(self, kept: Params) -> None:
        """Write G into the layers."""
        for name, layer in self.layers.items():
            layer.spread.copy_(kept[name])
