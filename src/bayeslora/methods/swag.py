"""SWAG-LoRA: the adapter's path at a constant learning rate, summed up as a Gaussian.

Onal et al. 2024 (arXiv 2405.03425); Maddox et al. 2019 (arXiv 1902.02476), algorithm 1. After ``start`` steps the
learning rate is constant, and every ``interval`` steps the adapter θ is collected: mean θ̄ and diagonal
Σ_d = E[θ²] − θ̄² by Welford's recurrence in float32, and the last K raw snapshots. A draw is

    θ = θ̄ + √scale · ( √Σ_d ⊙ ε₁ + Dᵀε₂ / √(K−1) ),   D = snapshots − θ̄,  scale = ½

What we do differently from the released code: the snapshots are centred on the final mean when drawn, K counts the
snapshots that are there, and a draw is the same for the whole data set.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from safetensors import safe_open
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from bayeslora.errors import InputError
from bayeslora.methods.base import LATER, Method, PostHoc, TrainerKwargs, check_ranges, origin_for, trained
from bayeslora.methods.callback import HALF, MethodCallback, Run, widen, write_tensors
from bayeslora.methods.divergence import DIVERGENCE, ScaleByDivergence, check_scale
from bayeslora.methods.records import Record, require_record
from bayeslora.methods.steps import guarded, took_step
from bayeslora.methods.trainer_log import MetricsCallback, spread
from bayeslora.params import Params, lora_parameters, whole
from bayeslora.posteriors import DiagonalGaussian, LowRankGaussian, Point, Posterior

logger = logging.getLogger(__name__)

_STILL = 0.5
"""Share of numbers without any variance from which on it is worth a warning."""


@final
@dataclass(frozen=True)
class Swag(Method):
    """Stochastic weight averaging, Gaussian.

    Attributes:
        kind: ``full`` (diagonal plus low rank), ``diagonal``, or ``swa`` (the mean alone).
        start: When to begin: a step, or a share of all steps if it is a float below 1. 0 continues from an adapter
            that has converged.
        interval: Steps between collections; None collects 2·``rank`` times.
        learning_rate: Constant rate from ``start`` on; None for a tenth of the Trainer's peak, as in the paper.
        rank: Number K of snapshots that are kept.
        scale: Factor on the covariance; None for ½ with the low-rank part and 1 without; ``divergence`` for the one
            with a mean divergence of the draws from the mean (`ScaleByDivergence`), which `bayeslora.fit` finds.
        divergence: That divergence κ, nats a row.
    """

    name: ClassVar[str] = "swag"
    kind: Literal["full", "diagonal", "swa"] = "full"
    start: int | float = 0.5
    interval: int | None = None
    learning_rate: float | None = None
    rank: int = 5
    scale: float | Literal["divergence"] | None = None
    divergence: float = field(default=DIVERGENCE, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse settings that have no meaning."""
        if self.kind not in ("full", "diagonal", "swa"):
            raise InputError(f"kind must be full, diagonal or swa, and it is {self.kind!r}")
        if self.start < 0 or (isinstance(self.start, float) and self.start >= 1):
            raise InputError(f"start must be a step or a share in [0, 1), and it is {self.start}")
        if self.rank < 2 or (self.interval is not None and self.interval < 1):
            raise InputError(f"rank must be at least 2 and interval at least 1; they are {self.rank}, {self.interval}")
        by_word = isinstance(self.scale, str)
        check_ranges(self, not_negative=() if by_word else ("scale",), positive=("learning_rate",))
        check_scale(self.scale if by_word else None, self.divergence, "SWAG")
        if by_word and self.kind == "swa":
            raise InputError("SWAG's mean alone (kind='swa') has no noise to scale; use the kind full or diagonal")

    def trainer_kwargs(self, model: nn.Module, num_data: int) -> TrainerKwargs:
        """Return the callback that holds the learning rate and collects, and the one that logs what it has."""
        if self.scale == "divergence":
            raise InputError(
                "SWAG's scale by divergence needs the task's rows, which a Trainer of your own has not; use bl.fit, or "
                "Swag() and then ScaleByDivergence().fit(model, task, start=posterior)"
            )
        collector = Collector(self, num_data)
        metrics = MetricsCallback(self.name, collector.metrics)
        return {"callbacks": guarded([collector, metrics])}

    @property
    def stages(self) -> tuple[Method, PostHoc[Posterior] | None]:
        """Collect with the usual scale; then scale, if it is by divergence."""
        by_divergence = ScaleByDivergence(self.divergence) if self.scale == "divergence" else None
        return (self, None) if by_divergence is None else (replace(self, scale=None), by_divergence)

    def posterior(self, model: nn.Module) -> Posterior:
        """Return the Gaussian over the collected path; a `Point` for ``swa``; see `Method.posterior`."""
        moments: Moments = require_record(model, self.name).learned
        needed = 1 if self.kind == "swa" else 2
        if moments.count < needed:
            raise InputError(
                f"SWAG collected {moments.count} snapshots and needs {needed}; train longer, start earlier or collect "
                "more often"
            )
        return self.summary(moments, model)

    def summary(self, moments: Moments, model: nn.Module) -> Posterior:
        """Return the posterior of collected moments.

        Args:
            moments: What was collected.
            model: The model, for the origin and for parameters that were not trained.

        Returns:
            A posterior of the family that ``kind`` names.
        """
        origin = origin_for(model, self)
        mean = trained(model) | {n: m.clone() for n, m in moments.mean.items()}
        if self.kind == "swa":
            return Point(mean, origin)
        scale = float(self.scale) if self.scale is not None else (0.5 if self.kind == "full" else 1.0)
        variance = {n: (m / moments.count).clamp(min=1e-30) for n, m in moments.squares.items()}
        if self.kind == "diagonal":
            return DiagonalGaussian(mean, {n: v * scale for n, v in variance.items()}, origin)
        snapshots = {n: torch.stack([s[n] for s in moments.snapshots]) for n in variance}
        return LowRankGaussian(mean, variance, snapshots, scale, origin)


