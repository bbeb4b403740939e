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

What we do differently, and why: docs/methods/blob.md. ∇KL is added in closed form after the Trainer's gradient
clipping, which therefore sees ∇NLL alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import SaveStrategy

from bayeslora.errors import InputError
from bayeslora.methods.base import Method, TrainerKwargs, check_ranges, origin_for, trained
from bayeslora.methods.blob.layer import BlobLinear, attach, begin, detach, sizes
from bayeslora.methods.blob.terms import (
    DEFAULTS,
    PRESETS,
    Scale,
    kl_divergence,
    kl_weight,
    paper_cycle,
    paper_step,
    scales,
    spread_gradient,
)
from bayeslora.methods.blob.token_count import TokenCount
from bayeslora.methods.callback import MethodCallback, Run, write_tensors
from bayeslora.methods.guards import check_training
from bayeslora.methods.records import Record, require_record
from bayeslora.methods.steps import guarded, took_step
from bayeslora.methods.trainer_log import MetricsCallback, spread
from bayeslora.params import Params, is_spread, spread_as, whole
from bayeslora.posteriors import DiagonalGaussian

_SIZE, _TOKENS, _STEPS = ".size", "tokens", "steps"


@final
@dataclass(frozen=True)
class Blob(Method):
    """Bayesian low-rank adaptation by backpropagation.

    What is None is the preset's, or as `DEFAULTS` says.

    Attributes:
        update: ``paper`` (the released algorithm) or ``elbo`` (one loss, one optimiser).
        init_spread: ε; G starts uniform on [ε/√2, ε]. None: as ``relative_spread`` says.
        prior_sigma: σ_p. None: as ``relative_prior`` says.
        kl_rate: κ of ``update="paper"``, in the prior's units where it is relative.
        kl_cycle: L; None for the paper's, but at most the steps of the run.
        temperature: T, by which π·KL is multiplied; 1 is the paper's, less is a cold posterior.
        relative_spread: Ω where training begins, in units of each A's root mean square.
        relative_prior: σ_p in the same units; None: as ``relative_spread``, so that flat directions stay as they are.
        preset: Published settings, one of `PRESETS`; what is given beside it has precedence.
        tokens_per_row: By how many tokens of an example the Trainer divides its loss, and so KL. None: counted where
            the model computes the loss of labels of tokens, which is their mean; 1 elsewhere.
    """

    name: ClassVar[str] = "blob"
    update: Literal["paper", "elbo"] = "paper"
    init_spread: float | None = None
    prior_sigma: float | None = None
    kl_rate: float | None = None
    kl_cycle: int | None = None
    temperature: float | None = None
    relative_spread: float | None = None
    relative_prior: float | None = None
    preset: str | None = None
    tokens_per_row: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.update not in ("paper", "elbo"):
            raise InputError(f"update must be paper or elbo, and it is {self.update!r}")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"BLoB has no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        positive = ("init_spread", "prior_sigma", "kl_rate", "relative_spread", "relative_prior", "tokens_per_row")
        check_ranges(self, prefix="BLoB's ", positive=positive, not_negative=("temperature",), at_least={"kl_cycle": 1})

    def setting(self, key: str) -> float | None:
        """Return a number as it is used: as given, or the preset's, or the default; None where the matrix says it."""
        given = {key: value for key, value in vars(self).items() if isinstance(value, int | float)}
        values = DEFAULTS[self.update] | PRESETS.get(self.preset or "", {}) | given
        return {"relative_prior": values["relative_spread"], **values}.get(key)

    def number(self, key: str) -> float:
        """Return a setting that always has a value."""
        value = self.setting(key)
        assert value is not None
        return value

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Put the Gaussian layers into the model, so that its optimiser will know them; see `Method.trainer_kwargs`."""
        learner = BlobCallback(self, num_data, attach(model))
        metrics = MetricsCallback(self.name, learner.metrics)
        return {"callbacks": guarded([learner, metrics])}

    def posterior(self, model: nn.Module) -> DiagonalGaussian:
        """Return the Gaussian over A, with B at its mean; see `Method.posterior`."""
        spreads: Params = require_record(model, self.name).learned
        variance = {n: whole(g.detach()).to("cpu", torch.float32).pow(4) for n, g in spreads.items()}
        return DiagonalGaussian(trained(model), variance, origin_for(model, self))


@final
class BlobCallback(MethodCallback):
    """Adds ∇KL to the Trainer's gradients, or takes the released algorithm's second step."""

    name, title, file = Blob.name, "BLoB", "bayeslora_blob.safetensors"

    def __init__(self, method: Blob, num_data: int, layers: dict[str, BlobLinear]) -> None:
        super().__init__(num_data)
        self.method, self.layers = method, layers
        self.temperature, self.rate = method.number("temperature"), method.number("kl_rate")
        self.tokens = TokenCount(num_data, method.tokens_per_row)
        self.gradients: dict[str, Tensor] = {}
        self.whole: Params = {}  # G, where it is spread over processes and about to be saved
        self.sizes: dict[str, float] = {}
        self.scales: dict[str, Scale] = {}
        self.cycle = 1
        self.steps = 0  # that were taken: one that is left out does not use up its weight of the divergence

    def begin(self, run: Run) -> Record:
        """Draw the start of G or read it from the checkpoint, and switch the noise on."""
        args, state, model, method = run.args, run.state, run.model, self.method
        check_training(args, run.model, run.optimizer, self.title)
        if is_spread(model) and method.update == "paper" and args.save_strategy != SaveStrategy.NO:
            raise InputError(
                "BLoB's update='paper' cannot go on from checkpoints of FSDP, since G has no state in the Trainer's "
                "optimiser; use save_strategy='no', update='elbo', or DDP"
            )
        modules = {id(m) for m in model.modules()}
        if not all(id(layer) in modules for layer in self.layers.values()):
            raise InputError(
                "the model's BLoB layers are no longer those of this run; call method.trainer_kwargs(model, num_data) "
                "anew for each Trainer, on the very model that it trains"
            )
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.cycle = method.kl_cycle or min(paper_cycle(self.num_data, batch), max(1, state.max_steps))
        for layer in self.layers.values():
            if layer.spread.dtype != torch.float32:  # some trainers cast everything that is trained
                layer.spread.data = layer.spread.data.float()
            layer.noisy, layer.process = True, args.process_index
        self.steps = state.global_step
        if state.global_step == 0:
            self.sizes = sizes(self.layers)
            begin(self.layers, method.setting("init_spread"), method.number("relative_spread"), args.seed)
        else:
            self.resume(run, self._load)
        self.scales = scales(self.sizes, method.setting("prior_sigma"), method.number("relative_prior"))
        self.tokens.begin(model, run.loader, args.world_size)
        return Record(self.name, self.num_data, self._spreads(), self._take_out)

    def _take_out(self, model: nn.Module) -> None:
        """Count no tokens any longer, and put plain layers back."""
        self.tokens.end()
        detach(model, self.layers.values())

    def _spreads(self) -> Params:
        """Return G of each layer, the parameter itself."""
        return {name: layer.spread for name, layer in self.layers.items()}

    def weight(self, step: int) -> float:
        """Return the weight of the divergence beside the Trainer's loss in a step."""
        return self.temperature * kl_weight(step, self.cycle) / self.tokens.per_row

    @torch.no_grad()
    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Return the divergence from the prior, its weight in the last step, and the deviations, for the log."""
        kl = sum(
            float(kl_divergence(whole(layer.weight).float(), whole(layer.spread), self.scales[name].sigma))
            for name, layer in self.layers.items()
        )
        weight = self.weight(max(0, self.steps - 1))
        return {"kl": kl, "kl_weight": weight, **spread(whole(layer.spread).square() for layer in self.layers.values())}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Add Tπ∇KL to the gradients; or keep those of G from the Trainer's optimiser."""
        self.tokens.note()
        weight = self.weight(self.steps)
        for name, layer in self.layers.items():
            mean, spread, sigma = layer.weight, layer.spread, self.scales[name].sigma
            if spread.grad is None or mean.grad is None:
                continue
            if self.method.update == "paper":
                self.gradients[name], spread.grad = spread.grad, None
            else:
                mean.grad.add_(mean, alpha=weight / sigma**2)
                spread.grad.add_(spread_gradient(spread, sigma), alpha=weight)

    @torch.no_grad()
    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Take the released algorithm's second step, by plain gradient descent."""
        optimizer = kwargs["optimizer"]
        gradients, self.gradients = self.gradients, {}
        if not took_step(optimizer):
            return
        weight, self.steps = self.weight(self.steps), self.steps + 1
        group = optimizer.param_groups[0]
        first = group.get("initial_lr", group["lr"])
        rate = self.rate * (float(group["lr"]) / float(first) if first else 1.0)
        for name, gradient in gradients.items():
            paper_step(self.layers[name], gradient, self.scales[name], weight, rate)

    def gather(self, model: nn.Module) -> None:
        """Note all of G where FSDP has spread it."""
        if is_spread(model):
            self.whole = {name: whole(g.detach()) for name, g in self._spreads().items()}

    def save(self, path: Path, run: Run) -> None:
        """Write G, and what the weight of the divergence depends on."""
        tensors = {name + _SIZE: torch.tensor(size, dtype=torch.float64) for name, size in self.sizes.items()}
        counts = {_TOKENS: self.tokens.noted, _STEPS: torch.tensor(self.steps)}
        spreads, self.whole = self.whole or self._spreads(), {}
        write_tensors(path, {**spreads, **tensors, **counts})

    def _load(self, path: Path) -> None:
        """Read what `save` wrote; a checkpoint of an earlier version has G alone, for an absolute prior."""
        tensors = load_file(path)
        self._take(tensors)
        if self.method.setting("prior_sigma") is None:
            self.sizes = {name: float(tensors[name + _SIZE]) for name in self.layers}
        else:
            self.sizes = sizes(self.layers)
        if _TOKENS in tensors:
            self.tokens.noted = tensors[_TOKENS]
        if _STEPS in tensors:
            self.steps = int(tensors[_STEPS])

    def end(self, run: Run) -> None:
        """Take G from where the adapter comes from: the best checkpoint, if it is used."""
        best = self.read_best(run)
        if best is not None:
            self._take(best)

    @torch.no_grad()
    def _take(self, spreads: Mapping[str, Tensor]) -> None:
        """Write G into the layers."""
        for name, layer in self.layers.items():
            layer.spread.copy_(spread_as(spreads[name], layer.spread))
