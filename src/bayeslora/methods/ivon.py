"""IVON-LoRA: a diagonal Gaussian over the adapter, learned by variational online Newton in the place of AdamW.

Cong et al. 2024 (arXiv 2411.04421), with the optimiser of Shen et al. 2024 (arXiv 2402.17641, algorithm 1; see
`bayeslora.optim`), minimise λ·E_q[ℓ(θ)] + KL(q‖p) over q = N(m, diag σ²), σ = 1/√(λ(h+δ)), p = N(0, 1/(λδ)). At
prediction λ can be multiplied by τ (``tempered(posterior, 1/τ)``) and parameters of low |m|/σ removed, matrix by matrix
(``pruned``), as in Cong et al. 2025 (arXiv 2506.14280).

What we do differently: beside (λ, h₀, η, ξ) there are settings in units that one can see, the first standard
deviation ``sigma0``, the largest step ``max_step`` of a coordinate (η = 1 and ξ = max_step; by default the Trainer's
learning rate) and the ``temperature`` T = N/λ; h₀ follows as 1/(λσ₀²) − δ. The parameters hold the mean all the time:
noise is added where a module reads its parameter, in training steps only, so evaluation, checkpoints and exceptions
never see a draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayeslora.errors import InputError
from bayeslora.ivon_settings import check_ivon
from bayeslora.methods.base import Method, Record, check_num_data, checkpoint_file, origin_for, remember, require_record
from bayeslora.methods.best import best_checkpoint, learned, moments, read_best, write_tensors
from bayeslora.methods.diagnostics import Figures, diagnostics, report
from bayeslora.methods.guards import check_training, plain_layers, shadowed
from bayeslora.methods.precision import widen
from bayeslora.optim import IvonOptimizer
from bayeslora.params import read, require_lora
from bayeslora.posteriors import DiagonalGaussian

_STATE_FILE = "bayeslora_ivon.safetensors"

PRESETS: dict[str, dict[str, Any]] = {
    name: {"ess": ess, "hess_init": hess, "learning_rate": 0.03, "clip_radius": 1e-3, "betas": (0.9, 0.99999)}
    for ess, hess, names in (
        (1e7, 3e-4, ("winogrande_s", "boolq")),
        (1e8, 3e-4, ("winogrande_m",)),
        (1e6, 1e-3, ("arc_easy", "arc_challenge", "openbookqa")),
    )
    for name in names
}
"""The published settings for Llama-2-7B and 10,000 steps of batch 4 with linear decay, δ = 0, by task."""

SIGMA0, TEMPERATURE, BETAS = 0.04, 0.5, (0.9, 0.999)
"""What ``sigma0``, ``temperature`` and ``betas`` are if not given; docs/results.md says how they were found."""


@final
@dataclass(frozen=True)
class Ivon(Method):
    """Variational online Newton.

    Either in units that one can see (``sigma0``, ``max_step``, ``temperature``), or as in the paper (``ess``,
    ``hess_init``, ``learning_rate``, ``clip_radius``), or a ``preset`` of it.

    Attributes:
        sigma0: First standard deviation σ₀ of every parameter.
        max_step: Largest change of a coordinate in a step, times the schedule; None for the Trainer's learning rate.
        temperature: T = N/λ; 1 is Bayes' rule, less is a cold posterior.
        preset: Published settings, one of `PRESETS`.
        ess: λ, or ``sqrt`` for 5000·√N (arXiv 2506.14280).
        hess_init: h₀.
        learning_rate: η.
        clip_radius: ξ, bound on each coordinate of the update before η.
        rescale_lr: Whether η is multiplied by h₀ + δ.
        betas: (β₁, β₂), the memories of gradient and Hessian.
        weight_decay: δ; the prior is N(0, 1/(λδ)). The Trainer's own is not looked at.
        price_clip: Bound on |λ(θ−m)⊙ĝ|, the Hessian's estimate relative to h+δ.
        prior: ``fixed``, or ``empirical``: δ is estimated for each matrix.
        draws_per_step: Draws in an optimiser step, spread over its accumulated batches.
    """

    name: ClassVar[str] = "ivon"
    sigma0: float | None = None
    max_step: float | None = None
    temperature: float | None = None
    preset: str | None = None
    ess: float | Literal["sqrt"] | None = None
    hess_init: float | None = None
    learning_rate: float | None = None
    clip_radius: float | None = None
    rescale_lr: bool = False
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.0
    price_clip: float | None = None
    prior: Literal["fixed", "empirical"] = "fixed"
    draws_per_step: int = 1

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            InputError: If a setting is out of range, or settings of both kinds are given.
        """
        seen = [key for key in ("sigma0", "max_step", "temperature") if getattr(self, key) is not None]
        paper = [key for key in ("preset", "ess", "hess_init", "learning_rate") if getattr(self, key) is not None]
        if seen and paper:
            raise InputError(
                f"IVON takes either sigma0, max_step and temperature, or ess, hess_init and learning_rate; {seen[0]} "
                f"and {paper[0]} are given"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"IVON has no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.preset is None and paper and None in (self.ess, self.hess_init, self.learning_rate):
            raise InputError("ess, hess_init and learning_rate belong together: give all three, or a preset")
        if isinstance(self.ess, str) and self.ess != "sqrt":
            raise InputError(f"ess must be a number or 'sqrt', and it is {self.ess!r}")
        for key in ("sigma0", "max_step", "temperature"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"IVON's {key} must be finite and positive, and it is {value}")
        if self.draws_per_step < 1:
            raise InputError(f"draws_per_step must be at least 1, and it is {self.draws_per_step}")
        self.optimizer_settings(1000)

    @property
    def in_units(self) -> bool:
        """Whether the settings are ``sigma0``, ``max_step`` and ``temperature``, given or not."""
        return self.preset is None and self.ess is None

    def optimizer_settings(self, num_data: int) -> dict[str, Any]:
        """Return the settings of `IvonOptimizer` for a number of training examples.

        Args:
            num_data: Number of training examples N.

        Returns:
            Its keyword arguments; ``clip_radius`` is infinite where it is to be the Trainer's learning rate.

        Raises:
            InputError: If they have no meaning.
        """
        found: dict[str, Any] = {
            "betas": self.betas or BETAS,
            "weight_decay": self.weight_decay,
            "price_clip": math.inf if self.price_clip is None else self.price_clip,
            "prior": self.prior,
            "rescale_lr": self.rescale_lr,
        }
        published = PRESETS.get(self.preset or "", {})
        if not self.in_units:
            ess = self.ess if self.ess is not None else published["ess"]
            found |= {
                "ess": 5000 * math.sqrt(num_data) if ess == "sqrt" else ess,
                "hess_init": self.hess_init if self.hess_init is not None else published["hess_init"],
                "lr": self.learning_rate if self.learning_rate is not None else published["learning_rate"],
                "clip_radius": self.clip_radius or published.get("clip_radius", math.inf),
                "betas": self.betas or published.get("betas", BETAS),
            }
        else:
            ess = num_data / (self.temperature or TEMPERATURE)
            wanted = 1 / (ess * (self.sigma0 or SIGMA0) ** 2)
            if wanted <= self.weight_decay:
                raise InputError(
                    f"the prior alone (weight_decay={self.weight_decay}) makes IVON's noise smaller than sigma0; use a "
                    "smaller weight_decay or sigma0"
                )
            found |= {
                "ess": ess,
                "hess_init": wanted - self.weight_decay,
                "lr": 1.0,
                "clip_radius": self.max_step or self.clip_radius or math.inf,
            }
        check_ivon(found)
        return found

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> dict[str, Any]:
        """Return the optimiser, and the callback that draws and adds the noise.

        Raises:
            InputError: If the adapter is not plain LoRA (DoRA and other variants read their matrices elsewhere).
        """
        if isinstance(model, PeftModel):  # else TRL makes the adapter, and it is looked at when training begins
            plain_layers(model, "IVON")
        settings = self.optimizer_settings(check_num_data(num_data))
        sampler = _Sampler(self, num_data)
        return {
            "optimizer_cls_and_kwargs": (IvonOptimizer, settings),
            "callbacks": [sampler, Figures(self.name, sampler.figures)],
        }

    def posterior(self, model: nn.Module) -> DiagonalGaussian:
        """Return the Gaussian that the optimiser holds.

        Raises:
            InputError: If the model was not trained with IVON.
        """
        kept = require_record(model, self.name).kept
        mean, variance = moments(read(model), kept.get("best") or learned(kept["optimizer"], model))
        return DiagonalGaussian(mean, variance, origin_for(model, self))


@final
class _Sampler(TrainerCallback):
    """Draws at the beginning of each step, lets the modules read the draw, and tells how the variance did."""

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
        plain_layers(model, "IVON")
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
        for group in optimizer.param_groups:
            group["weight_decay"] = method.weight_decay
            if self.follows:
                group["clip_radius"] = args.learning_rate
        optimizer.param_groups[0]["seed"] = args.seed
        self.optimizer = optimizer
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        undo = shadowed(model, trained, self._value)
        remember(model, Record(method.name, self.num_data, {"optimizer": optimizer}, undo))

    @property
    def follows(self) -> bool:
        """Whether the largest step is the Trainer's learning rate."""
        return math.isinf(self.method.optimizer_settings(self.num_data)["clip_radius"]) and self.method.in_units

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
