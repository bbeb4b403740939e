"""IVON-LoRA: a diagonal Gaussian over the adapter, learned by variational online Newton in the place of AdamW.

Cong et al. 2024 (arXiv 2411.04421), with the optimiser of Shen et al. 2024 (arXiv 2402.17641, algorithm 1; see
`ivon.optimizer`), minimise λ·E_q[ℓ(θ)] + KL(q‖p) over q = N(m, diag σ²), σ = 1/√(λ(h+δ)), p = N(0, 1/(λδ)). At
prediction λ can be multiplied by τ (``tempered(posterior, 1/τ)``) and parameters of low |m|/σ removed, matrix by matrix
(``pruned``), as in Cong et al. 2025 (arXiv 2506.14280).

What we do differently: beside (λ, h₀, η, ξ) there are settings in the adapter's own units (``sigma0``,
``prior_sigma``, ``max_step``, ``temperature``), from which h₀ and δ follow; docs/methods/ivon.md says what the defaults
are and why. The parameters hold the mean all the time: noise is added where a module reads its parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peft import PeftModel
from torch import nn

from bayeslora.errors import InputError
from bayeslora.methods.base import Method, TrainerKwargs, check_ranges, origin_for, trained
from bayeslora.methods.guards import plain_layers
from bayeslora.methods.ivon.optimizer import IvonOptimizer
from bayeslora.methods.ivon.sampler import Sampler, learned, moments
from bayeslora.methods.ivon.settings import BETAS, PRESETS, WARMUP, Group, check_ivon, default_ess
from bayeslora.methods.records import check_num_data, require_record
from bayeslora.methods.steps import guarded
from bayeslora.methods.trainer_log import MetricsCallback
from bayeslora.posteriors import DiagonalGaussian


@final
@dataclass(frozen=True)
class Ivon(Method):
    """Variational online Newton.

    Either in the adapter's own units (``sigma0``, ``prior_sigma``, ``max_step``, ``temperature``), or as in the paper
    (``ess``, ``hess_init``, ``learning_rate``, ``clip_radius``), or a ``preset`` of it.

    Attributes:
        sigma0: First standard deviation σ₀ of every parameter; None for one by its matrix, see `default_sigma`.
        prior_sigma: Standard deviation σ_p of the prior, which σ never exceeds; None for σ₀, ``inf`` for a flat prior.
        max_step: Largest change of a coordinate in a step, times the schedule; None for half the Trainer's learning
            rate.
        temperature: T = N/λ; 1 is Bayes' rule, less is a cold posterior; None for λ by `default_ess`.
        preset: Published settings, one of `PRESETS`.
        ess: λ, or ``sqrt`` for 5000·√N (arXiv 2506.14280).
        hess_init: h₀.
        learning_rate: η.
        clip_radius: ξ, bound on each coordinate of the update before η.
        rescale_lr: Whether η is multiplied by h₀ + δ.
        betas: (β₁, β₂), the memories of gradient and Hessian.
        weight_decay: δ, where σ_p is not given. The Trainer's own is not looked at.
        prior_mean: ``start`` for a prior around the adapter's start, ``zero`` as in algorithm 1; None for ``start`` in
            the adapter's units, and ``zero`` in the paper's.
        prior_warmup: Steps over which the pull to the prior's mean grows in; None for 300 in the adapter's
            units, and 0 in the paper's.
        price_clip: Bound on |λ(θ−m)⊙ĝ|, the Hessian's estimate relative to h+δ.
        prior: ``fixed``, or ``empirical``: δ is estimated for each matrix.
        draws_per_step: Draws in an optimiser step, spread over its accumulated batches.
    """

    name: ClassVar[str] = "ivon"
    sigma0: float | None = None
    prior_sigma: float | None = None
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
    prior_mean: Literal["start", "zero"] | None = None
    prior_warmup: float | None = None
    price_clip: float | None = None
    prior: Literal["fixed", "empirical"] = "fixed"
    draws_per_step: int = 1

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        visible = [k for k in ("sigma0", "prior_sigma", "max_step", "temperature") if getattr(self, k) is not None]
        paper = [key for key in ("preset", "ess", "hess_init", "learning_rate") if getattr(self, key) is not None]
        if visible and paper:
            raise InputError(
                f"IVON takes either sigma0, prior_sigma, max_step and temperature, or ess, hess_init and "
                f"learning_rate; {visible[0]} and {paper[0]} are given"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"IVON has no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.preset is None and paper and None in (self.ess, self.hess_init, self.learning_rate):
            raise InputError("ess, hess_init and learning_rate belong together: give all three, or a preset")
        if isinstance(self.ess, str) and self.ess != "sqrt":
            raise InputError(f"ess must be a number or 'sqrt', and it is {self.ess!r}")
        positive = ("sigma0", "prior_sigma", "max_step", "temperature")
        check_ranges(self, prefix="IVON's ", positive=positive, infinite=("prior_sigma",))
        if self.prior_sigma is not None and self.weight_decay:
            raise InputError("prior_sigma and weight_decay both say how wide IVON's prior is; give one of them")
        if self.sigma0 is not None and self.prior_sigma is not None and self.sigma0 > self.prior_sigma:
            raise InputError(
                f"IVON's noise cannot begin wider than its prior: sigma0 is {self.sigma0} and prior_sigma "
                f"{self.prior_sigma}"
            )
        check_ranges(self, at_least={"draws_per_step": 1})
        self.optimizer_settings(1000, 100_000)  # what does not depend on N and P

    @property
    def in_units(self) -> bool:
        """Whether the settings are ``sigma0``, ``prior_sigma``, ``max_step`` and ``temperature``, given or not."""
        return self.preset is None and self.ess is None

    def optimizer_settings(self, num_data: int, num_parameters: int | None = None) -> Group:
        """Return the settings of `IvonOptimizer` for a number of training examples.

        Args:
            num_data: Number of training examples N.
            num_parameters: Number of trained parameters P; None if λ does not depend on it, or is set later.

        Returns:
            Its keyword arguments; ``clip_radius`` is infinite where it follows the Trainer's learning rate. In the
            units that one can see h₀ and δ are each parameter's own, see `own_settings`, and those here stand for
            σ₀ = .04.

        Raises:
            InputError: If they have no meaning.
        """
        # ``clip_radius`` is infinite where it follows the Trainer's learning rate; in the adapter's units h₀ and δ are
        # each parameter's own, see `own_settings`, and those here stand for σ₀ = .04
        published = PRESETS.get(self.preset or "", {})
        settings: Group = {
            "betas": self.betas or published.get("betas", BETAS),
            "clip_radius": self.max_step or self.clip_radius or published.get("clip_radius", math.inf),
            "weight_decay": self.weight_decay,
            "price_clip": math.inf if self.price_clip is None else self.price_clip,
            "prior": self.prior,
            "rescale_lr": self.rescale_lr,
            "prior_mean": self.prior_mean or ("start" if self.in_units else "zero"),
            "prior_warmup": (WARMUP if self.in_units else 0.0) if self.prior_warmup is None else self.prior_warmup,
            "bounded": self.in_units,
        }
        if self.in_units:
            ess = num_data / self.temperature if self.temperature else default_ess(num_data, num_parameters or 0)
            settings |= {"ess": ess, "lr": 1.0, "hess_init": 1 / (ess * (self.sigma0 or 0.04) ** 2)}
        else:
            settings |= {
                "ess": published["ess"] if self.ess is None else self.ess,
                "hess_init": published["hess_init"] if self.hess_init is None else self.hess_init,
                "lr": published["learning_rate"] if self.learning_rate is None else self.learning_rate,
            }
            if self.ess == "sqrt":
                settings["ess"] = 5000 * math.sqrt(num_data)
        check_ivon(settings)
        return settings

    def own_settings(self, ess: float, sigma: float) -> dict[str, float]:
        """Return h₀ and δ of a parameter, in the units that one can see.

        Args:
            ess: λ.
            sigma: Its first standard deviation, if ``sigma0`` does not say it.

        Returns:
            ``hess_init`` and ``weight_decay``.

        Raises:
            InputError: If the noise would begin wider than the prior.
        """
        sigma = self.sigma0 or (min(sigma, self.prior_sigma) if self.prior_sigma else sigma)
        total = 1 / (ess * sigma**2)
        delta = self.weight_decay or 1 / (ess * (self.prior_sigma or sigma) ** 2)
        if delta > total * (1 + 1e-6):
            raise InputError(
                f"IVON's noise cannot begin wider than its prior: weight_decay={self.weight_decay:g} at λ = {ess:g} is "
                f"a prior of deviation {1 / math.sqrt(ess * delta):.2g}, and sigma0 is {sigma:.2g}; lower one of them"
            )
        return {"hess_init": max(0.0, total - delta), "weight_decay": delta}

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Return the optimiser, and the callback that draws and adds the noise; see `Method.trainer_kwargs`."""
        if isinstance(model, PeftModel):  # else TRL makes the adapter, and it is looked at when training begins
            plain_layers(model, "IVON")
        if self.in_units and self.sigma0 and self.weight_decay and self.temperature:
            self.own_settings(num_data / self.temperature, self.sigma0)  # else refused when P is known
        settings = self.optimizer_settings(check_num_data(num_data))
        sampler = Sampler(self, num_data)
        return {
            "optimizer_cls_and_kwargs": (IvonOptimizer, settings),
            "callbacks": guarded([sampler, MetricsCallback(self.name, sampler.metrics)]),
        }

    def posterior(self, model: nn.Module) -> DiagonalGaussian:
        """Return the Gaussian that the optimiser holds; see `Method.posterior`."""
        known = require_record(model, self.name).learned
        if isinstance(known, IvonOptimizer):
            known = learned(known, model)
        mean, variance = moments(trained(model), known)
        return DiagonalGaussian(mean, variance, origin_for(model, self))