class Moments:
    """Running mean and sum of squared deviations in float32 (Welford 1962), and the last snapshots, all on the CPU."""

    def __init__(self, rank: int) -> None:
        self.count = 0
        self.mean: Params = {}
        self.squares: Params = {}
        self.snapshots: deque[Params] = deque(maxlen=rank)

    def add(self, params: Params) -> None:
        """Collect one value of every parameter, of any type on any device; it is copied."""
        self.count += 1
        copies = {name: whole(p.detach()).to("cpu", torch.float32, copy=True) for name, p in params.items()}
        for name, value in copies.items():
            mean = self.mean.setdefault(name, torch.zeros_like(value))
            squares = self.squares.setdefault(name, torch.zeros_like(value))
            delta = value - mean
            mean += delta / self.count
            squares += delta * (value - mean)
        self.snapshots.append(copies)

    def still(self) -> float:
        """Return the share of numbers that were the same in every collection."""
        total = sum(m.numel() for m in self.squares.values())
        return sum(int((m == 0).sum()) for m in self.squares.values()) / total if self.count > 1 and total else 0.0

    def save(self, path: Path) -> None:
        """Write the moments to a safetensors file."""
        tensors = {f"mean/{n}": t for n, t in self.mean.items()} | {f"squares/{n}": t for n, t in self.squares.items()}
        for i, snapshot in enumerate(self.snapshots):
            tensors |= {f"{i}/{n}": t for n, t in snapshot.items()}
        write_tensors(path, tensors, {"count": str(self.count)})

    def load(self, path: Path) -> None:
        """Read the moments back."""
        with safe_open(path, "pt") as file:
            self.count = int(file.metadata()["count"])
            snapshots: dict[int, Params] = {}
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition("/")
                home = {"mean": self.mean, "squares": self.squares}.get(part)
                (snapshots.setdefault(int(part), {}) if home is None else home)[name] = file.get_tensor(key)
        self.snapshots.extend(snapshots[i] for i in sorted(snapshots))


@final
class Collector(MethodCallback):
    """Holds the learning rate from the start step on, and collects every so many steps."""

    name, title, file = Swag.name, "SWAG", "bayeslora_swag.safetensors"

    def __init__(self, method: Swag, num_data: int) -> None:
        super().__init__(num_data)
        self.method = method
        self.moments = Moments(method.rank)
        self.start = self.interval = 0
        self.moved = True

    def begin(self, run: Run) -> Record:
        """Plan the collections, hold the schedule, and take up the moments of a checkpoint."""
        args, state, method = run.args, run.state, self.method
        if args.world_size == 1 and not args.deepspeed:  # what wraps the model for several processes has noted the type
            widen(run.model, run.optimizer)
        start = method.start
        self.start = round(start * state.max_steps) if isinstance(start, float) else start
        left = state.max_steps - self.start
        self.interval = method.interval or max(1, left // (2 * method.rank))
        if left // self.interval < (1 if method.kind == "swa" else 2):
            raise InputError(
                f"SWAG from step {self.start} every {self.interval} steps collects {max(0, left // self.interval)} "
                f"snapshots in {state.max_steps} steps; train longer, start earlier or collect more often"
            )
        if args.load_best_model_at_end:
            logger.warning("SWAG sums up the whole path: load_best_model_at_end changes the model, not its posterior")
        self.moments = Moments(method.rank)
        if state.global_step > self.start:
            self.resume(run, self.moments.load)
        hold(run.scheduler, self.start, method.learning_rate or args.learning_rate / 10)
        return Record(self.name, self.num_data, self.moments)

    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Note whether the step was taken."""
        self.moved = took_step(kwargs["optimizer"])

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Collect if it is time, and not where the last collection was."""
        since = state.global_step - self.start
        if since > 0 and since % self.interval == 0 and self.moved:
            self.moments.add({name: p for name, p in lora_parameters(kwargs["model"]).items() if p.requires_grad})

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Return how many snapshots were collected and are kept, and the path's deviations √Σ_d, for the log."""
        count, rank = self.moments.count, len(self.moments.snapshots)
        squares = self.moments.squares.values() if count > 1 else ()
        return {"snapshots": count, "rank": rank, **spread((m / count).sqrt() for m in squares)}

    def save(self, path: Path, run: Run) -> None:
        """Write the moments, once there may be some."""
        if run.state.global_step > self.start:
            self.moments.save(path)

    def end(self, run: Run) -> None:
        """Warn if most of the adapter did not move, for then it has no variance."""
        share = self.moments.still()
        if self.method.kind == "swa" or share < _STILL:
            return
        half = next((p.dtype for p in lora_parameters(run.model).values() if p.requires_grad and p.dtype in HALF), None)
        advice = "raise SWAG's learning_rate, or take snapshots further apart (interval)"
        if half is not None:
            advice = f"the adapter is in {half}, in which small steps are lost: train it in float32"
        logger.warning(
            "SWAG: %.0f %% of the adapter's numbers were the same in all %d snapshots, so they have no variance; %s",
            100 * share, self.moments.count, advice,
        )  # fmt: skip


def hold(scheduler: object, start: int, rate: float) -> None:
    """Make a schedule constant from a step on; it must be a function of the step, as transformers' are but one."""
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, LambdaLR):
        raise InputError(
            f"SWAG cannot hold the learning rate of a {type(inner).__name__}; use lr_scheduler_type='linear'"
        )

    def held(before: Callable[[int], float], base: float) -> Callable[[int], float]:
        """Return the schedule that is constant from the start of the phase on."""
        return lambda step: rate / base if step >= start else before(step)

    inner.lr_lambdas = [held(f, float(base)) for f, base in zip(inner.lr_lambdas, inner.base_lrs, strict=True)]
    rates = [base * f(inner.last_epoch) for f, base in zip(inner.lr_lambdas, inner.base_lrs, strict=True)]
    for group, now in zip(inner.optimizer.param_groups, rates, strict=True):
        group["lr"] = now
    inner._last_lr = rates
